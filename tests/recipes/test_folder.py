"""The run folder: which one it is, what it records, and what a run is resumed from."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
import yaml

from pulseopt_hf.cli import main
from pulseopt_hf.recipes import folder
from pulseopt_hf.recipes.parsing import resolve
from pulseopt_hf.report.record_reader import read_run
from pulseopt_hf.trainer.checkpoints import checkpoints
from tests.recipes.tiny import assert_same_run, files_of, results, train

STEPS = ["--max_steps", "30", "--save_strategy", "steps", "--save_steps", "10"]
STEPS += ["--save_total_limit", "5", "--lr_candidates", "0.5", "1.0", "2.0"]


@pytest.fixture(scope="module")
def options(bert: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    files = files_of("cola", tmp_path_factory.mktemp("cola"))
    return ["--model_name_or_path", bert, *files, "--learning_rate", "1e-3", *STEPS]


@pytest.fixture(scope="module")
def run(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "first"
    train("glue/cola", path, *options)
    return path


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copy"))


def times(path: Path) -> dict[Path, int]:
    return {p: p.stat().st_mtime_ns for p in path.rglob("*")}


def test_the_folder_says_what_was_run_on_what(run: Path) -> None:
    (command,) = json.loads((run / "run.json").read_text())["commands"]
    assert command["command"][:3] == ["pulseopt-hf", "train", "glue/cola"]
    assert {"python", "torch", "transformers", "pulseopt-hf"} <= set(command["versions"])
    assert command["processes"] == 1
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    assert recipe["max_steps"] == 30
    assert recipe["lr_candidates"] == [0.5, 1.0, 2.0]
    for name in ("train", "eval", "all"):
        assert json.loads((run / f"{name}_results.json").read_text())
    card = (run / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "transformers"
    played = [episode.lr_value for episode in read_run(run).episodes]
    assert set(played) == {0.5, 1.0, 2.0}
    for multiplier in set(played):
        plays = played.count(multiplier)
        assert f"| x{multiplier:g} | 0 | {plays} | {5 * plays} |" in card


def test_a_calibrated_run_keeps_the_lr_that_was_set_and_says_what_was_used(options, tmp_path):
    train("glue/cola", tmp_path, *options, "--max_steps", "60", "--lr_candidates", "1.0")
    record = read_run(tmp_path)
    assert record.calibrated_lr is not None
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text())["learning_rate"] == 1e-3
    card = (tmp_path / "README.md").read_text()
    assert "| Learning rate that was set | 0.001 |" in card
    assert f"| Calibrated learning rate | {record.calibrated_lr:.4g}, found in " in card
    log = (tmp_path / "train.log").read_text().splitlines()
    assert str(record.outcome) in log
    assert len([line for line in log if line.startswith("trial ")]) == len(record.trials) > 5


def test_a_card_of_a_run_whose_lr_was_left_alone_does_not_claim_otherwise(options, tmp_path):
    off = ["--lr_candidates", "1.0", "--calibration", "off", "--max_steps", "10"]
    train("glue/cola", tmp_path, *options, *off)
    card = (tmp_path / "README.md").read_text()
    assert "## Results" in card
    assert "earning rate" not in card
    assert "aees" not in card


def test_the_resolved_recipe_runs_again_to_the_same_numbers(run: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    assert main(["train", str(run / "recipe.yaml"), "--quiet", "--output_dir", str(again)]) == 0
    clocks = ("runtime", "per_second")
    first, second = (
        {k: v for k, v in results(path).items() if not k.endswith(clocks)} for path in (run, again)
    )
    assert first == second
    assert_same_run(run, again)


def test_the_saved_model_has_the_runs_score_without_training(run, options, tmp_path):
    words = [*options, "--no_do_train", "--model_name_or_path", str(run)]
    scores = train("glue/cola", tmp_path / "evaluated", *words)
    assert scores["eval_loss"] == results(run)["eval_loss"]
    assert "train_loss" not in scores


def test_a_resumed_run_passes_over_damaged_checkpoints_and_ends_as_the_whole_run(
    run: Path, copy: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for checkpoint, name in (("30", "trainer_state.json"), ("20", "optimizer.pt")):
        file = copy / f"checkpoint-{checkpoint}" / name
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    words = ["--resume", "--output_dir", str(copy), "--use_cpu", *options]
    assert main(["train", "glue/cola", *words, "--per_device_train_batch_size", "8"]) == 0
    said = capsys.readouterr().out
    assert "passed over checkpoint-30: its trainer_state.json is cut short" in said
    assert "passed over checkpoint-20: its optimizer.pt is cut short" in said
    assert f"resuming from {copy / 'checkpoint-10'}" in said
    assert "episode   1" not in said
    assert "episode   3" in said
    assert_same_run(run, copy)
    commands = json.loads((copy / "run.json").read_text())["commands"]
    assert [command["resumed_from"] for command in commands] == [None, "checkpoint-10"]


def test_nothing_to_resume_from_is_bad_usage(tmp_path, options, capsys):
    words = ["train", "glue/cola", "--output_dir", str(tmp_path / "no"), *options]
    assert main([*words, "--resume"]) == 2
    assert "there is no whole checkpoint" in capsys.readouterr().err
    assert main([*words, "--resume_from_checkpoint", str(tmp_path)]) == 2
    assert "is not a checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_a_run_goes_on_with_its_settings_unless_others_are_asked_for(copy, options, capsys):
    before = times(copy)
    same = ["--resume", "--use_cpu", "--per_device_train_batch_size", "8", *options]
    words = ["train", "glue/cola", "--output_dir", str(copy), *same]
    assert main([word for word in words if word not in ("--learning_rate", "1e-3")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "`learning_rate` was 0.001 in this run and would be 2e-05 now" in line
    assert times(copy) == before
    assert main([*words, "--max_steps", "32", "--quiet"]) == 0
    assert read_run(copy).max_steps == 32


def test_the_resume_command_has_every_option_but_secrets_and_names_the_folder(options):
    words = ["glue/cola", *options, "--run_name", "{task} run", "--hub_token=secret"]
    command = ["pulseopt-hf", "train", *words, "--overwrite", "--hub-token", "secret"]
    said = folder.resume_command(Path("runs/x"), resolve(words[0], words[1:]), command)
    kept = [*words[:-1], "--hub_token=...", "--hub-token", "...", "--output_dir", "runs/x"]
    assert shlex.split(said) == ["pulseopt-hf", "train", *kept, "--resume"]


def test_a_finished_run_is_replaced_only_if_that_is_asked_for(copy, options, capsys):
    before = times(copy)
    assert main(["train", "glue/cola", "--output_dir", str(copy), *options]) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert times(copy) == before
    (copy / "mine.txt").write_text("kept")
    assert main(["plot", str(copy)]) == main(["report", str(copy)]) == 0
    assert read_run(copy).max_steps == 30
    train("glue/cola", copy, *options, "--overwrite", "--max_steps", "15")
    assert [path.name for path in checkpoints(copy)] == ["checkpoint-15", "checkpoint-10"]
    assert (copy / "mine.txt").read_text() == "kept"
    assert not [*copy.glob("plots/*"), *copy.glob("report.html")]
    assert read_run(copy).max_steps == 15
    folder.clear(copy)
    assert not (copy / "pulse.jsonl").exists()


def test_unnamed_runs_get_folders_of_their_own(options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert main(["train", "glue/cola", *options, "--quiet", "--max_steps", "15"]) == 0
    assert sorted(path.name for path in Path("runs").iterdir()) == ["glue-cola", "glue-cola-2"]
    assert main(["train", "runs/glue-cola/recipe.yaml", "--quiet"]) == 0
    third, first = results(Path("runs/glue-cola-3")), results(Path("runs/glue-cola"))
    assert third["eval_loss"] == first["eval_loss"]
