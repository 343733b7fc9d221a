"""The README's commands run, its tables are made from the code, its script is the product's."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pulseopt_hf import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()

# Every command in a block of the README, and the test that runs it.
RUN_BY = {
    "make quickstart": "tests/packaging/test_clean_clone.py",
    "make test": "tests/packaging/test_clean_clone.py",
    ".venv/bin/python examples/trainer.py": "tests/test_examples.py",
    ".venv/bin/python examples/callback.py": "tests/test_examples.py",
    ".venv/bin/python examples/accelerate_loop.py": "tests/test_examples.py",
    ".venv/bin/python examples/find_learning_rate.py": "tests/test_examples.py",
    "make benchmark": "tests/test_benchmarks.py",
    ".venv/bin/pulseopt-hf list": "tests/cli/test_commands.py",
    ".venv/bin/pulseopt-hf compare quickstart/lm --methods static,default "
    "--learning_rates 5e-5,1e-3 --seeds 0": "tests/test_readme.py",
    ".venv/bin/pulseopt-hf report runs/sst2": "tests/report/test_command.py",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_every_command_of_the_readme_is_run_by_a_test() -> None:
    commands = [line for block in blocks("bash") for line in block.strip().splitlines()]
    recipe_run = [c for c in commands if c.startswith(".venv/bin/pulseopt-hf train glue/sst2")]
    assert len(recipe_run) == 1  # run by the test below and, whole, by tests/recipes
    assert set(commands) - set(recipe_run) == set(RUN_BY)
    assert all((ROOT / test).exists() for test in RUN_BY.values())


def test_the_table_of_knobs_is_the_configs() -> None:
    code = "import sys; sys.path.insert(0, 'benchmarks'); import knobs_table as k;"
    code += "text = k.README.read_text(); assert k.with_table(text) == text, 'run `make readme`'"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_scripts_of_the_readme_run(
    tiny_model: Any, tiny_data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As written, but for the name of the hub's model, which a local folder takes the place of."""
    from transformers import BertConfig, BertForSequenceClassification

    tiny = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    BertForSequenceClassification(tiny).save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    rows = 6 * tiny_data  # 159 steps, enough to calibrate
    data = [{"input_ids": row["input_ids"], "labels": i % 2} for i, row in enumerate(rows)]
    scripts = blocks("python")
    assert len(scripts) == 3
    namespace: dict[str, Any] = {"train_data": data}
    exec(scripts[0].replace("distilbert-base-uncased", str(tmp_path / "model")), namespace)
    aees = namespace["trainer"].aees
    assert len(aees.calibrator.search.trials) > 5
    assert aees.calibrator.outcome.learning_rate > 1e-4  # 2e-5 was set
    assert set(aees.get_logs()["selected_lr_values"]) == {1.0}
    from transformers import Trainer, TrainingArguments

    vanilla = Trainer(tiny_model(), TrainingArguments("out", max_steps=80), train_dataset=tiny_data)
    asked: dict[str, Any] = {"trainer": vanilla}
    exec(scripts[1], asked)
    assert asked["suggestion"].learning_rate > 1e-4
    exec(scripts[2], {"trainer": vanilla})
    aees = vanilla.aees  # type: ignore[attr-defined]
    assert aees.calibrator.outcome.learning_rate == asked["suggestion"].learning_rate
    assert set(aees.get_logs()["selected_lr_values"]) == {0.5, 1.0, 2.0}


def test_the_recipe_of_the_readme_is_a_right_one(tmp_path: Path) -> None:
    """With files of its own and without training; the slow suite trains it on the real SST-2."""
    (command,) = re.findall(r"pulseopt-hf (train glue/sst2 .*)", README)
    words = command.split()[1:]
    for name in ("train.csv", "validation.csv"):
        (tmp_path / name).write_text("sentence,label\na good film,1\na bad film,0\n")
    words = [str(tmp_path / word) if word.endswith(".csv") else word for word in words]
    assert cli.main(["validate", *words]) == 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_comparison_of_the_readme_shows_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From Trainer's default LR, static runs learn little and calibrated ones as from another."""
    (command,) = re.findall(r"pulseopt-hf (compare quickstart/lm .*)", README)
    monkeypatch.chdir(tmp_path)
    assert cli.main(command.split()) == 0
    content = json.loads((tmp_path / "runs/compare-quickstart-lm/compare.json").read_text())
    losses = {
        (cell["cell"]["method"], cell["cell"]["learning_rate"]): cell["loss_after"]
        for cell in content["cells"]
    }
    assert losses["static", 5e-5] > losses["static", 1e-3] + 0.5
    for learning_rate in (5e-5, 1e-3):
        assert losses["default", learning_rate] < losses["static", 1e-3] + 0.1
