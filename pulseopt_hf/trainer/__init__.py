"""The method meets Transformers: a mixin for any Trainer, and a callback for a Trainer as it is."""

from pulseopt_hf.trainer.arguments import PulseOptTrainingArguments
from pulseopt_hf.trainer.callback import PulseOptCallback
from pulseopt_hf.trainer.checkpoints import newest_whole_checkpoint
from pulseopt_hf.trainer.find import find_learning_rate
from pulseopt_hf.trainer.mixin import (
    PulseOptMixin,
    PulseOptSeq2SeqTrainer,
    PulseOptTrainer,
    with_pulseopt,
)

__all__ = [
    "PulseOptCallback",
    "PulseOptMixin",
    "PulseOptSeq2SeqTrainer",
    "PulseOptTrainer",
    "PulseOptTrainingArguments",
    "find_learning_rate",
    "newest_whole_checkpoint",
    "with_pulseopt",
]
