"""Every key of a recipe: its help, its default and, in `problems`, its validation."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from transformers import Seq2SeqTrainingArguments
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)

from pulseopt_hf.config import knob
from pulseopt_hf.errors import nearest
from pulseopt_hf.trainer import PulseOptTrainingArguments


class TaskFacts(NamedTuple):
    """What is known of a task without loading what does it."""

    module: str  # of `recipes.tasks`, whose `prepare` does it
    pipeline: str | None  # what the hub calls it, if it has a name for it
    model: str  # Transformers' class of its models
    fitting: str  # Transformers' list of the model types that fit
    peft: str = ""  # what peft calls it; nothing where LoRA cannot be used
    metrics: tuple[str, ...] = ()  # what it may be measured by
    trl: str = ""  # first part of the names of TRL's classes, where TRL's Trainers do it


_CLASSES = ("accuracy", "f1", "matthews")
_SEQUENCES = ("AutoModelForSequenceClassification", "SEQUENCE_CLASSIFICATION", "SEQ_CLS")
_CAUSAL = ("AutoModelForCausalLM", "CAUSAL_LM", "CAUSAL_LM")
_SEQ2SEQ = ("AutoModelForSeq2SeqLM", "SEQ_TO_SEQ_CAUSAL_LM", "SEQ_2_SEQ_LM")
_MASKED = ("AutoModelForMaskedLM", "MASKED_LM", "")
_IMAGES = ("AutoModelForImageClassification", "IMAGE_CLASSIFICATION", "")
_TEXTS, _GENERATION = "text-classification", "text-generation"
TASKS = {
    "text-classification": TaskFacts("classification", _TEXTS, *_SEQUENCES, _CLASSES),
    "text-regression": TaskFacts("classification", _TEXTS, *_SEQUENCES, ("pearson", "spearman")),
    "causal-lm": TaskFacts("language", _GENERATION, *_CAUSAL, ("perplexity",)),
    "masked-lm": TaskFacts("language", "fill-mask", *_MASKED, ("perplexity",)),
    "seq2seq": TaskFacts("seq2seq", None, *_SEQ2SEQ, ("rouge",)),
    "image-classification": TaskFacts("images", "image-classification", *_IMAGES, _CLASSES),
    # TRL's Trainers measure by themselves.
    "sft": TaskFacts("trl", _GENERATION, *_CAUSAL, trl="SFT"),
    "dpo": TaskFacts("trl", _GENERATION, *_CAUSAL, trl="DPO"),
    "reward": TaskFacts("trl", _TEXTS, *_SEQUENCES, trl="Reward"),
    "grpo": TaskFacts("trl", _GENERATION, *_CAUSAL, trl="GRPO"),
}
TRL_TASKS = {name: task.trl for name, task in TASKS.items() if task.trl}
REWARDS = ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward")  # TRL's
COMMAND_LINE_ONLY = ("trust_remote_code", "hub_token", "resume_from_checkpoint")


@dataclass
class RecipeArguments:
    """The task, the model and the data. Trainer's keys and AEES's stand beside them, flat."""

    task: str = knob("text-classification", f"One of {', '.join(TASKS)}.")
    expected_time: str | None = knob(None, "How long the run takes, and on what; for `list`.")
    expected_score: str | None = knob(None, "The score to expect; for `list`.")

    model_name_or_path: str | None = knob(
        None, "Pretrained model: a hub name, a folder, or `embedded:minilm` (extra [demo])."
    )
    model_revision: str = knob("main", "Branch, tag or commit of the model on the hub.")
    model_type: str | None = knob(None, "Type of a new model to train from scratch, e.g. `gpt2`.")
    model_config: dict | str | None = knob(  # type: ignore[type-arg]
        None,
        "Settings of a new model that differ from its type's defaults; on a command line, JSON.",
    )
    tokenizer_name: str | None = knob(
        None, "Tokenizer, if it is not the model's: a hub name, a folder, or `embedded:bpe`."
    )
    pad_token: str | None = knob(None, "Token to pad with, for a tokenizer without a pad token.")
    trust_remote_code: bool = knob(
        False, "Run code from the model's repository; only on the command line."
    )

    lora_r: int | None = knob(None, "Rank of LoRA matrices, >= 1; if set, only these are trained.")
    lora_alpha: int = knob(16, "LoRA's scale, divided by the rank, >= 1.")
    lora_dropout: float = knob(0.1, "LoRA's dropout, in [0, 1).")
    lora_target_modules: list[str] = knob([], "Modules with LoRA matrices; if empty, peft chooses.")

    dataset_name: str | None = knob(
        None, "Data: a hub name, or `embedded:sentences`, `embedded:word_order`, `embedded:digits`."
    )
    dataset_config_name: str | None = knob(None, "Configuration of the data set on the hub.")
    dataset_revision: str | None = knob(None, "Branch, tag or commit of the data on the hub.")
    train_file: str | None = knob(
        None,
        "Local training data, in place of the hub's: csv, tsv, json, jsonl, parquet, txt, or a "
        "folder written by `save_to_disk`.",
    )
    validation_file: list[str] = knob([], "Local validation data, one file per validation set.")
    test_file: list[str] = knob([], "Local data to predict, one file per test set.")
    train_split: str = knob("train", "Split of the data set to train on.")
    validation_split: list[str] = knob(["validation"], "Splits to evaluate on.")
    test_split: list[str] = knob(["test"], "Splits to predict with `--do_predict`.")
    validation_suffixes: list[str] = knob([""], "Suffix of the metrics of each validation set.")
    validation_percentage: float | None = knob(
        None, "Without validation data, hold out this share of the training data, in (0, 50]."
    )
    max_train_samples: int | None = knob(None, "Train on at most this many rows, >= 1.")
    max_eval_samples: int | None = knob(None, "Evaluate on at most this many rows per set, >= 1.")
    max_predict_samples: int | None = knob(None, "Predict at most this many rows per set, >= 1.")

    text_column: str = knob("text", "Column of the text.")
    text_pair_column: str | None = knob(None, "Column of the second text, in two-text tasks.")
    target_column: str | None = knob(None, "Column of the target text, in seq2seq.")
    label_column: str = knob("label", "Column of the label: an index, a name or a number.")
    class_names: list[str] = knob([], "Names of the classes 0, 1, ...; if empty, the data's.")
    label_range: list[float] = knob([], "Lowest and highest label of a regression.")
    image_column: str = knob("image", "Column of the image.")
    image_size: int | None = knob(None, "Images are scaled to a square of this side, >= 1.")
    image_augmentation: bool = knob(False, "Flip and shift training images at random.")

    max_length: int = knob(128, "Longest text in tokens, >= 1; the rest is cut off.")
    block_size: int | None = knob(
        None, "Tokens per example of a language model, >= 2; if unset, the model's, at most 1024."
    )
    separate_texts: bool = knob(False, "Language models: end each text with the end-of-text token.")
    mlm_probability: float = knob(0.15, "Share of tokens that a masked LM has to guess, in (0, 1).")
    max_target_length: int = knob(128, "Longest target text in tokens, >= 1, in seq2seq.")
    source_prefix: str = knob("", "Prefix of each source text, in seq2seq.")

    reward_funcs: list[str] = knob(
        [],
        f"Reward functions of `grpo`: {', '.join(REWARDS)}, a function as `package.module.name`, "
        "or one in a local file as `rewards.py:name`.",
    )

    metrics: list[str] = knob(
        [],
        "Classes: accuracy, f1, matthews; regression: pearson, spearman; language models: "
        "perplexity; seq2seq: rouge.",
    )
    prediction_files: list[str] = knob([], "Prediction files, one per test set, e.g. `CoLA.tsv`.")
    predict_class_names: bool = knob(False, "Write class names, not indices, as predictions.")

    def __post_init__(self) -> None:
        """Read a `model_config` that a command line gives as JSON."""
        if isinstance(self.model_config, str):
            with contextlib.suppress(ValueError):
                self.model_config = json.loads(self.model_config)

    def suffix(self, index: int) -> str:
        """Return the suffix of the metrics of a validation set, counted from 0."""
        known = self.validation_suffixes
        return known[index] if index < len(known) else f"_{index + 1}"


@dataclass
class RecipeTrainingArguments(PulseOptTrainingArguments, Seq2SeqTrainingArguments):
    """Trainer's arguments and the knobs, with the defaults of a run from a recipe."""

    do_train: bool = knob(True, "Train.")
    do_eval: bool = knob(True, "Evaluate at the end.")
    report_to: list[str] = knob(["none"], "Trackers that get the logs, such as tensorboard.")
    save_total_limit: int | None = knob(2, "Number of checkpoints to keep, >= 1.")
    dataloader_pin_memory: bool | None = knob(  # type: ignore[assignment]
        None, "Pin batches in memory; if unset, this follows from whether there is an accelerator."
    )

    def __post_init__(self) -> None:
        """Set what follows from the machine; the rest is Trainer's and the knobs' own check.

        Raises:
            ValueError: an argument or a file that one names is wrong.
        """
        for key in _CONFIG_FILES:
            _check_config_file(key, getattr(self, key))
        if self.dataloader_pin_memory is None:
            import torch

            self.dataloader_pin_memory = torch.accelerator.is_available()
        super().__post_init__()


