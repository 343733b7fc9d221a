"""One or two texts to a class, or to a number."""

from __future__ import annotations

from typing import Any

import numpy as np
from datasets import Dataset
from transformers import DataCollatorWithPadding

from pulseopt_hf.recipes import labels, metrics, models
from pulseopt_hf.recipes.keys import RecipeArguments, RecipeTrainingArguments
from pulseopt_hf.recipes.splits import Split, need
from pulseopt_hf.recipes.tasks.task import Task, class_lines, head_settings


def prepare(
    recipe: RecipeArguments, training: RecipeTrainingArguments, splits: list[Split]
) -> Task:
    """Prepare a text classification or regression."""
    columns = [name for name in (recipe.text_column, recipe.text_pair_column) if name is not None]
    need(splits, *columns, target=recipe.label_column)
    is_regression = recipe.task == "text-regression"
    names = [] if is_regression else labels.class_names(recipe, splits)
    targets: dict[Split, list[Any]] = {
        split: labels.label_values(recipe, split)
        if is_regression
        else labels.class_indices(recipe, split, names)
        for split in splits
        if split.role != "test"
    }
    tokenizer = models.load_tokenizer(recipe)
    settings = models.new_model_settings(recipe, tokenizer)
    config = models.load_config(recipe, **settings, **head_settings(recipe, names))
    names = names or [config.id2label[i] for i in range(config.num_labels)]
    models.need_pad_token(tokenizer, config)
    models.need_length("max_length", recipe.max_length, tokenizer, config)
    inputs = [f"text{i}" for i in range(len(columns))]

    def examples(split: Split) -> Dataset:
        rows: dict[str, Any] = {
            name: labels.texts(split, column) for name, column in zip(inputs, columns, strict=True)
        }
        if split in targets:
            rows["labels"] = targets[split]
        return Dataset.from_dict(rows).map(
            lambda batch: tokenizer(
                *(batch[name] for name in inputs),
                truncation=True,
                max_length=recipe.max_length,
                # A model without segments would take these for words.
                return_token_type_ids=getattr(config, "type_vocab_size", 0) > 1,
            ),
            batched=True,
            remove_columns=inputs,
        )

    def predicted(logits: Any) -> Any:
        logits = logits[0] if isinstance(logits, tuple) else logits
        return np.squeeze(logits, -1) if is_regression else np.argmax(logits, -1)

    def to_lines(logits: Any) -> list[str]:
        if not is_regression:
            return class_lines(recipe, names, predicted(logits))
        bounds = recipe.label_range or (None, None)
        return [f"{value:.3f}" for value in np.clip(predicted(logits), *bounds)]

    multiple = 8 if training.fp16 or training.bf16 else None
    return Task(
        config=config,
        processing_class=tokenizer,
        examples=examples,
        collator=lambda model: DataCollatorWithPadding(tokenizer, pad_to_multiple_of=multiple),
        compute_metrics=metrics.computing(recipe.metrics, predicted),
        to_lines=to_lines,
    )
