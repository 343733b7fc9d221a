"""Every knob of the method: its help text and its validation, once. Standard library only.

`AEES`, `PulseOptTrainingArguments`, `--help` and the tables of the documentation are all made from
the fields below.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")

EPISODES_PER_ARM = 10  # that an automatic episode length aims at
SHORTEST_AUTOMATIC_EPISODE = 5
LONGEST_AUTOMATIC_EPISODE = 100
LONGEST_TREND_WINDOW = 1024  # episodes; a long run keeps no more of them for certain


def knob(default: Any, help: str) -> Any:
    """Declare a field; its metadata holds only what `HfArgumentParser` hands on to argparse."""
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata={"help": help})
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass
class PulseOptKnobs:
    """The knobs, as fields that a config and a set of training arguments share."""

    lr_candidates: list[float] = knob(
        [1.0],
        "Learning-rate multipliers to choose from, each > 0. A single value is constant.",
    )
    noise_candidates: list[float] = knob(
        [0.0],
        "Gradient-noise levels to choose from, each >= 0, in the unit of `noise_mode`. A single "
        "value is constant.",
    )
    noise_mode: Literal["absolute", "relative"] = knob(
        "absolute",
        "`absolute`: a noise level is the standard deviation per gradient element (published). "
        "`relative`: it is a multiple of each gradient's root mean square.",
    )
    episode_length: int | None = knob(
        None,
        "Optimizer steps in an episode, >= 1. If unset, Trainer derives it from the length of the "
        "run: 10 episodes per arm, of 5 to 100 steps.",
    )
    calibration: Literal["auto", "trust_region", "off"] = knob(
        "auto",
        "`trust_region` finds the LR in the first steps of training. Trial steps, each undone, "
        "show how large a step may be before it moves what the model computes or the weights too "
        "far. The run must have at least 50 optimizer steps. While calibration lasts, a copy of "
        "the trained parameters is in host memory. `auto` does the same, but leaves out optimizers "
        "that find their own LR, searches over `learning_rate`, and Trainers that optimise a "
        "preference or a reward; the log says why. `off` keeps the LR that was set.",
    )
    control_mode: Literal["adaptive", "random"] = knob(
        "adaptive",
        "`adaptive` learns which arms to play. `random` plays them at random, as the control of a "
        "comparison.",
    )
    bandit: Literal["scaled_ucb", "conservative_ucb", "discounted_ucb"] = knob(
        "scaled_ucb",
        "`scaled_ucb`: explores in proportion to the spread of the rewards seen, measured from "
        "their running mean. `conservative_ucb`: rests on the arm that changes least while a run "
        "begins and cools down, tries another in every fourth episode at most, and goes on with it "
        "where it leads by more than its error; no arm exceeds the LR that a calibration found. "
        "`discounted_ucb`: explores by a fixed bonus (published).",
    )
    reward: Literal["slope", "smoothed"] = knob(
        "slope",
        "How the share by which the loss fell in an episode is measured. `slope`: along the "
        "straight line that fits all losses of the episode best. `smoothed`: from its first loss "
        "to its smoothed last loss, by logarithms (published).",
    )
    structured_control_mode: Literal["independent", "conditional"] = knob(
        "independent",
        "`independent`: one bandit chooses the noise. `conditional`: there is one for each LR "
        "multiplier.",
    )
    context_mode: Literal["none", "trend"] = knob(
        "none",
        "`trend` uses separate bandits while the loss is improving, stable or worsening.",
    )
    context_trend_window: int = knob(
        3, "Number of episode-end losses that give the trend, 1 to 1024."
    )
    context_trend_epsilon: float = knob(
        1e-3, "Mean change of the loss per episode that still counts as stable, >= 0."
    )
    reward_instability_lambda: float = knob(
        0.0, "Weight of the penalty on losses that vary within an episode, >= 0."
    )
    reward_epsilon: float = knob(
        1e-8, "Added to a loss before a division by it or its logarithm, > 0."
    )
    reward_clip_min: float = knob(-1.0, "Lowest reward; below `reward_clip_max`.")
    reward_clip_max: float = knob(1.0, "Highest reward; above `reward_clip_min`.")
    ema_alpha: float = knob(
        0.1, "Weight of the newest loss in the smoothed loss of an episode, in (0, 1]."
    )
    nonfinite: Literal["skip", "raise"] = knob(
        "skip",
        "What happens at a NaN or infinite loss or gradient: `skip` skips the optimizer step, "
        "`raise` ends the run with a ValueError.",
    )
    max_consecutive_skips: int = knob(
        50, "Number of skipped steps in a row that ends the run with an error, >= 1."
    )
    divergence: Literal["off", "cut", "rollback"] = knob(
        "off",
        "What happens to an episode whose loss explodes or is no longer finite: `cut` ends it with "
        "the lowest reward; `rollback` also restores parameters and optimizer state from the start "
        "of the episode, of which it keeps a copy in host memory. The log key `episode_outcomes` "
        "marks such episodes.",
    )
    divergence_factor: float = knob(
        2.0,
        "An explosion is a loss this many times as high as that at the end of the last sound "
        "episode, > 1.",
    )
    log_update_norm: bool = knob(
        False,
        "Measure how far each step moves the parameters, for the log key `mean_update_norms`. It "
        "is exact up to 4 million parameters; larger models are estimated from a sample of that "
        "size.",
    )


@dataclass
class PulseOptConfig(PulseOptKnobs):
    """The settings of calibration and arms.

    `PulseOptConfig()` has the recommended settings, `PulseOptConfig.published()` those of the PyPI
    package `pulseopt`.

    Raises:
        ValueError: one or more values are out of range; the message has a line for each.
    """

    seed: int | None = knob(
        None,
        "Seed of the bandits and of the gradient noise, >= 0. If unset, Trainer uses its own "
        "`seed`, and `AEES` draws one from the operating system.",
    )

    def __post_init__(self) -> None:
        """Check every knob.

        Raises:
            ValueError: one or more knobs are out of range; the message has a line for each.
        """
        check_knobs(self)

    @classmethod
    def published(cls, **overrides: Any) -> PulseOptConfig:
        """Return the settings with which the method equals `pulseopt` 0.3.0, bit for bit.

        These have a single arm, as `pulseopt` does by default. Pass `lr_candidates` or
        `noise_candidates` to have several.

        Args:
            **overrides: knobs that differ from those of `pulseopt`.
        """
        defaults: dict[str, Any] = {
            "calibration": "off",
            "bandit": "discounted_ucb",
            "reward": "smoothed",
            "episode_length": 100,
        }
        return cls(**{**defaults, **overrides})

    @classmethod
    def of_knobs(cls, knobs: PulseOptKnobs) -> PulseOptConfig:
        """Return the knobs of training arguments as a config, without their seed."""
        names = [field.name for field in dataclasses.fields(PulseOptKnobs)]
        return cls(**{name: getattr(knobs, name) for name in names})

    @property
    def arms(self) -> int:
        """Number of arms: LR multipliers times noise levels."""
        return len(self.lr_candidates) * len(self.noise_candidates)

    def idle_knobs(self) -> list[str]:
        """Return the knobs that were changed and have no effect, since there is but one arm."""
        if self.arms > 1:
            return []
        default = PulseOptConfig()
        names = ("control_mode", "bandit", "structured_control_mode", "context_mode")
        return [name for name in names if getattr(self, name) != getattr(default, name)]

    def for_run(self, max_steps: int, seed: int) -> PulseOptConfig:
        """Return these settings with what depends on the run filled in: episode length and seed.

        Args:
            max_steps: optimizer steps of the run, >= 1.
            seed: the run's seed, used where these settings have none.

        Raises:
            ValueError: an episode is longer than the run.
        """
        length = self.episode_length
        if length is None:
            wanted = max_steps // (EPISODES_PER_ARM * self.arms)
            length = min(max(wanted, SHORTEST_AUTOMATIC_EPISODE), LONGEST_AUTOMATIC_EPISODE)
            length = min(length, max_steps)
        elif length > max_steps:
            raise ValueError(
                f"`episode_length` must be at most the {max_steps} optimizer steps of this run, "
                f"got {length}. Leave it unset to have it follow from the run."
            )
        seed = seed if self.seed is None else self.seed
        return dataclasses.replace(self, episode_length=length, seed=seed)


def takes_knobs(defaults: PulseOptConfig) -> Callable[[type[T]], type[T]]:
    """Return a decorator for a class that takes the knobs as keywords, with these defaults.

    It writes the knobs, which are `**knobs` of `__init__`, into the signature and the docstring.
    """

    def document(cls: type[T]) -> type[T]:
        constructor: Any = cls.__init__
        own = inspect.signature(constructor).parameters.values()
        shown = [one for one in own if one.kind is not one.VAR_KEYWORD]
        lines = ["", "    Knobs:"]
        for field in dataclasses.fields(PulseOptConfig):
            default = getattr(defaults, field.name)
            keyword = inspect.Parameter.KEYWORD_ONLY
            kind = str(field.type)
            shown.append(inspect.Parameter(field.name, keyword, default=default, annotation=kind))
            text = f"{field.name}: {field.metadata['help']} Default: {default!r}."
            lines.append(
                textwrap.indent(textwrap.fill(text, 92, subsequent_indent=" " * 4), " " * 8)
            )
        constructor.__signature__ = inspect.Signature(shown)
        cls.__doc__ = (cls.__doc__ or "").rstrip() + "\n".join(["", *lines, ""])
        return cls

    return document


# Knobs that say how a run is watched over, not what the method computes: a run may be resumed
# with others.
OPERATIONAL_KNOBS = frozenset(
    {
        "nonfinite",
        "max_consecutive_skips",
        "divergence",
        "divergence_factor",
        "log_update_norm",
    }
)


def method_settings(config: PulseOptConfig) -> dict[str, Any]:
    """Return the knobs that a resumed run must share with the run that it continues."""
    return {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name not in OPERATIONAL_KNOBS
    }


def check_knobs(knobs: PulseOptKnobs) -> None:
    """Normalise numbers to `float` and raise one `ValueError` that lists every bad knob."""
    problems = list(_problems(knobs))
    if problems:
        raise ValueError("\n".join(problems))
    knobs.lr_candidates = [float(value) for value in knobs.lr_candidates]
    knobs.noise_candidates = [float(value) for value in knobs.noise_candidates]


def _problems(knobs: PulseOptKnobs) -> Iterator[str]:
    yield from _candidate_problems("lr_candidates", knobs.lr_candidates, "> 0", lambda v: v > 0)
    yield from _candidate_problems(
        "noise_candidates", knobs.noise_candidates, ">= 0", lambda v: v >= 0
    )
    for name in _CHOICES:
        yield from _choice_problems(knobs, name)
    if knobs.episode_length is not None:
        yield from _whole_problems(knobs, "episode_length", 1)
    yield from _whole_problems(knobs, "context_trend_window", 1, LONGEST_TREND_WINDOW)
    yield from _whole_problems(knobs, "max_consecutive_skips", 1)
    for name, bound, holds in (
        ("context_trend_epsilon", ">= 0", lambda v: v >= 0),
        ("reward_instability_lambda", ">= 0", lambda v: v >= 0),
        ("reward_epsilon", "> 0", lambda v: v > 0),
        ("reward_clip_min", "finite", lambda v: True),
        ("reward_clip_max", "finite", lambda v: True),
        ("ema_alpha", "in (0, 1]", lambda v: 0 < v <= 1),
        ("divergence_factor", "> 1", lambda v: v > 1),
    ):
        value = getattr(knobs, name)
        if not _is_finite(value) or not holds(value):
            yield f"`{name}` must be a number {bound}, got {value!r}."
    low, high = knobs.reward_clip_min, knobs.reward_clip_max
    if _is_finite(low) and _is_finite(high) and low >= high:
        yield f"`reward_clip_min` must be below `reward_clip_max`, got {low!r} and {high!r}."
    if not isinstance(knobs.log_update_norm, bool):
        yield f"`log_update_norm` must be True or False, got {knobs.log_update_norm!r}."
    if isinstance(knobs, PulseOptConfig) and knobs.seed is not None:
        yield from _whole_problems(knobs, "seed", 0)


def _candidate_problems(name: str, values: object, bound: str, holds: Any) -> Iterator[str]:
    if isinstance(values, str) or not isinstance(values, Sequence):
        yield f"`{name}` must be a list of numbers {bound}, got {values!r}."
        return
    if len(values) == 0:
        yield f"`{name}` must have at least one value, got {values!r}."
    for value in values:
        if not _is_finite(value) or not holds(value):
            yield f"`{name}` must hold numbers {bound}, got {value!r}."
            return
    if len(set(values)) < len(values):
        yield f"`{name}` must hold different values, got {list(values)!r}."


def _choice_problems(knobs: PulseOptKnobs, name: str) -> Iterator[str]:
    choices = _CHOICES[name]
    value = getattr(knobs, name)
    if value not in choices:
        yield f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}."


def _whole_problems(
    knobs: PulseOptKnobs, name: str, lowest: int, highest: float = math.inf
) -> Iterator[str]:
    value = getattr(knobs, name)
    if isinstance(value, bool) or not isinstance(value, int):
        yield f"`{name}` must be a whole number >= {lowest}, got {value!r}."
    elif value < lowest:
        yield f"`{name}` must be at least {lowest}, got {value}."
    elif value > highest:
        yield f"`{name}` must be at most {highest}, got {value}."


def _is_finite(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


_TYPES = get_type_hints(PulseOptKnobs)
_CHOICES = {name: get_args(kind) for name, kind in _TYPES.items() if get_origin(kind) is Literal}