_CONFIG_FILES = ("accelerator_config", "deepspeed", "fsdp_config")  # if they are no mappings


def _check_config_file(key: str, value: Any) -> None:
    """Refuse what is neither a mapping nor a file with one; Trainer's error would not name it."""
    if not isinstance(value, str) or value.startswith("{"):
        return
    try:
        content = json.loads(Path(value).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"`{key}`: {value} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"`{key}`: {value} holds no JSON mapping.")


# What a value must be, how that is tested, and of which keys: a recipe's, and those of Trainer that
# Trainer does not check.
_BOUNDS: dict[str, tuple[Callable[[Any], bool], tuple[str, ...]]] = {
    "at least 1": (
        lambda v: v >= 1,
        (
            *("lora_r", "lora_alpha", "image_size", "max_length", "max_target_length"),
            *("max_train_samples", "max_eval_samples", "max_predict_samples"),
            *("per_device_train_batch_size", "per_device_eval_batch_size"),
            "gradient_accumulation_steps",
        ),
    ),
    "at least 2": (lambda v: v >= 2, ("block_size",)),
    "at least 1, or -1 for none": (lambda v: v >= 1 or v == -1, ("max_steps",)),
    "a number >= 0": (
        lambda v: math.isfinite(v) and v >= 0,
        ("learning_rate", "weight_decay", "seed"),
    ),
    "a number > 0": (lambda v: math.isfinite(v) and v > 0, ("num_train_epochs",)),
    "in [0, 1)": (lambda v: 0 <= v < 1, ("lora_dropout",)),
    "in (0, 1)": (lambda v: 0 < v < 1, ("mlm_probability",)),
    "in (0, 50]": (lambda v: 0 < v <= 50, ("validation_percentage",)),
    "two numbers": (lambda v: len(v) in (0, 2), ("label_range",)),
    "different names": (lambda v: len(set(v)) == len(v), ("class_names",)),
}


def problems(recipe: RecipeArguments, given: Mapping[str, Any]) -> Iterator[str]:
    """Check a recipe's keys, each alone and against each other; the knobs check themselves.

    `given` has every key that is set, Trainer's too.
    """
    for bound, (holds, keys) in _BOUNDS.items():
        for key in keys:
            if (value := given.get(key)) is not None and not holds(value):
                yield f"`{key}` must be {bound}, got {value!r}."
    task, is_new = recipe.task, recipe.model_type is not None
    if task not in TASKS:
        yield f"`task` must be one of {', '.join(TASKS)}, got {task!r}."
    fitting = TASKS[task].metrics if task in TASKS else ()
    for metric in recipe.metrics:
        if fitting and metric not in fitting:
            yield f"`metrics` of `{task}` are {', '.join(fitting)}, got {metric!r}."
    if task in TRL_TASKS:
        if recipe.model_name_or_path is None:
            yield f"`model_name_or_path` must be set in `{task}`: it trains a pretrained model."
    elif (recipe.model_name_or_path is None) != is_new:
        yield "Set one of `model_name_or_path` (pretrained) and `model_type` (a new model)."
    if not isinstance(recipe.model_config, dict | None):
        yield f"`model_config` must be a mapping, got {recipe.model_config!r}."
    elif recipe.model_config is not None and not is_new:
        yield "`model_config` is for a new model; set `model_type` too, or leave it out."
    needed = "image_size" if task == "image-classification" else "tokenizer_name"
    if is_new and getattr(recipe, needed) is None:
        hint = "; `embedded:bpe` will do" if needed == "tokenizer_name" else ""
        yield f"`{needed}` must be set for a new model{hint}."
    if task == "seq2seq" and recipe.target_column is None:
        yield "`target_column` must be set in `seq2seq`: it holds the target text."
    predicts = bool(given.get("do_predict"))
    if (
        task == "seq2seq"
        and (recipe.metrics or predicts)
        and not given.get("predict_with_generate")
    ):
        yield "`metrics` and `do_predict` of `seq2seq` need `predict_with_generate: true`."
    for key, is_set, tasks in (
        ("lora_r", recipe.lora_r is not None, {name for name in TASKS if not TASKS[name].peft}),
        ("class_names", bool(recipe.class_names), ("text-regression",)),
        ("do_predict", predicts, ("causal-lm", "masked-lm", *TRL_TASKS)),
        ("do_train: false", given.get("do_train") is False, TRL_TASKS),
        ("metrics", bool(recipe.metrics), TRL_TASKS),
        ("model_type", is_new, TRL_TASKS),
        ("reward_funcs", bool(recipe.reward_funcs), {*TASKS} - {"grpo"}),
    ):
        if is_set and task in tasks:
            yield f"`{key}` cannot be used with `task: {task}`; leave it out."
    if task == "grpo" and not recipe.reward_funcs:
        yield f"`reward_funcs` must be set in `grpo`, such as `reward_funcs: [{REWARDS[0]}]`."
    for name in recipe.reward_funcs:
        if name not in REWARDS and not {".", ":"} & set(name):
            yield (
                f"`reward_funcs`: there is no `{name}`{nearest(name, REWARDS) or '.'} There are "
                f"{', '.join(REWARDS)}; or name a function of yours as `rewards.py:{name}`."
            )
    for key in ("trust_remote_code", "allow_all_kernels"):  # of Transformers: run code of the hub's
        if key in (given.get("model_init_kwargs") or ()):
            yield f"`model_init_kwargs` must not hold `{key}`; leave it out."
    yield from _problems_of_trackers(given.get("report_to") or [])


def _problems_of_trackers(names: list[str]) -> Iterator[str]:
    known = [*INTEGRATION_TO_CALLBACK, "all", "none"]
    # Upstream's list leaves out some that are installed.
    installed = get_available_reporting_integrations()  # type: ignore[no-untyped-call]
    for name in names:
        if name not in known:
            close = nearest(name, known) or "."
            yield f"`report_to`: unknown tracker `{name}`{close} Trackers are {', '.join(known)}."
        elif name not in (*installed, "azure_ml", "comet_ml", "flyte", "all", "none"):
            yield f"`report_to`: `{name}` is not installed."
