"""Training arguments with the knobs of the method beside Trainer's own."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import TrainingArguments

from pulseopt_hf.config import PulseOptKnobs, check_knobs


@dataclass
class PulseOptTrainingArguments(PulseOptKnobs, TrainingArguments):
    """`TrainingArguments` with every knob of `PulseOptConfig`, for YAML files and command lines.

    `seed` also seeds the bandits and the gradient noise.
    """

    def __post_init__(self) -> None:
        """Check the knobs, then what Trainer checks.

        Raises:
            ValueError: a knob is out of range.
        """
        check_knobs(self)
        super().__post_init__()  # type: ignore[no-untyped-call]
