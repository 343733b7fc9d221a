"""Adaptive learning-rate control for people who fine-tune with Hugging Face Transformers.

The names below are loaded when they are first used: importing the package loads neither torch nor
Transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pulseopt_hf.config import PulseOptConfig
    from pulseopt_hf.optim import AEES
    from pulseopt_hf.trainer import (
        PulseOptCallback,
        PulseOptSeq2SeqTrainer,
        PulseOptTrainer,
        PulseOptTrainingArguments,
        find_learning_rate,
        newest_whole_checkpoint,
        with_pulseopt,
    )

__version__ = "0.1.0"

__all__ = [
    "AEES",
    "PulseOptCallback",
    "PulseOptConfig",
    "PulseOptSeq2SeqTrainer",
    "PulseOptTrainer",
    "PulseOptTrainingArguments",
    "find_learning_rate",
    "newest_whole_checkpoint",
    "with_pulseopt",
]

_HOME = {name: "pulseopt_hf.trainer" for name in __all__}
_HOME["AEES"] = "pulseopt_hf.optim"
_HOME["PulseOptConfig"] = "pulseopt_hf.config"


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
