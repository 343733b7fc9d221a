"""What a task hands to the Trainer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from pulseopt_hf.errors import UsageError


@dataclass
class Prepared:
    """A task ready to train.

    Attributes:
        model: the model with its weights.
        processing_class: the tokenizer or image processor, which is saved with the model.
        collator: makes a batch of examples.
        train: examples to train on, or `None`.
        validation: examples to evaluate on, one set each.
        test: examples to predict, one set each.
        compute_metrics: Trainer's.
        preprocess_logits: Trainer's `preprocess_logits_for_metrics`.
        written: turns the predictions of a test set into lines, one an example; `None` where the
            task predicts nothing.
    """

    model: Any
    processing_class: Any
    collator: Any
    train: Dataset | None = None
    validation: list[Dataset] = field(default_factory=list)
    test: list[Dataset] = field(default_factory=list)
    compute_metrics: Callable[[Any], dict[str, float]] | None = None
    preprocess_logits: Callable[[Any, Any], Any] | None = None
    written: Callable[[Any], list[str]] | None = None


def check_length(name: str, length: int, tokenizer: PreTrainedTokenizerBase, config: Any) -> None:
    """Check that a model takes texts of `length` tokens.

    Raises:
        UsageError: they are too long for the tokenizer or the model's positions.
    """
    positions = getattr(config, "max_position_embeddings", None)
    most = min(tokenizer.model_max_length, positions or tokenizer.model_max_length)
    if length > most:
        raise UsageError(f"`{name}` must be at most {most} for this model, got {length}.")


def new_model_settings(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return what the configuration of a new model takes over from its tokenizer."""
    settings = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id or tokenizer.eos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    return {name: value for name, value in settings.items() if value is not None}
