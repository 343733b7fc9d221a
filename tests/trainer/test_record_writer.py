"""The run record: written while a run goes, and the same however the run got there."""

from __future__ import annotations

import errno
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer, TrainerCallback

from pulseopt_hf import PulseOptConfig, with_pulseopt
from pulseopt_hf.aees.record_format import FILE_NAME, FORMAT_VERSION
from pulseopt_hf.optim.calibrator import SHORTEST_WATCH
from pulseopt_hf.report.record_reader import read_run
from pulseopt_hf.report.run_data import RunData
from pulseopt_hf.trainer.record_writer import RunRecorder
from tests.engines.ranks import run_ranks

CONFIG = PulseOptConfig(lr_candidates=[0.5, 1.0, 2.0], episode_length=5)


def lines(folder: str) -> list[dict[str, Any]]:
    text = (Path(folder) / FILE_NAME).read_text()
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def comparable(run: RunData) -> Any:
    """Return what a resumed run has to share with one that never stopped."""
    logs = [
        (log.step, {k: v for k, v in log.values.items() if not k.endswith(("time", "_per_second"))})
        for log in run.logs
        if "train_runtime" not in log.values
    ]
    calibration = run.trials, run.outcome
    return logs, run.episodes, calibration, run.step, run.status, run.knobs, run.base_lr


def test_the_record_holds_what_was_logged_and_every_episode(trainer_of: Any) -> None:
    trainer = trainer_of(CONFIG, run_name="mine", logging_steps=4)
    trainer.train()
    written = lines(trainer.args.output_dir)
    assert [line["kind"] for line in written] == [
        *("head", "log", "episode", "log", "episode", "log", "episode", "log", "episode", "log"),
        *("log", "log", "episode", "end"),  # the last log is Trainer's summary
    ]
    head = written[0]
    assert head["version"] == FORMAT_VERSION
    assert head["name"] == "mine"
    assert head["max_steps"] == 24
    assert head["knobs"]["lr_candidates"] == [0.5, 1.0, 2.0]
    assert head["knobs"]["episode_length"] == 5
    assert head["base_lr"] == pytest.approx(3e-3)
    assert set(head["versions"]) == {"python", "pulseopt-hf", "torch", "transformers", "accelerate"}
    assert head["resumed_from"] is None
    assert written[-1] | {"time": 0} == {
        "kind": "end", "step": 24, "finished": True, "error": None, "time": 0
    }  # fmt: skip
    times = [line["time"] for line in written]
    assert times == sorted(times)

    run = read_run(trainer.args.output_dir)
    assert trainer.aees is not None
    assert run.episodes == trainer.aees.controller.records
    assert [{**log.values, "step": log.step} for log in run.logs] == trainer.state.log_history
    assert run.status == "finished"


def test_an_evaluation_after_training_is_recorded_too(trainer_of: Any) -> None:
    trainer = trainer_of(CONFIG)
    trainer.train()
    metrics = trainer.evaluate()
    run = read_run(trainer.args.output_dir)
    assert run.metrics["eval_loss"] == metrics["eval_loss"]
    assert run.status == "finished"


def test_every_road_writes_the_same_record(trainer_of: Any) -> None:
    class Other(Trainer):
        pass

    runs = []
    for road in ({}, {"cls": with_pulseopt(Other)}, {"road": "attached"}):
        trainer = trainer_of(CONFIG, **road)
        trainer.train()
        runs.append(comparable(read_run(trainer.args.output_dir)))
    assert runs[0] == runs[1] == runs[2]
    assert len(runs[0][1]) == 5


def test_nothing_is_written_where_nothing_is_logged(trainer_of: Any) -> None:
    trainer = trainer_of(CONFIG, logging_strategy="no")
    trainer.train()
    assert list(Path(trainer.args.output_dir).iterdir()) == []


@pytest.mark.parametrize("road", ["subclass", "attached"])
def test_nothing_is_written_of_a_neutral_run(trainer_of: Any, road: str) -> None:
    trainer = trainer_of(PulseOptConfig(lr_candidates=[1.0]), road)
    trainer.train()
    assert list(Path(trainer.args.output_dir).iterdir()) == []


