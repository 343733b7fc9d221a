"""Long runs: what is ours stays of bounded size, and says so where it leaves something out."""

import errno
import gc
import json
import shutil
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import nn
from transformers import PrinterCallback

from pulseopt_hf import AEES, PulseOptConfig, PulseOptTrainer
from pulseopt_hf.aees import left_out
from pulseopt_hf.aees.record_format import FILE_NAME, NumberedEpisode
from pulseopt_hf.cli import main
from pulseopt_hf.report.record_reader import RecordReader, read_run
from pulseopt_hf.report.tables import tables_of_run
from pulseopt_hf.trainer import record_writer
from pulseopt_hf.trainer.card import section
from pulseopt_hf.trainer.record_writer import RunRecorder
from tests.conftest import ARMS, history, make_arguments, on, parameters_equal, stop_after
from tests.invariant.test_resume import assert_same_end
from tests.trainer.test_record_writer import comparable, warnings_of_the_record

KNOBS: dict[str, Any] = {**ARMS, "context_mode": "trend", "calibration": "trust_region"}
MB = 1 << 20


class Tiny(nn.Module):
    """A regression of 49 parameters."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        outputs = self.body(inputs).squeeze(-1)
        return {"loss": (outputs - labels).square().mean(), "logits": outputs}


def rows() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, 4, generator=generator)
    labels = inputs.sum(1).tanh() + 0.1 * torch.randn(64, generator=generator)
    return [{"inputs": one, "labels": label} for one, label in zip(inputs, labels, strict=True)]


def make(args: Any, episode_length: int = 4, callbacks: Any = ()) -> Any:
    config = PulseOptConfig(episode_length=episode_length, **KNOBS)
    own = {"train_dataset": rows(), "callbacks": list(callbacks)}
    trainer = PulseOptTrainer(Tiny(), args, pulse=config, **own)
    trainer.remove_callback(PrinterCallback)
    return trainer


def trained(args: Any, *more: Any, resume: str | None = None, **callbacks: Any) -> Any:
    trainer = make(args, *more, **callbacks)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def keep_few(patch: pytest.MonkeyPatch) -> None:
    """Set bounds that a run of 400 steps goes far beyond: at most 16 + 2 * 8 of each sort."""
    patch.setattr(left_out, "MOST", 16)
    patch.setattr(left_out, "NEWEST", 8)


@pytest.fixture
def few_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    keep_few(monkeypatch)


SHORT: dict[str, Any] = {"max_steps": 400, "logging_steps": 2, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, RecordReader, list[int]]:
    """A finished run that left episodes out, the reader that followed it, and what it was told."""
    folder = tmp_path_factory.mktemp("long") / "run"
    folder.mkdir()
    reader, told = RecordReader(folder), []

    def read() -> None:
        told.extend(line.number for line, _ in reader.read() if isinstance(line, NumberedEpisode))

    follow = on("on_step_end", lambda state, **_: state.global_step % 6 == 0 and read())
    with pytest.MonkeyPatch.context() as patch:
        keep_few(patch)
        trainer = trained(make_arguments(folder, **SHORT, save_steps=10), callbacks=[follow])
        read()
        return trainer, reader, told


@pytest.fixture
def folder(followed: Any, tmp_path: Path) -> Path:
    """A copy of that run's folder."""
    trainer, *_ = followed
    return Path(shutil.copytree(trainer.args.output_dir, tmp_path / "run"))


