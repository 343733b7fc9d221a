"""A checkpoint is whole or is passed over; a save that fails is heard of."""

import errno
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pulseopt_hf import PulseOptConfig, PulseOptTrainer, newest_whole_checkpoint
from pulseopt_hf.cli import main
from tests.conftest import Make, make_arguments, parameters_equal
from tests.recipes.tiny import files_of

CONFIG = PulseOptConfig(lr_candidates=[0.5, 1.0, 2.0], episode_length=3)
SAVING = {"save_steps": 4, "max_steps": 12}
FILES = (
    *("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"),
    "trainer_state.json",
)


@pytest.fixture(scope="module")
def whole(tiny_model: Any, tiny_data: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A finished run with checkpoints at steps 4, 8 and 12; its folder is to be copied."""
    args = make_arguments(tmp_path_factory.mktemp("whole") / "run", **SAVING)
    trainer = PulseOptTrainer(tiny_model(), args, train_dataset=tiny_data, pulse=CONFIG)
    trainer.train()
    return trainer


@pytest.fixture
def folder(whole: Any, tmp_path: Path) -> Path:
    """A copy of the finished run's folder."""
    return Path(shutil.copytree(whole.args.output_dir, tmp_path / "run"))


@pytest.mark.parametrize("harm", ["missing", "empty", "cut", "garbage"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_found_and_the_one_before_resumes(whole, folder, train, name, harm):
    file = folder / "checkpoint-8" / name
    content = file.read_bytes()
    shutil.rmtree(folder / "checkpoint-12")
    if harm == "missing":
        file.unlink()
    else:
        file.write_bytes({"empty": b"", "cut": content[:-20], "garbage": b"\x93" * 200}[harm])
    found, passed_over = newest_whole_checkpoint(folder)
    assert found == folder / "checkpoint-4"
    (line,) = passed_over
    assert line.startswith("passed over checkpoint-8: it")
    if harm == "cut":  # once for each file is enough
        resumed = train(pulse=CONFIG, max_steps=12, resume=str(found))
        assert parameters_equal(resumed.model, whole.model)


def test_where_none_is_whole_none_is_found(folder: Path) -> None:
    for checkpoint in folder.glob("checkpoint-*"):
        (checkpoint / "trainer_state.json").unlink()
    found, passed_over = newest_whole_checkpoint(folder)
    assert found is None
    assert len(passed_over) == 3
    assert newest_whole_checkpoint(folder / "nowhere") == (None, [])


def test_the_command_says_that_none_is_whole(tmp_path, bert, capsys):
    folder = tmp_path / "run"
    (folder / "checkpoint-5").mkdir(parents=True)
    words = ["train", "glue/cola", "--model_name_or_path", bert, *files_of("cola", tmp_path / "d")]
    assert main([*words, "--use_cpu", "--output_dir", str(folder), "--resume"]) == 2
    message = capsys.readouterr().err
    assert "no whole checkpoint" in message
    assert "checkpoint-5: it has no trainer_state.json" in message


def test_weights_alone_are_said_not_to_continue_the_run(train, caplog):
    trainer = train(pulse=CONFIG, **SAVING, save_only_model=True)
    folder = Path(trainer.args.output_dir)
    found, passed_over = newest_whole_checkpoint(folder)
    assert found is None
    assert "no optimizer state (`save_only_model` saves none)" in passed_over[0]
    resumed = train(pulse=CONFIG, max_steps=12, resume=str(folder / "checkpoint-8"))
    assert "holds weights only" in caplog.text
    assert len(resumed.aees.get_logs()["episode_rewards"]) == 4  # the arms are all there


def test_a_full_disk_ends_the_run_loudly_and_leaves_what_can_be_resumed(
    small_disk: Path, train: Make, make_trainer: Make
) -> None:
    trainer = make_trainer(pulse=CONFIG, output_dir=str(small_disk / "run"), save_steps=2)
    with pytest.raises(Exception, match=r"(?i)no space|write|enforce|I/O"):
        trainer.train()
    assert trainer.optimizer.param_groups[0]["lr"] <= 3e-3
    found, passed_over = newest_whole_checkpoint(small_disk / "run")
    assert len(passed_over) <= 1
    resumed = train(pulse=CONFIG, resume=str(found))
    assert parameters_equal(resumed.model, train(pulse=CONFIG).model)


def test_a_read_only_folder_ends_the_run_loudly(small_disk: Path, make_trainer: Make) -> None:
    folder = small_disk / "run"
    trainer = make_trainer(pulse=CONFIG, output_dir=str(folder), **SAVING)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(OSError, match="Read-only") as failure:
        trainer.train()
    assert failure.value.errno == errno.EROFS
    assert not list(folder.glob("checkpoint-*"))


def test_a_save_that_raises_leaves_the_checkpoint_before(make_trainer, monkeypatch):
    trainer = make_trainer(pulse=CONFIG, **SAVING)
    save_rng = trainer._save_rng_state

    def fail(folder: str) -> None:
        if Path(folder).name == "checkpoint-8":
            raise OSError("the disk is gone")
        save_rng(folder)

    monkeypatch.setattr(trainer, "_save_rng_state", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        trainer.train()
    found, passed_over = newest_whole_checkpoint(trainer.args.output_dir)
    assert found.name == "checkpoint-4"
    assert "checkpoint-8: it has no trainer_state.json" in passed_over[0]
