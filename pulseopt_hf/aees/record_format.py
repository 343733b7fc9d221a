"""The run record's format: one JSON object a line. Standard library only.

A run writes it line by line (`pulseopt_hf.trainer.record_writer`), and whoever shows a run reads it
(`pulseopt_hf.report`). The kinds of line:

| kind | holds |
|---|---|
| `head` | format version, run name, length, knobs, base LR, training arguments, package versions |
| `log` | what Trainer logged, with its step |
| `episode` | a closed episode, with its number from 1 |
| `trial` | a trial of the calibration, with its number from 1 |
| `calibration` | what came of the calibration; the last one counts |
| `end` | the step that training ended at, whether that is the whole run, and the error if one did |

A long run's record is written anew now and then, with fewer of its older lines; see
`pulseopt_hf.aees.left_out`. Its `head` then holds the totals of the episodes that are left out.

Every line has the time it was written at, in seconds since 1970. A line that was taken over from a
checkpoint has `None`, since checkpoints hold no times.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from dataclasses import field as attribute
from numbers import Real
from typing import Any

from pulseopt_hf.aees.calibration import Outcome, Trial, outcome_from_json, trial_from_json
from pulseopt_hf.aees.episode_record import EpisodeRecord
from pulseopt_hf.aees.json_checks import (
    StateError,
    dataclass_of,
    field,
    from_one,
    integer,
    mapping,
    number,
    optional,
    text,
)
from pulseopt_hf.aees.left_out import ArmTotals, totals_from_json

FILE_NAME = "pulse.jsonl"
FORMAT_VERSION = 2

Value = float | int | str | bool | None


@dataclass(frozen=True)
class Head:
    """What a run is.

    Attributes:
        name: the run's name.
        max_steps: optimizer steps of the whole run.
        knobs: the `PulseOptConfig` as a mapping, with all that followed from the run filled in.
        base_lr: the highest base LR of the schedule, over all parameter groups, as it was set.
        versions: version of each package, by its name.
        resumed_from: global step of the checkpoint that the run went on from, or `None`.
        left_out: totals of the episodes that a long run's record leaves out.
        left_out_logs: how many lines of the kind `log` it leaves out.
        arguments: the training arguments, as trackers get them, without folders and names.
    """

    name: str
    max_steps: int
    knobs: dict[str, Any]
    base_lr: float
    versions: dict[str, str]
    resumed_from: int | None = None
    left_out: list[ArmTotals] = attribute(default_factory=list)
    left_out_logs: int = 0
    arguments: dict[str, Any] = attribute(default_factory=dict)

    @property
    def left_out_episodes(self) -> int:
        """How many episodes the record leaves out."""
        return sum(arm.plays for arm in self.left_out)


@dataclass(frozen=True)
class Log:
    """What Trainer logged at a step; `None` stands for a number that was not finite."""

    step: int
    values: dict[str, Value]


@dataclass(frozen=True)
class NumberedEpisode:
    """A closed episode and its number, from 1."""

    number: int
    record: EpisodeRecord

    def __str__(self) -> str:
        """Say it in one line."""
        record = self.record
        rate = "" if record.learning_rate is None else f" = {record.learning_rate:.2e}"
        noise = f"  noise {record.noise_value:g}" if record.noise_value else ""
        return (
            f"episode {self.number:>3}  steps {record.start_step:>4}-{record.end_step:<4}  "
            f"LR x{record.lr_value:<4g}{rate}{noise}  "
            f"loss {record.start_loss:.3f} to {record.end_loss:.3f}  "
            f"reward {record.reward:+.4f}" + (f"  {record.outcome}" if record.outcome else "")
        )


@dataclass(frozen=True)
class NumberedTrial:
    """A trial of the calibration and its number, from 1."""

    number: int
    trial: Trial

    def __str__(self) -> str:
        """Say it in one line."""
        outputs, weights = self.trial.moved()
        return (
            f"trial {self.number:>2}  step {self.trial.step:>3}  "
            f"LR {self.trial.learning_rate:.2e}  outputs moved {outputs}, weights {weights}"
        )


@dataclass(frozen=True)
class End:
    """How training ended.

    Attributes:
        step: global step.
        finished: whether that is the last step of the run.
        error: class of the exception that ended it, or `None`.
    """

    step: int
    finished: bool
    error: str | None = None


RunEvent = NumberedEpisode | NumberedTrial | Outcome  # what happens in a step; a line as `str`
Line = Head | Log | RunEvent | End
_KINDS: dict[type, str] = {
    Head: "head",
    Log: "log",
    NumberedEpisode: "episode",
    NumberedTrial: "trial",
    Outcome: "calibration",
    End: "end",
}


def encode(line: Line, time: float | None) -> bytes:
    """Return a line as it stands in the file, with its newline.

    Args:
        line: what to write.
        time: seconds since 1970, or `None` where that is not known.
    """
    content: dict[str, Any]
    if isinstance(line, Log):
        content = {"step": line.step, "values": loggable(line.values)}
    elif isinstance(line, NumberedEpisode):
        content = {"number": line.number, **asdict(line.record)}
    elif isinstance(line, NumberedTrial):
        content = {"number": line.number, **asdict(line.trial)}
    else:
        content = asdict(line)
    version = {"version": FORMAT_VERSION} if isinstance(line, Head) else {}
    stamp = None if time is None else round(time, 3)
    whole = {"kind": _KINDS[type(line)], **version, **content, "time": stamp}
    return json.dumps(whole, allow_nan=False).encode() + b"\n"


def decode(content: object) -> tuple[Line | None, float | None]:
    """Rebuild a line and its time from the parsed JSON.

    Returns:
        The line, or `None` for a kind that this release does not know, and its time.

    Raises:
        StateError: it is damaged, or of a newer format version.
    """
    kind, time = field(content, "kind", text), field(content, "time", optional(number))
    line: Line | None = None
    if kind == "head":
        line = _head(content)
    elif kind == "log":
        line = dataclass_of(Log, content, values=_values)
    elif kind == "episode":
        episode = dataclass_of(EpisodeRecord, content)
        line = NumberedEpisode(field(content, "number", from_one), episode)
    elif kind == "trial":
        trial = trial_from_json(content, kind)
        line = NumberedTrial(field(content, "number", from_one), trial)
    elif kind == "calibration":
        line = outcome_from_json(content, kind)
    elif kind == "end":
        line = dataclass_of(End, content)
    return line, time


def loggable(values: Mapping[str, Any]) -> dict[str, Value]:
    """Keep the numbers and words of a log entry.

    Tensors are left out, since writing one would read its device. A number that is not finite,
    which JSON has no word for, or a whole number beyond 64 bits becomes `None`.
    """
    kept: dict[str, Value] = {}
    for key, value in values.items():
        if value is None or isinstance(value, bool | str):
            kept[key] = value
        elif isinstance(value, int):
            kept[key] = value if abs(value) < 2**63 else None
        elif isinstance(value, Real):
            kept[key] = float(value) if math.isfinite(value) else None
    return kept


def _head(content: object) -> Head:
    version = field(content, "version", integer)
    if version > FORMAT_VERSION:
        raise StateError(
            f"has format version {version}, and this release of pulseopt_hf reads up to version "
            f"{FORMAT_VERSION}. Upgrade pulseopt_hf to the release that wrote it."
        )
    return dataclass_of(Head, content, versions=_texts, left_out=totals_from_json)


def _texts(value: object, name: str) -> dict[str, str]:
    return {key: text(item, key) for key, item in mapping(value, name).items()}


def _values(value: object, name: str) -> dict[str, Value]:
    return loggable(mapping(value, name))
