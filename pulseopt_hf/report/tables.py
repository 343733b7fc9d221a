"""The tables of a page, as plain text cells. Standard library only."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass

from pulseopt_hf.report.arms import label, shown
from pulseopt_hf.report.data import RunData
from pulseopt_hf.report.wording import moved

_LOGGED = {
    "loss": "loss",
    "eval_loss": "evaluation loss",
    "learning_rate": "base LR",
    "pulse/learning_rate": "effective LR",
    "grad_norm": "gradient norm",
}
_MOST_LOGGED = 10_000  # rows; the run record has all


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        name: what its element is named after.
        title: its heading.
        head: names of the columns; the first column names the row.
        rows: cells, as long as `head` each.
    """

    name: str
    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def progress(run: RunData) -> str:
    """Say how far a run has got."""
    return f"{run.step:,} of {run.max_steps:,}"


def status_line(run: RunData) -> str:
    """Say in a sentence how a run stands."""
    done = f"{progress(run)} steps"
    if run.status == "finished":
        return f"Finished: {done}."
    if run.status == "failed":
        return f"Ended by {run.error} at step {run.step:,}: {done}."
    if run.status == "stopped":
        return f"Stopped before its last step: {done}."
    when = "" if run.updated is None else f" Last written to at {clock(run.updated)}."
    if run.status == "running":
        return f"Still running: {done} so far.{when} Make the page again to see more."
    return f"Broken off: {done}, and no end was recorded.{when} It was killed, or it waits."


def facts(run: RunData) -> list[tuple[str, str]]:
    """Return what a run is in names and values."""
    loss, metrics = run.loss, run.metrics
    found = [
        ("steps", progress(run)),
        ("episodes", f"{len(run.episodes):,}"),
    ]
    if run.base_lr is not None:
        found.append(("LR that was set", shown(run.base_lr)))
    if run.calibrated_lr is not None:
        found.append(("calibrated LR", shown(run.calibrated_lr)))
    if loss:
        found.append(("training loss", f"{shown(loss[0][1])} → {shown(loss[-1][1])}"))
    found += [
        (key.removeprefix("eval_").replace("_", " ") + ", evaluated", shown(value))
        for key, value in metrics.items()
    ]
    found.append(("skipped steps", f"{run.skipped_steps:,}"))
    if run.resumed_from is not None:
        found.append(("resumed from step", f"{run.resumed_from:,}"))
    return found


def tables_of_run(run: RunData) -> list[Table]:
    """Return a run's data: arms, episodes, trials, logged values, knobs and versions."""
    found = [
        _arms(run),
        _episodes(run),
        _trials(run),
        _logged(run),
        Table("knobs", "Knobs", ["knob", "value"], [(k, str(v)) for k, v in run.knobs.items()]),
        Table("versions", "Versions", ["package", "version"], list(run.versions.items())),
    ]
    return [table for table in found if table.rows]


def _arms(run: RunData) -> Table:
    head = ["arm", "episodes", "steps", "mean reward", "standard deviation", "lowest", "highest"]
    noisy = any(arm.noise_std for arm in run.arms())
    rows = [
        (
            label(arm.lr_multiplier, arm.noise_std, with_noise=noisy),
            f"{arm.plays:,}",
            f"{arm.steps:,}",
            *(shown(value) for value in (arm.mean, arm.spread, arm.lowest, arm.highest)),
        )
        for arm in run.arms()
    ]
    return Table("arms", "Arms", head, rows)


def _episodes(run: RunData) -> Table:
    head = ["episode", "steps", "LR", "noise", "first loss", "last loss", "reward", "note"]
    rows = []
    for number, (record, skipped) in enumerate(zip(run.episodes, run.skips(), strict=True), 1):
        rows.append(
            (
                str(number),
                f"{record.start_step} to {record.end_step}",
                f"×{record.lr_value:g}",  # noqa: RUF001
                f"{record.noise_value:g}",
                shown(record.start_loss),
                shown(record.end_loss),
                f"{record.reward:+.4f}",
                ", ".join(notes_on(run, number - 1, skipped)),
            )
        )
    return Table("episodes", "Episodes", head, rows)


def notes_on(run: RunData, index: int, skipped: int) -> list[str]:
    """Say what was out of the ordinary in an episode.

    Args:
        run: its run.
        index: its place among the run's episodes.
        skipped: steps that were skipped in it.
    """
    record, notes = run.episodes[index], []
    if run.was_clipped(record):
        notes.append(f"clipped from {record.reward_unclipped:+.4g}")
    if record.outcome is not None:
        notes.append(record.outcome)
    if skipped:
        notes.append(f"{skipped} step{'' if skipped == 1 else 's'} skipped")
    return notes


def _trials(run: RunData) -> Table:
    head = ["trial", "step", "LR", "outputs moved", "weights moved", "measured on"]
    rows = [
        (
            str(number),
            str(trial.step),
            shown(trial.learning_rate),
            moved(trial.movement),
            moved(trial.weight_movement),
            "its own batch" if trial.own_batch else "other batches",
        )
        for number, trial in enumerate(run.trials, 1)
    ]
    return Table("trials", "Trials of the calibration", head, rows)


def _logged(run: RunData) -> Table:
    """Return the logged values that plots show, a row for each step."""
    by_step: dict[int, dict[str, float]] = {}
    for key in _LOGGED:
        for step, value in run.series(key):
            by_step.setdefault(step, {})[key] = value
    every = -(-len(by_step) // _MOST_LOGGED)  # rounded up
    keys = [key for key in _LOGGED if any(key in row for row in by_step.values())]
    rows = [
        (str(step), *(shown(row[key]) if key in row else "" for key in keys))
        for step, row in sorted(by_step.items())[:: max(1, every)]
    ]
    title = "Logged values" if every <= 1 else f"Logged values, one row in {every}"
    return Table("logged", title, ["step", *(_LOGGED[key] for key in keys)], rows)


def clock(seconds: float) -> str:
    """Write a time, given in seconds since 1970."""
    moment = datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc)
    return f"{moment:%Y-%m-%d %H:%M:%S} UTC"
