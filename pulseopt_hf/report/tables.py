"""The tables and tiles that show a run, as plain text cells. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pulseopt_hf.aees.calibration import Trial
from pulseopt_hf.report.palette import arm_styles
from pulseopt_hf.report.run_data import RunData, Series
from pulseopt_hf.report.wording import counted, duration, metric_name, progress, shown

Row = dict[str, str]  # a cell for each column, by its name

_LOGGED = {
    "loss": "loss",
    "learning_rate": "base LR",
    "pulse/learning_rate": "effective LR",
    "grad_norm": "gradient norm",
}
_MOST_LOGGED = 10_000  # rows; the run record may have more
MOST_METRICS = 6  # of a comparison or a chart; a run's own table has all


class Table(NamedTuple):
    """Rows that share their columns; elements are named after `name`."""

    name: str
    title: str
    rows: Sequence[Row]


def tables_of_run(run: RunData) -> list[Table]:
    """Return a run's data: arms, episodes, trials, logged values, settings and versions."""
    every, logged = _logged_rows(run)
    some = f", {len(run.episodes):,} of {run.episode_count:,}" if run.left_out else ""
    found = [
        Table("arms", "Arms", arm_rows(run) if run.has_arms else []),
        Table("episodes", f"Episodes{some}", episode_rows(run)),
        Table("trials", "Calibration trials", trial_rows(run.trials)),
        Table("logged", f"Logged values{every}", logged),
        Table("knobs", "Knobs", _pairs("knob", run.knobs)),
        Table("arguments", "Training arguments", _pairs("argument", run.arguments)),
        Table("versions", "Versions", _pairs("package", run.versions)),
    ]
    return [table for table in found if table.rows]


def _pairs(name: str, settings: Mapping[str, object]) -> list[Row]:
    return [{name: key, "value": str(value)} for key, value in settings.items()]


def arm_rows(run: RunData) -> list[Row]:
    """Return a row for each arm that was played."""
    return [
        {
            "arm": style.label,
            "episodes": f"{arm.plays:,}",
            "steps": f"{arm.steps:,}",
            "mean reward": f"{arm.mean:+.4f}",
            "spread": "–" if arm.spread is None else f"{arm.spread:.4f}",  # noqa: RUF001
            "lowest": f"{arm.lowest:+.4f}",
            "highest": f"{arm.highest:+.4f}",
        }
        for arm, style in zip(run.arms(), arm_styles(run.arms()).values(), strict=True)
    ]


def episode_rows(run: RunData) -> list[Row]:
    """Return a row for each episode, with a note on what was out of the ordinary."""
    styles, rows = arm_styles(run.arms()), []
    for number, record, skipped in zip(run.numbers, run.episodes, run.skips(), strict=True):
        notes = [f"clipped from {record.reward_unclipped:+.4g}"] if run.was_clipped(record) else []
        notes += [] if record.outcome is None else [record.outcome]
        notes += [f"{counted(skipped, 'step')} skipped"] if skipped else []
        rows.append(
            {
                "episode": str(number),
                "steps": f"{record.start_step} to {record.end_step}",
                "arm": styles[record.lr_value, record.noise_value].label,
                "first loss": shown(record.start_loss),
                "last loss": shown(record.end_loss),
                "reward": f"{record.reward:+.4f}",
                "note": ", ".join(notes),
            }
        )
    return rows


def trial_rows(trials: Sequence[Trial]) -> list[Row]:
    """Return a row for each trial of a calibration."""
    return [
        {
            "trial": str(number),
            "step": str(trial.step),
            "LR": f"{trial.learning_rate:.2e}",
            "outputs moved": trial.moved()[0],
            "weights moved": trial.moved()[1],
            "measured on": "its own batch" if trial.own_batch else "other batches",
        }
        for number, trial in enumerate(trials, 1)
    ]


def _logged_rows(run: RunData) -> tuple[str, list[Row]]:
    """Return the logged values that charts show, a row for each step, and how many are left out."""
    names = {**_LOGGED, **{key: metric_name(key) for key in run.metrics}}
    columns = {name: dict(run.series(key)) for key, name in names.items()}
    columns = {name: values for name, values in columns.items() if values}
    steps = sorted({step for values in columns.values() for step in values})
    every = max(1, -(-len(steps) // _MOST_LOGGED))  # rounded up
    rows = [
        {"step": str(step)} | {n: shown(v[step]) if step in v else "" for n, v in columns.items()}
        for step in steps[::every]
    ]
    return "" if every == 1 else f", one row in {every}", rows


def facts(run: RunData) -> Row:
    """Return what a run's tiles say, the learning rate first."""
    found = {} if run.calibrated_lr is None else {"learning rate found": shown(run.calibrated_lr)}
    found |= {"LR that was set": shown(run.base_lr), "steps": progress(run)}
    if run.loss:
        found["training loss"] = f"{shown(run.loss[0][1])} → {shown(run.loss[-1][1])}"
    found |= {metric_name(key): shown(value) for key, value in run.metrics.items()}
    if run.steps_per_second is not None:
        found["wall time"] = duration(run.times[-1][1])
        found["steps per second"] = f"{run.steps_per_second:.3g}"
    for _, samples in run.series("train_samples_per_second")[-1:]:
        found["samples per second"] = f"{samples:.4g}"
    found |= {"episodes": f"{run.episode_count:,}"} if run.has_arms else {}
    found |= {"skipped steps": f"{run.skipped_steps:,}"} if run.skipped_steps else {}
    found |= {} if run.resumed_from is None else {"resumed from step": f"{run.resumed_from:,}"}
    return found


_COLUMNS = ("learning_rate", "max_steps")  # settings that every comparison has a column for


def comparison_table(runs: Sequence[RunData], names: Sequence[str]) -> Table:
    """Return a row for each run: how far it got, what it reached, and the settings that differ."""
    named = [{**run.arguments, **run.knobs, **run.versions} for run in runs]
    settings = [{key: str(value) for key, value in own.items()} for own in named]
    keys = dict.fromkeys(key for own in settings for key in own if key not in _COLUMNS)
    differing = [key for key in keys if len({own.get(key) for own in settings}) > 1]
    metrics = list(dict.fromkeys(key for run in runs for key in run.metrics))[:MOST_METRICS]
    rows = [
        {"run": name, "status": run.status, "steps": progress(run)}
        | {"LR that was set": shown(run.base_lr), "learning rate found": shown(run.calibrated_lr)}
        | {"loss, last tenth": shown(last_tenth(run.loss))}
        | {metric_name(key): shown(run.metrics.get(key)) for key in metrics}
        | {"wall time": duration(run.times[-1][1]) if run.times else shown(None)}
        | {key: own.get(key, shown(None)) for key in differing}
        for run, name, own in zip(runs, names, settings, strict=True)
    ]
    return Table("comparison", "Comparison", rows)


def last_tenth(series: Series) -> float | None:
    """Return the mean of the points in the last tenth of the steps, at least of one."""
    values = [value for step, value in series if step > 0.9 * series[-1][0]]
    return sum(values) / len(values) if values else None
