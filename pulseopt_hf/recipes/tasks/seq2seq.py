"""A text to another text."""

from __future__ import annotations

from typing import Any

import numpy as np
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq

from pulseopt_hf.errors import UsageError
from pulseopt_hf.recipes import labels, metrics, models
from pulseopt_hf.recipes.data import Part, Parts
from pulseopt_hf.recipes.fields import RecipeArguments, RecipeTrainingArguments
from pulseopt_hf.recipes.tasks.prepared import Prepared, check_length, new_model_settings


def prepare(recipe: RecipeArguments, training: RecipeTrainingArguments, parts: Parts) -> Prepared:
    """See `tasks.prepare`."""
    if (recipe.metrics or training.do_predict) and not training.predict_with_generate:
        raise UsageError(
            "`metrics` and `do_predict` of `seq2seq` look at generated text; set "
            "`predict_with_generate: true`."
        )
    target = recipe.target_column
    assert target is not None  # `RecipeArguments` checks it
    for part in parts.all:
        part.need([recipe.text_column] if part in parts.test else [recipe.text_column, target])
    tokenizer = models.load_tokenizer(recipe)
    settings = new_model_settings(tokenizer) if recipe.model_type else {}
    if settings:
        settings["decoder_start_token_id"] = tokenizer.pad_token_id
    config = models.load_config(recipe, **settings)
    models.need_pad_token(tokenizer, config)
    check_length("max_length", recipe.max_length, tokenizer, config)
    check_length("max_target_length", recipe.max_target_length, tokenizer, config)

    def examples(part: Part) -> Dataset:
        rows = {"text": labels.texts(part, recipe.text_column)}
        if part not in parts.test:
            rows["target"] = labels.texts(part, target)

        def tokenize(batch: dict[str, list[str]]) -> dict[str, Any]:
            prefixed = [recipe.source_prefix + text for text in batch["text"]]
            made = dict(
                tokenizer(
                    prefixed,
                    truncation=True,
                    max_length=recipe.max_length,
                    return_token_type_ids=False,
                )
            )
            if "target" in batch:
                made["labels"] = tokenizer(
                    text_target=batch["target"],
                    truncation=True,
                    max_length=recipe.max_target_length,
                )["input_ids"]
            else:
                # Seq2SeqTrainer calls the model even where there is nothing to compare with, and
                # T5 refuses to be called without (transformers 5.23). Nothing reads this.
                made["labels"] = [[tokenizer.pad_token_id] for _ in prefixed]
            return made

        return Dataset.from_dict(rows).map(tokenize, batched=True, remove_columns=list(rows))

    def decode(ids: Any) -> list[str]:
        ids = ids[0] if isinstance(ids, tuple) else ids
        filled = np.where(ids < 0, tokenizer.pad_token_id, ids)
        return [text.strip() for text in tokenizer.batch_decode(filled, skip_special_tokens=True)]

    def compute_metrics(prediction: Any) -> dict[str, float]:
        return metrics.compute(recipe.metrics, decode(prediction[0]), decode(prediction[1]))

    model = models.load_model(recipe, config)
    return Prepared(
        train=examples(parts.train) if parts.train else None,
        validation=[examples(part) for part in parts.validation],
        test=[examples(part) for part in parts.test],
        model=model,
        processing_class=tokenizer,
        collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        compute_metrics=compute_metrics if recipe.metrics else None,
        # One line an example: a newline would make two.
        written=lambda ids: [" ".join(text.split()) for text in decode(ids)],
    )