def test_a_bounded_run_is_the_unbounded_one_and_resumes_to_the_same_end(
    arguments: Any, few_kept: None, followed: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From before there is too much, from the step in which some is left out, and from after."""
    trainer, *_ = followed
    aees = trainer.aees
    assert aees.calibrator.outcome is not None
    assert len(aees.controller.totals()) == 6
    closed = aees.controller.closed
    assert closed > 80
    assert len(aees.controller.records) == len(left_out.kept_numbers(closed)) <= 32
    whole = comparable(read_run(folder))
    lines = (folder / FILE_NAME).read_text().splitlines()
    assert len(lines) < 32 * 3  # episodes, losses, and the few lines of other sorts
    for step in (60, 200, 210, 220, 230, 390):
        own = arguments(output_dir=str(folder), **SHORT)
        resumed = trained(own, resume=f"{folder}/checkpoint-{step}")
        assert_same_end(resumed, trainer)
        run = read_run(folder)
        assert comparable(run) == whole
        assert run.numbers == left_out.kept_numbers(closed)
        assert run.left_out == aees.controller.left_out

    monkeypatch.undo()
    unbounded = trained(arguments(**SHORT))
    assert parameters_equal(unbounded.model, trainer.model)
    everything = unbounded.aees.controller.records
    assert len(everything) == closed
    assert [everything[number - 1] for number in run.numbers] == aees.controller.records
    assert history(unbounded) == history(trainer)
    assert section(unbounded) == section(trainer)


def test_report_and_watch_show_all_arms_and_say_what_is_left_out(followed, folder, capsys):
    trainer, *_ = followed
    run = read_run(folder)
    assert run.arms() == trainer.aees.controller.totals()
    closed = trainer.aees.controller.closed
    said = (
        f"The record of this long run has {len(run.episodes)} of {closed} episodes and "
        f"{len(run.logs)} of {len(trainer.state.log_history)} logs"
    )
    assert main(["watch", str(folder)]) == 0
    *_, status = capsys.readouterr().out.splitlines()
    assert said in status
    assert main(["report", str(folder)]) == 0
    page = (folder / "report.html").read_text()
    assert said in page
    assert f"Episodes, {len(run.episodes)} of {closed}" in page
    assert f"Reward of {len(run.episodes)} of {closed} episodes" in page
    (table,) = [table for table in tables_of_run(run) if table.name == "episodes"]
    assert [int(row["episode"]) for row in table.rows] == run.numbers


def test_who_follows_a_record_is_told_every_episode_once(followed: Any) -> None:
    trainer, reader, told = followed
    assert trainer.aees.controller.left_out
    assert told == list(range(1, trainer.aees.controller.closed + 1))
    assert reader.replaced == 0
    assert reader.data(0.0) == read_run(trainer.args.output_dir, now=0.0)


def test_many_episodes_between_two_logs_make_a_whole_record(arguments: Any, few_kept: None) -> None:
    trainer = trained(arguments(**{**SHORT, "logging_steps": 200}))
    run = read_run(trainer.args.output_dir)
    assert run.episodes == trainer.aees.controller.records
    assert run.episode_count == trainer.aees.controller.closed


def test_a_record_that_cannot_be_thinned_is_thinned_later(arguments, few_kept, monkeypatch, caplog):
    original = record_writer.write_whole

    def write_whole(file: Path, content: bytes) -> None:
        if 150 <= trainer.state.global_step <= 250:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(file, content)

    monkeypatch.setattr(record_writer, "write_whole", write_whole)
    trainer = make(arguments(**SHORT))
    trainer.train()
    assert len(warnings_of_the_record(caplog)) == 1
    run = read_run(trainer.args.output_dir)
    assert run.episodes == trainer.aees.controller.records
    assert run.status == "finished"


def our_part(checkpoint: Path) -> int:
    """Return how many bytes of `trainer_state.json` are ours, as Trainer writes it."""

    def size(content: Any) -> int:
        return len(json.dumps(content, indent=2, sort_keys=True))

    state = json.loads((checkpoint / "trainer_state.json").read_text())
    whole = size(state)
    del state["stateful_callbacks"]["PulseOptCallback"]
    return whole - size(state)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_hundred_thousand_steps(arguments, monkeypatch, capsys):
    """9,500 episodes and 10,000 logs, with arms, noise and calibration; prints what it measures.

    Resident memory is the whole process's, with Trainer's log history, which grows with every log.
    """
    settings = {"max_steps": 100_000, "logging_steps": 10, "learning_rate": 1e-2}
    resident: dict[int, int] = {}

    def measure(state: Any, **kwargs: Any) -> None:
        if state.global_step % 20_000 == 0:
            gc.collect()
            resident[state.global_step] = psutil.Process().memory_info().rss

    args = arguments(**settings, save_steps=20_000)
    trainer = trained(args, 10, callbacks=[on("on_step_end", measure)])
    folder = Path(args.output_dir)
    assert trainer.aees.calibrator.outcome is not None
    assert trainer.aees.controller.closed > 9_400  # the calibration watches the first 5,000 steps
    record_size = (folder / FILE_NAME).stat().st_size
    parts = {step: our_part(folder / f"checkpoint-{step}") for step in resident}

    seconds: list[float] = []
    timed: dict[int, float] = {}
    for owner, name in ((AEES, "load_state_dict"), (RunRecorder, "__init__")):
        monkeypatch.setattr(owner, name, timing(getattr(owner, name), seconds))
    whole = comparable(read_run(folder))
    for step in resident:
        seconds.clear()
        own = arguments(output_dir=str(folder), **settings)
        trained(own, 10, callbacks=[stop_after(step + 1)], resume=f"{folder}/checkpoint-{step}")
        assert len(seconds) == 2
        timed[step] = sum(seconds)
    own = arguments(output_dir=str(folder), **settings)
    assert_same_end(trained(own, 10, resume=f"{folder}/checkpoint-80000"), trainer)
    assert comparable(read_run(folder)) == whole

    with capsys.disabled():
        print("\n   steps  resident MB  our part of trainer_state.json MB  resume of ours s")
        for step in resident:
            sizes = f"{resident[step] / MB:>11.1f}  {parts[step] / MB:>33.2f}"
            print(f"{step:>8,}  {sizes}  {timed[step]:>16.3f}")
        print(f"pulse.jsonl: {record_size / MB:.2f} MB")
    assert resident[100_000] - resident[20_000] < 32 * MB
    assert max(parts.values()) < 4 * MB
    assert record_size < 6 * MB
    assert timed[100_000] < 2 * timed[60_000]


def timing(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """Return a function that also notes how much processor time it took."""

    def timed(*args: Any, **kwargs: Any) -> Any:
        begun = time.process_time()
        result = function(*args, **kwargs)
        seconds.append(time.process_time() - begun)
        return result

    return timed


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_loop_of_ones_own_holds_no_more_after_a_hundred_thousand_episodes(capsys):
    """Counted by tracemalloc, as Python's allocator sees it."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    aees = AEES(optimizer, lr_candidates=[0.5, 1.0, 2.0], episode_length=2, seed=0)
    held: dict[int, int] = {}
    tracemalloc.start()
    try:
        for step in range(200_000):
            aees.step_start(step)
            aees.step_end(1.0 + 1.0 / (1 + step % 997))
            if step + 1 in (10_000, 50_000, 100_000, 200_000):
                gc.collect()
                held[aees.controller.closed] = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    with capsys.disabled():
        print("\nepisodes  held MB")
        for episodes, size in held.items():
            print(f"{episodes:>8,}  {size / MB:>7.2f}")
    assert aees.controller.closed == 100_000
    assert max(held.values()) < 4 * MB
