"""The lines that tell of a run while it goes, wherever that is. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping

from pulseopt_hf.aees.calibration import NOT_FINITE, Trial
from pulseopt_hf.aees.records import EpisodeRecord

_COUNTS = ("runtime", "samples_per_second", "steps_per_second", "samples")
_CLOCKS = ("epoch", "model_preparation_time")


def trial_line(number: int, trial: Trial) -> str:
    """Tell of one trial of the calibration, by its number from 1."""
    return (
        f"trial {number:>2}  step {trial.step:>3}  LR {trial.learning_rate:.2e}  "
        f"moved outputs by {moved(trial.movement)}, weights by {moved(trial.weight_movement)}"
    )


def moved(movement: float) -> str:
    """Write how far a trial moved something."""
    return f"{movement:.2%}" if movement < NOT_FINITE else "inf or NaN"


def episode_line(number: int, record: EpisodeRecord) -> str:
    """Tell of one episode, by its number from 1."""
    shown = "" if record.learning_rate is None else f" = {record.learning_rate:.2e}"
    noise = f"  noise {record.noise_value:g}" if record.noise_value else ""
    return (
        f"episode {number:>3}  steps {record.start_step:>4}-{record.end_step:<4}  "
        f"LR x{record.lr_value:<4g}{shown}{noise}  "
        f"loss {record.start_loss:.3f} to {record.end_loss:.3f}  "
        f"reward {record.reward:+.4f}" + (f"  {record.outcome}" if record.outcome else "")
    )


def described(metrics: Mapping[str, object]) -> str:
    """Write out the metrics of an evaluation that are no times or counts."""
    shown = []
    for key, value in metrics.items():
        name = key.removeprefix("eval_")
        if name.split("_mm")[0] in _COUNTS:
            continue
        if isinstance(value, float) and name not in _CLOCKS:
            shown.append(f"{name} {value:.3f}")
    return "eval " + ", ".join(shown)


def printable(text: str) -> str:
    """Replace what a terminal would not print but obey, such as escape codes and line ends."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)
