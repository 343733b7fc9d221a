"""One or two texts to a class, or to a number."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from transformers import DataCollatorWithPadding

from pulseopt_hf.recipes import metrics, models
from pulseopt_hf.recipes.keys import RecipeArguments, RecipeTrainingArguments
from pulseopt_hf.recipes.labels import Labels
from pulseopt_hf.recipes.splits import Split, need
from pulseopt_hf.recipes.tasks import Task


def prepare(
    recipe: RecipeArguments, training: RecipeTrainingArguments, splits: list[Split]
) -> Task:
    """Prepare a text classification or regression."""
    columns = [name for name in (recipe.text_column, recipe.text_pair_column) if name is not None]
    need(splits, *columns, target=recipe.label_column)
    labels = Labels(recipe, splits)
    tokenizer = models.load_tokenizer(recipe)
    config = labels.load_config(**models.new_model_settings(recipe, tokenizer))
    models.need_pad_token(tokenizer, config)
    models.need_length("max_length", recipe.max_length, tokenizer, config)
    inputs = [f"text{i}" for i in range(len(columns))]

    def examples(split: Split) -> Dataset:
        rows: dict[str, list[Any]] = dict(zip(inputs, map(split.texts, columns), strict=True))
        if split in labels.of:
            rows["labels"] = labels.of[split]
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

    multiple = 8 if training.fp16 or training.bf16 else None
    return Task(
        config=config,
        processing_class=tokenizer,
        examples=examples,
        settings={
            "data_collator": DataCollatorWithPadding(tokenizer, pad_to_multiple_of=multiple),
            "compute_metrics": metrics.computing(recipe.metrics, labels.predicted),
        },
        to_lines=labels.to_lines,
    )