def test_the_file_is_opened_only_when_trainer_logs(
    trainer_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    original = RunRecorder._flush

    def flush(self: RunRecorder) -> None:
        steps.append(trainer.state.global_step)
        original(self)

    monkeypatch.setattr(RunRecorder, "_flush", flush)
    trainer = trainer_of(CONFIG, logging_steps=10)
    trainer.train()
    assert steps == [0, 10, 20, 24, 24]  # the head, two logs, the summary, the end


@pytest.mark.parametrize("step", [1, 5, 7, 23])
def test_a_resumed_run_reads_as_one_that_never_stopped(trainer_of: Any, step: int) -> None:
    """In the same folder, whose record goes on beyond the checkpoint."""
    settings = {"save_strategy": "steps", "save_steps": 1}
    trainer = trainer_of(CONFIG, **settings)
    trainer.train()
    folder = trainer.args.output_dir
    whole = comparable(read_run(folder))
    resumed = trainer_of(CONFIG, output_dir=folder, logging_steps=1)
    resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-{step}")
    run = read_run(folder)
    assert comparable(run) == whole
    assert run.resumed_from == step
    assert [line["kind"] for line in lines(folder)].count("end") == 1


def test_lines_after_the_resumed_step_are_gone_when_it_begins(trainer_of: Any) -> None:
    seen: list[RunData] = []

    class Look(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if not seen:
                seen.append(read_run(args.output_dir))

    trainer = trainer_of(CONFIG, save_strategy="steps", save_steps=11)
    trainer.train()
    folder = trainer.args.output_dir
    resumed = trainer_of(CONFIG, output_dir=folder)
    resumed.add_callback(Look())
    resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-11")
    (run,) = seen
    assert run.step == 11
    assert [log.step for log in run.logs] == list(range(1, 12))
    assert [record.end_step for record in run.episodes] == [4, 9]
    assert run.status == "running"


def test_trials_are_recorded_and_not_again_by_a_resumed_run(trainer_of: Any) -> None:
    config = PulseOptConfig(
        lr_candidates=[0.5, 1.0, 2.0], calibration="trust_region", episode_length=5
    )
    settings = {"max_steps": 160, "save_strategy": "steps", "save_steps": 30}
    trainer = trainer_of(config, **settings)
    trainer.train()
    folder = trainer.args.output_dir
    assert trainer.aees is not None
    assert trainer.aees.calibrator is not None
    run = read_run(folder)
    assert run.trials == trainer.aees.calibrator.search.trials != []
    assert run.outcome == trainer.aees.calibrator.outcome
    assert run.base_lr == pytest.approx(3e-3)  # as it was set
    assert run.calibrated_lr == trainer.aees.calibrator.search.learning_rate is not None
    assert run.base_lrs[40][1] == pytest.approx(run.calibrated_lr * (1 - 40 / 160))
    whole = comparable(run)
    resumed = trainer_of(config, output_dir=folder, **{**settings, "save_strategy": "no"})
    resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-30")
    assert comparable(read_run(folder)) == whole


def test_a_full_disk_does_not_end_training_and_warns_once(
    trainer_of: Any, small_disk: Path, arguments: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A real one: full from step 8 on, and with room again at step 45."""
    filler = small_disk / "filler"

    class Fill(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 8:
                with pytest.raises(OSError, match="No space"):
                    filler.write_bytes(bytes(4 << 20))  # more than there is room for
            elif state.global_step == 44:
                seen.append(len(read_run(small_disk / "run").loss))
            elif state.global_step == 45:
                filler.unlink()

    seen: list[int] = []
    args = arguments(output_dir=str(small_disk / "run"), max_steps=60)
    trainer = trainer_of(CONFIG, args=args)
    trainer.add_callback(Fill())
    with caplog.at_level(logging.WARNING, "pulseopt_hf"):
        trainer.train()
    (warning,) = [r for r in caplog.records if "run record" in r.getMessage()]
    assert "could not be written: No space left on device. Training goes on" in warning.getMessage()
    # Meanwhile what had been written could be read.
    assert 8 <= seen[0] < 44
    run = read_run(args.output_dir)
    assert [{**log.values, "step": log.step} for log in run.logs] == trainer.state.log_history
    assert run.outcome is not None
    begun = run.outcome.step + SHORTEST_WATCH
    assert [record.start_step for record in run.episodes] == list(range(begun, 60, 5))
    assert run.status == "finished"


def test_a_write_that_breaks_off_amid_a_line_leaves_no_part_of_it(
    trainer_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = RunRecorder._append

    def append(self: RunRecorder, content: bytes) -> None:
        if 8 <= trainer.state.global_step <= 15:
            with self._file.open("ab") as file:
                file.write(content[: len(content) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        original(self, content)

    monkeypatch.setattr(RunRecorder, "_append", append)
    trainer = trainer_of(CONFIG)
    trainer.train()
    run = read_run(trainer.args.output_dir)
    assert [{**log.values, "step": log.step} for log in run.logs] == trainer.state.log_history
    assert len(run.episodes) == 5


def test_a_folder_that_cannot_be_written_to_does_not_end_training(
    trainer_of: Any, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = trainer_of(CONFIG)
    folder = Path(trainer.args.output_dir)
    folder.rmdir()
    folder.write_text("a file where the folder was")
    trainer.train()
    assert trainer.state.global_step == 24
    assert len([r for r in caplog.records if "run record" in r.getMessage()]) == 1


def test_an_exception_is_named_in_the_record(trainer_of: Any) -> None:
    class Break(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 12:
                raise KeyboardInterrupt

    trainer = trainer_of(CONFIG)
    trainer.add_callback(Break())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    run = read_run(trainer.args.output_dir)
    assert (run.status, run.error, run.step) == ("failed", "KeyboardInterrupt", 12)
    assert len(run.episodes) == 2


def test_a_run_that_is_told_to_stop_is_neither_finished_nor_failed(trainer_of: Any) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 12

    trainer = trainer_of(CONFIG)
    trainer.add_callback(Stop())
    trainer.train()
    run = read_run(trainer.args.output_dir)
    assert (run.status, run.step, run.max_steps) == ("stopped", 12, 24)


def test_a_number_that_is_not_finite_is_null_and_a_tensor_is_not_read(trainer_of: Any) -> None:
    import torch

    class Say(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                trainer.log(
                    {"odd": float("inf"), "big": 10**400, "tensor": torch.ones(()), "word": "x"}
                )  # type: ignore[dict-item]

    trainer = trainer_of(CONFIG)
    trainer.add_callback(Say())
    trainer.train()
    (log,) = [log for log in read_run(trainer.args.output_dir).logs if "odd" in log.values]
    assert {k: v for k, v in log.values.items() if k != "epoch"} == {
        "odd": None,
        "big": None,
        "word": "x",
    }


@pytest.mark.distributed
def test_of_several_ranks_only_the_first_writes(trainer_of: Any) -> None:
    def body(rank: int) -> Any:
        trainer = trainer_of(CONFIG)
        trainer.train()
        assert trainer.aees is not None
        recorder = trainer._pulse._recorder
        return trainer.args.output_dir, recorder is not None, trainer.aees.controller.records

    (folder, first, records), (_, second, _) = run_ranks(2, body)
    assert (first, second) == (True, False)
    run = read_run(folder)
    assert run.episodes == records
    assert len(run.loss) == 24


def test_a_second_run_in_the_same_folder_replaces_the_record(trainer_of: Any) -> None:
    trainer = trainer_of(CONFIG)
    trainer.train()
    trainer.train()
    run = read_run(trainer.args.output_dir)
    assert len(run.episodes) == 5
    assert [line["kind"] for line in lines(trainer.args.output_dir)].count("head") == 1
