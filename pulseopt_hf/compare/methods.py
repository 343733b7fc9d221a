"""What is compared: each method as a user of it would set it up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pulseopt_hf.compare.published import published_trainer
from pulseopt_hf.errors import needs_extra


@dataclass(frozen=True)
class Method:
    """One way to train.

    Attributes:
        words: keys of a recipe, as the command line gives them.
        about: what it is.
        optimizer: makes its own optimizer from the model's parameters.
        trainer: makes its own Trainer from the recipe's.
        ignores_lr: whether the base LR means nothing to it.
        evaluations: evaluations of the validation data that it steers by.
        calibrates: whether it may calibrate, and has to pay for what that takes.
    """

    words: tuple[str, ...]
    about: str
    optimizer: Callable[[Any], Any] | None = None
    trainer: Callable[[Any], Any] | None = None
    ignores_lr: bool = False
    evaluations: int = 0
    calibrates: bool = False


def _prodigy(parameters: Any) -> Any:
    with needs_extra("`prodigy`", "peers"):
        from prodigyopt import Prodigy
    return Prodigy(parameters, lr=1.0, safeguard_warmup=True)


_CONSTANT = ("--calibration", "off", "--lr_candidates", "1.0")
_ARMS = ("--lr_candidates", "0.5", "1.0", "2.0")
_PUBLISHED = (
    *("--calibration", "off", "--bandit", "discounted_ucb", "--reward", "smoothed"),
    *_ARMS,
)

METHODS = {
    "static": Method(_CONSTANT, "the recipe's optimizer and schedule at this base LR"),
    "random": Method(
        ("--calibration", "off", *_ARMS, "--control_mode", "random"), "arms 0.5, 1, 2 at random"
    ),
    "published": Method(_PUBLISHED, "arms 0.5, 1, 2 played by the bandit of pulseopt 0.3.0"),
    "default": Method((), "the recipe unchanged", calibrates=True),
    "scaled_ucb": Method(
        ("--calibration", "off", *_ARMS), "arms 0.5, 1, 2 played by the scaled bandit"
    ),
    "default_arms": Method(
        (*_ARMS, "--bandit", "conservative_ucb"),
        "the default with arms 0.5, 1, 2 played by the conservative bandit",
        calibrates=True,
    ),
    "pulseopt": Method(
        _CONSTANT, "arms 0.5, 1, 2 by the package pulseopt itself", trainer=published_trainer
    ),
    "greedy": Method(
        (*_CONSTANT, "--lr_scheduler_type", "greedy"),
        "Transformers' GreedyLR, with ten evaluations that it is not charged for",
        evaluations=10,
    ),
    "schedule_free": Method(
        (*_CONSTANT, "--optim", "schedule_free_adamw", "--lr_scheduler_type", "constant"),
        "schedule-free AdamW (Defazio et al., arXiv 2405.15682)",
    ),
    "prodigy": Method(
        _CONSTANT,
        "Prodigy at its own LR of 1 (Mishchenko and Defazio, arXiv 2306.06101)",
        optimizer=_prodigy,
        ignores_lr=True,
    ),
}
