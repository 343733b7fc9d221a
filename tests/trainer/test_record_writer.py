"""The run record: written while a run goes, and the same however the run got there."""

import errno
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from pulseopt_hf import PulseOptConfig, with_pulseopt
from pulseopt_hf.aees.record_format import FILE_NAME, FORMAT_VERSION
from pulseopt_hf.optim.loss_watch import SHORTEST_WATCH
from pulseopt_hf.report.record_reader import read_run
from pulseopt_hf.report.run_data import RunData
from pulseopt_hf.trainer.record_writer import RunRecorder
from tests.conftest import Make, checkpoint, messages, on, raise_at, stop_after
from tests.engines.ranks import run_ranks
from tests.trainer.test_calibration import THREE_ARMS

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


def logs_of(run: RunData) -> list[dict[str, Any]]:
    return [{**log.values, "step": log.step} for log in run.logs]


def test_the_record_holds_what_was_logged_and_every_episode(train: Make) -> None:
    trainer = train(pulse=CONFIG, run_name="mine", logging_steps=4)
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
    arguments = head["arguments"]
    assert arguments["logging_steps"] == 4
    assert arguments["per_device_train_batch_size"] == trainer.args.per_device_train_batch_size
    assert not {"output_dir", "run_name", "lr_candidates", "hub_token"} & set(arguments)
    assert set(head["versions"]) == {"python", "pulseopt-hf", "torch", "transformers", "accelerate"}
    assert head["resumed_from"] is None
    assert written[-1] | {"time": 0} == {
        "kind": "end", "step": 24, "finished": True, "error": None, "time": 0
    }  # fmt: skip
    times = [line["time"] for line in written]
    assert times == sorted(times)

    run = read_run(trainer.args.output_dir)
    assert run.episodes == trainer.aees.controller.records
    assert logs_of(run) == trainer.state.log_history
    assert run.status == "finished"

    metrics = trainer.evaluate()
    run = read_run(trainer.args.output_dir)
    assert run.metrics["eval_loss"] == metrics["eval_loss"]
    assert run.status == "finished"

    trainer.train()  # in the same folder, whose record it replaces
    assert len(read_run(trainer.args.output_dir).episodes) == 5
    assert [line["kind"] for line in lines(trainer.args.output_dir)].count("head") == 1


def test_every_road_writes_the_same_record(train: Make) -> None:
    class Other(Trainer):
        pass

    runs = []
    for road in ("subclass", with_pulseopt(Other), "attached"):
        trainer = train(road, CONFIG)
        runs.append(comparable(read_run(trainer.args.output_dir)))
    assert runs[0] == runs[1] == runs[2]
    assert len(runs[0][1]) == 5


@pytest.mark.parametrize(
    ("road", "candidates", "logs"),
    [("subclass", [1.0], "steps"), ("attached", [1.0], "steps"), ("subclass", [0.5, 1.0], "no")],
    ids=["subclass", "attached", "nothing is logged"],
)
def test_nothing_is_written_of_a_neutral_run(train, road, candidates, logs):
    trainer = train(road, {"lr_candidates": candidates}, logging_strategy=logs)
    assert list(Path(trainer.args.output_dir).iterdir()) == []


def test_the_file_is_opened_only_when_trainer_logs(make_trainer, monkeypatch):
    steps: list[int] = []
    original = RunRecorder._flush

    def flush(self: RunRecorder) -> None:
        steps.append(trainer.state.global_step)
        original(self)

    monkeypatch.setattr(RunRecorder, "_flush", flush)
    trainer = make_trainer(pulse=CONFIG, logging_steps=10)
    trainer.train()
    assert steps == [0, 10, 20, 24, 24]  # the head, two logs, the summary, the end


def test_a_resumed_run_reads_as_one_that_never_stopped(train: Make) -> None:
    """In the same folder, whose record goes on beyond the checkpoint."""
    trainer = train(pulse=CONFIG, save_steps=1)
    folder = trainer.args.output_dir
    whole = comparable(read_run(folder))
    for step in (1, 5, 7, 11, 23):
        seen: list[RunData] = []
        look = on("on_step_begin", lambda *_, seen=seen, **kwargs: seen.append(read_run(folder)))
        own = {"output_dir": folder, "callbacks": [look]}
        train(pulse=CONFIG, **own, resume=checkpoint(trainer, step))
        # Lines after the resumed step are gone when it begins.
        assert seen[0].step == step
        assert [log.step for log in seen[0].logs] == list(range(1, step + 1))
        ends = [record.end_step for record in seen[0].episodes]
        assert ends == [end for end in (4, 9, 14, 19) if end < step]
        assert seen[0].status == "running"
        run = read_run(folder)
        assert comparable(run) == whole
        assert run.resumed_from == step
        assert [line["kind"] for line in lines(folder)].count("end") == 1


