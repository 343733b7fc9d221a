"""The commands of the documentation's pages run, or are right as far as that is short."""

import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser

from pulseopt_hf import cli
from pulseopt_hf.command_line import Parser
from pulseopt_hf.compare.compare import plan_of
from pulseopt_hf.recipes import catalogue, launching
from tests.conftest import run_command

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
SEEN = ("report", "plot", "watch")  # commands that need a run to look at


def commands(page: str) -> list[list[str]]:
    """Return the commands of a page's blocks, and of the tables of commands, as words."""
    text = (DOCS / page).read_text()
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)
    lines = "\n".join(block for language, block in blocks if language in ("", "bash"))
    found = lines.replace("\\\n", " ").splitlines()
    found += re.findall(r"`((?:python|torchrun|accelerate launch) [^`]+)`(?: \||\n)", text)
    words = [shlex.split(line.replace(".venv/bin/", ""), comments=True) for line in found]
    return [w[1:] if re.fullmatch(r"[A-Z_]+=\S*", w[0]) else w for w in words if w]


PAGES = {file.name: commands(file.name) for file in sorted(DOCS.glob("*.md"))}
LAUNCHERS = {"accelerate": launch_command_parser(), "torchrun": get_args_parser()}


def check(words: list[str], folder: Path) -> None:
    """Run a command, or of one that trains or needs GPUs check all of its words."""
    if words[0] == "pulseopt-hf":
        assert run(words[1:]) == cli.DONE
    elif words[0] == "sbatch":
        script = words.index("slurm.sh")
        assert (folder / words[script]).exists()
        assert run(["train", *words[script + 1 :]]) == cli.DONE
    elif words[0] == "make":
        run_command("make", "--dry-run", *words[1:], cwd=ROOT)
    elif words[0] in LAUNCHERS:
        parsed = LAUNCHERS[words[0]].parse_args(words[2 if words[0] == "accelerate" else 1 :])
        config = getattr(parsed, "config_file", None)
        if config is not None:
            path = folder / config
            load_config_from_file(str(path if path.exists() else ROOT / config))
        if getattr(parsed, "module", False):
            assert parsed.training_script == "pulseopt_hf"
            assert run(parsed.training_script_args) == cli.DONE
        else:  # tests/engines launch it
            assert (ROOT / parsed.training_script).exists()
    elif words[:2] == ["pip", "install"]:
        (extras,) = re.findall(r"^(?:pulseopt-hf|\.)\[([\w,]+)\]$", words[2])
        for extra in extras.split(","):
            assert re.search(rf"^{extra} = \[", (ROOT / "pyproject.toml").read_text(), re.M)
    elif words[:2] == ["python", "-m"]:  # tests/test_quickstart.py and test_benchmarks.py run them
        assert importlib.util.find_spec(words[2]) is not None
    else:
        assert words[0] == "python"
        assert (ROOT / words[1]).exists()


def run(words: list[str]) -> int:
    if words[0] == "train" or words[:2] == ["find-lr", "my.yaml"]:
        # What they give, other tests show; the recipe's data is the hub's.
        parser = Parser("train", takes_recipe=True)
        launching.add_options(parser)
        options, rest = parser.parse_known_args(words[1:])
        profile = f"launch/{options.accelerate_config or 'ddp'}"
        assert profile in catalogue.profiles()
        rest = [word for word in rest if word not in ("--resume", "--overwrite")]
        words = ["validate", options.recipe, *rest, "--use_cpu"]
    if words[0] == "compare":
        assert plan_of(words[1:]).runs
        return cli.DONE
    return cli.main(words)


def test_there_are_commands_to_run() -> None:
    assert sum(map(len, PAGES.values())) > 50


@pytest.mark.parametrize("page", [name for name, words in PAGES.items() if words])
def test_the_commands_of_a_page_are_right(page, tmp_path, monkeypatch):
    """In their order and in one folder, as a reader would run them."""
    monkeypatch.chdir(tmp_path)
    for name in ("train", "validation"):
        Path(f"{name}.csv").write_text("sentence,label\na good film,1\na bad film,0\n")
        Path(f"{name}.jsonl").write_text('{"text": "a good film"}\n')
    for words in PAGES[page]:
        if words[1] not in SEEN:
            check(words, tmp_path)
    assert Path("lr.svg").exists() == (page == "recipes.md")


@pytest.mark.slow
def test_the_commands_on_reports_show_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short = ["--max_steps", "60", "--logging_steps", "1", "--quiet", "--use_cpu"]
    for name in ("first", "control", "other"):
        words = ["train", "quickstart/lm", "--output_dir", f"runs/{name}", *short]
        assert cli.main(words) == cli.DONE
    for words in PAGES["report.md"]:
        if words[1] in SEEN:
            assert cli.main(words[1:]) == cli.DONE, words
    page = Path("first.html").read_text()
    assert "Loss" in page
    assert "Learning rate calibrated: 5e-05 was set, " in page
    assert Path("three.html").stat().st_size > 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_comparison_shows_what_its_page_says(tmp_path, monkeypatch):
    """From Trainer's default LR, static runs learn little and calibrated ones as from another."""
    monkeypatch.chdir(tmp_path)
    (words,) = (words for words in PAGES["compare.md"] if "5e-5,1e-3" in words)
    assert cli.main(words[1:]) == cli.DONE
    content = json.loads(Path("runs/compare-quickstart-lm/compare.json").read_text())
    losses = {
        (cell["cell"]["method"], cell["cell"]["learning_rate"]): cell["loss_after"]
        for cell in content["cells"]
    }
    assert losses["static", 5e-5] > losses["static", 1e-3] + 0.5
    for learning_rate in (5e-5, 1e-3):
        assert losses["default", learning_rate] < losses["static", 1e-3] + 0.1
