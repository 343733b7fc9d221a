"""What is said of a run, wherever it is shown: lines, sentences, numbers. Standard library only."""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping

from pulseopt_hf.aees.calibration import OUTPUT_RADIUS, WEIGHT_RADIUS, deciding
from pulseopt_hf.report.run_data import RunData, Series, Status, is_metric


def described(metrics: Mapping[str, object]) -> str:
    """Write out the metrics of an evaluation, without times and counts."""
    return "eval " + ", ".join(
        f"{key.removeprefix('eval_')} {value:.3f}"
        for key, value in metrics.items()
        if isinstance(value, float) and is_metric(key)
    )


def printable(text: str) -> str:
    """Replace what a terminal would obey instead of print, such as escape codes and line ends."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def shown(value: float | None) -> str:
    """Write a number in at most five figures, or a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"  # noqa: RUF001
    return f"{value:.5g}" if 1e-3 <= abs(value) < 1e5 or value == 0 else f"{value:.3g}"


def metric_name(key: str) -> str:
    """Name a metric for people, by the key that Trainer logs it under."""
    return "evaluation loss" if key == "eval_loss" else key.removeprefix("eval_").replace("_", " ")


def counted(count: int, thing: str) -> str:
    """Write how many of a thing there are."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def course(name: str, series: Series) -> str:
    """Say what a curve did, from its first point to its last."""
    (first, start), (last, end) = series[0], series[-1]
    if len(series) == 1:
        return f"{name} was {shown(end)} at step {last}"
    verb = "fell" if end < start else "rose" if end > start else "stayed"
    return f"{name} {verb} from {shown(start)} at step {first} to {shown(end)} at step {last}"


def clock(seconds: float) -> str:
    """Write a time, given in seconds since 1970."""
    moment = datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc)
    return f"{moment:%Y-%m-%d %H:%M:%S} UTC"


def duration(seconds: float) -> str:
    """Write how long something took."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, left = divmod(round(seconds), 60)
    return f"{minutes} min {left} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def progress(run: RunData) -> str:
    """Say how far a run has got."""
    return f"{run.step:,} of {run.max_steps:,}"


def status_line(run: RunData) -> str:
    """Say how a run stands, and what a long run's record leaves out."""
    done = f"{progress(run)} steps"
    when = "" if run.updated is None else f" Last written to at {clock(run.updated)}."
    standing: dict[Status, str] = {
        "finished": f"Finished: {done}.",
        "failed": f"Ended by {run.error} at step {run.step:,}: {done}.",
        "stopped": f"Stopped before its last step: {done}.",
        "running": f"Still running: {done} so far.{when} Run the command again for a newer page.",
        "silent": f"Silent: {done}, and no end was recorded.{when} "
        "The run was killed or is waiting.",
    }
    if not run.left_out and not run.left_out_logs:
        return standing[run.status]
    logs = len(run.logs)
    return (
        f"{standing[run.status]} The record of this long run has {len(run.episodes):,} of "
        f"{run.episode_count:,} episodes and {logs:,} of {logs + run.left_out_logs:,} logs: all of "
        "the newest and some of those before. Totals of the arms are of all episodes."
    )


def silence(run: RunData) -> str:
    """Say to someone who follows a run that it has written nothing for long."""
    since = "" if run.updated is None else f" since {clock(run.updated)}"
    return (
        f"Nothing was written{since}, at step {progress(run)}: the run was killed or is waiting. "
        "Ctrl-C stops this command, not the run."
    )


def finding(run: RunData) -> str:
    """Say what the calibration found and why, or why it found nothing."""
    if run.outcome is None:
        return f"{counted(len(run.trials), 'trial')} so far."
    if run.calibrated_lr is None:
        return str(run.outcome)
    limit = f"the weights by at most {WEIGHT_RADIUS:.0%}"
    if run.outcome.limited_by == "outputs":
        limit = f"the outputs at most {OUTPUT_RADIUS:.3g} times as far as 10% dropout does"
    trials = ", ".join(str(run.trials.index(trial) + 1) for trial in deciding(run.trials))
    return (
        f"{run.outcome} One step may move {limit}. The LR follows from trials {trials} of "
        f"{len(run.trials)}, each on a batch of its own."
    )