def test_trials_are_recorded_and_not_again_by_a_resumed_run(train: Make) -> None:
    trainer = train(pulse=THREE_ARMS, max_steps=160, save_steps=30)
    folder = trainer.args.output_dir
    run = read_run(folder)
    assert run.trials == trainer.aees.calibrator.search.trials != []
    assert run.outcome == trainer.aees.calibrator.outcome
    assert run.base_lr == pytest.approx(3e-3)  # as it was set
    assert run.calibrated_lr == trainer.aees.calibrator.search.learning_rate is not None
    assert run.base_lrs[40][1] == pytest.approx(run.calibrated_lr * (1 - 40 / 160))
    whole = comparable(run)
    train(pulse=THREE_ARMS, max_steps=160, output_dir=folder, resume=checkpoint(trainer, 30))
    assert comparable(read_run(folder)) == whole


def warnings_of_the_record(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [message for message in messages(caplog) if "run record" in message]


def test_a_full_disk_does_not_end_training_and_warns_once(train, small_disk, caplog):
    """A real one: full from step 8 on, and with room again at step 45."""
    filler, folder = small_disk / "filler", str(small_disk / "run")
    seen: list[int] = []

    def fill(state: Any, **kwargs: Any) -> None:
        if state.global_step == 8:
            with pytest.raises(OSError, match="No space"):
                filler.write_bytes(bytes(4 << 20))  # more than there is room for
        elif state.global_step == 44:
            seen.append(len(read_run(folder).loss))
        elif state.global_step == 45:
            filler.unlink()

    own = {"output_dir": folder, "callbacks": [on("on_step_end", fill)]}
    trainer = train(pulse=CONFIG, max_steps=60, **own)
    (said,) = warnings_of_the_record(caplog)
    assert "could not be written: No space left on device. Training goes on" in said
    # Meanwhile what had been written could be read.
    assert 8 <= seen[0] < 44
    run = read_run(folder)
    assert logs_of(run) == trainer.state.log_history
    begun = run.outcome.step + SHORTEST_WATCH
    assert [record.start_step for record in run.episodes] == list(range(begun, 60, 5))
    assert run.status == "finished"


def test_a_write_that_breaks_off_amid_a_line_leaves_no_part_of_it(make_trainer, monkeypatch):
    original = RunRecorder._append

    def append(self: RunRecorder, content: bytes) -> None:
        if 8 <= trainer.state.global_step <= 15:
            with self._file.open("ab") as file:
                file.write(content[: len(content) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        original(self, content)

    monkeypatch.setattr(RunRecorder, "_append", append)
    trainer = make_trainer(pulse=CONFIG)
    trainer.train()
    run = read_run(trainer.args.output_dir)
    assert logs_of(run) == trainer.state.log_history
    assert len(run.episodes) == 5


def test_a_folder_that_cannot_be_written_to_does_not_end_training(make_trainer, caplog):
    trainer = make_trainer(pulse=CONFIG)
    folder = Path(trainer.args.output_dir)
    folder.rmdir()
    folder.write_text("a file where the folder was")
    trainer.train()
    assert trainer.state.global_step == 24
    assert len(warnings_of_the_record(caplog)) == 1


@pytest.mark.parametrize(
    ("end", "status", "error"),
    [(raise_at, "failed", "KeyboardInterrupt"), (stop_after, "stopped", None)],
)
def test_a_run_that_ends_early_says_how(end, status, error, make_trainer):
    trainer = make_trainer(pulse=CONFIG, callbacks=[end(12)])
    with pytest.raises(KeyboardInterrupt) if error else nullcontext():
        trainer.train()
    run = read_run(trainer.args.output_dir)
    assert (run.status, run.error, run.step, run.max_steps) == (status, error, 12, 24)
    assert [record.end_step for record in run.episodes][:2] == [4, 9]


def test_a_number_that_is_not_finite_is_null_and_a_tensor_is_not_read(make_trainer: Make) -> None:
    odd = {"odd": float("inf"), "big": 10**400, "tensor": torch.ones(()), "word": "x"}

    def say(state: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            trainer.log(dict(odd))

    trainer = make_trainer(pulse=CONFIG, callbacks=[on("on_step_end", say)])
    trainer.train()
    (log,) = [log for log in read_run(trainer.args.output_dir).logs if "odd" in log.values]
    assert {k: v for k, v in log.values.items() if k != "epoch"} == {
        "odd": None,
        "big": None,
        "word": "x",
    }


@pytest.mark.distributed
def test_of_several_ranks_only_the_first_writes(train: Make) -> None:
    def body(rank: int) -> Any:
        trainer = train(pulse=CONFIG)
        recorder = trainer._pulse._recorder
        return trainer.args.output_dir, recorder is not None, trainer.aees.controller.records

    (folder, first, records), (_, second, _) = run_ranks(2, body)
    assert (first, second) == (True, False)
    run = read_run(folder)
    assert run.episodes == records
    assert len(run.loss) == 24
