"""One or two texts to a class, or to a number."""

from __future__ import annotations

from typing import Any

import numpy as np
from datasets import Dataset
from transformers import DataCollatorWithPadding

from pulseopt_hf.errors import UsageError
from pulseopt_hf.recipes import labels, metrics, models
from pulseopt_hf.recipes.data import Part, Parts
from pulseopt_hf.recipes.fields import RecipeArguments, RecipeTrainingArguments
from pulseopt_hf.recipes.tasks.prepared import Prepared, check_length, new_model_settings


def prepare(recipe: RecipeArguments, training: RecipeTrainingArguments, parts: Parts) -> Prepared:
    """See `tasks.prepare`."""
    columns = [recipe.text_column, *([recipe.text_pair_column] if recipe.text_pair_column else [])]
    problems: list[str] = []
    for part in parts.all:
        try:
            part.need(columns if part in parts.test else [*columns, recipe.label_column])
        except UsageError as error:
            problems += error.problems
    if problems:
        raise UsageError(*problems)
    regression = recipe.task == "text-regression"
    names = [] if regression else labels.class_names(recipe, parts)
    targets: dict[int, list[Any]] = {}
    for part in [part for part in parts.all if part not in parts.test]:
        targets[id(part)] = (
            labels.label_values(recipe, part)
            if regression
            else labels.class_indices(recipe, part, names)
        )
    tokenizer = models.load_tokenizer(recipe)
    settings = new_model_settings(tokenizer) if recipe.model_type else {}
    settings.update(head_settings(recipe, names))
    config = models.load_config(recipe, **settings)
    names = names or [config.id2label[i] for i in range(config.num_labels)]
    models.need_pad_token(tokenizer, config)
    check_length("max_length", recipe.max_length, tokenizer, config)

    def examples(part: Part) -> Dataset:
        read = [labels.texts(part, column) for column in columns]
        rows: dict[str, Any] = {f"text{i}": column for i, column in enumerate(read)}
        if id(part) in targets:
            rows["labels"] = targets[id(part)]
        return Dataset.from_dict(rows).map(
            lambda batch: tokenizer(
                *(batch[f"text{i}"] for i in range(len(columns))),
                truncation=True,
                max_length=recipe.max_length,
                # A model without segments would take these for words.
                return_token_type_ids=getattr(config, "type_vocab_size", 0) > 1,
            ),
            batched=True,
            remove_columns=[f"text{i}" for i in range(len(columns))],
        )

    def compute_metrics(prediction: Any) -> dict[str, float]:
        return metrics.compute(recipe.metrics, chosen(prediction[0]), prediction[1])

    def chosen(logits: Any) -> Any:
        logits = logits[0] if isinstance(logits, tuple) else logits
        return np.squeeze(logits, -1) if regression else np.argmax(logits, -1)

    def written(logits: Any) -> list[str]:
        if regression:
            bounds = recipe.label_range or (None, None)
            return [f"{value:.3f}" for value in np.clip(chosen(logits), *bounds)]
        indices = [int(index) for index in chosen(logits)]
        return [names[index] if recipe.predict_class_names else str(index) for index in indices]

    return Prepared(
        train=examples(parts.train) if parts.train else None,
        validation=[examples(part) for part in parts.validation],
        test=[examples(part) for part in parts.test],
        model=models.load_model(recipe, config),
        processing_class=tokenizer,
        collator=DataCollatorWithPadding(
            tokenizer, pad_to_multiple_of=8 if training.fp16 or training.bf16 else None
        ),
        compute_metrics=compute_metrics if recipe.metrics else None,
        written=written,
    )


def head_settings(recipe: RecipeArguments, names: list[str]) -> dict[str, Any]:
    """Return what the configuration has to know of the labels."""
    if recipe.task == "text-regression":
        return {"num_labels": 1, "problem_type": "regression"}
    if not names:
        return {}
    return {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
        "problem_type": "single_label_classification",
    }
