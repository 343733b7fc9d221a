"""Training arguments with the knobs of the method beside Trainer's own."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import TrainingArguments

from pulseopt_hf.config import PulseOptKnobs, check_knobs


@dataclass
class PulseOptTrainingArguments(PulseOptKnobs, TrainingArguments):
    """`TrainingArguments` plus every knob of `PulseOptConfig`, flat, for YAML and command lines.

    The seed of the bandits and of the noise is `seed`, as for everything else in a run.
    """

    def __post_init__(self) -> None:
        """Check the knobs, then what Trainer checks.

        Raises:
            ValueError: a knob is out of range.
        """
        check_knobs(self)
        super().__post_init__()  # type: ignore[no-untyped-call]
