"""The lines that tell of a run while it goes, wherever that is. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping

from pulseopt_hf.aees.calibration import Trial
from pulseopt_hf.aees.records import EpisodeRecord

_COUNTS = ("runtime", "samples_per_second", "steps_per_second", "samples")
_CLOCKS = ("epoch", "model_preparation_time")


def trial_line(number: int, trial: Trial, base_lr: float) -> str:
    """Tell of one trial step of the calibration, by its number from 1."""
    return (
        f"trial {number:>2}  step {trial.step:>3}  "
        f"LR x{trial.scale:<7.3g} = {trial.scale * base_lr:.2e}  "
        f"moved losses by {trial.loss_movement:.2%}, weights by {trial.weight_movement:.2%}"
    )


def calibrated_line(scale: float, base_lr: float, *, failed: bool) -> str:
    """Tell what the calibration found; if it failed, that is the base LR."""
    return (
        f"{'not calibrated' if failed else 'calibrated'}: learning rate {scale * base_lr:.2e}, "
        f"{scale:.3g} times the base LR of {base_lr:.2e}"
    )


def episode_line(number: int, record: EpisodeRecord, learning_rate: float | None) -> str:
    """Tell of one episode.

    Args:
        number: its number, from 1.
        record: the episode.
        learning_rate: effective LR of its last step, or `None` where it is not known.
    """
    shown = "" if learning_rate is None else f" = {learning_rate:.2e}"
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
