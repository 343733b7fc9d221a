"""A text to another text."""

from __future__ import annotations

from typing import Any

import numpy as np
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq

from pulseopt_hf import PulseOptSeq2SeqTrainer
from pulseopt_hf.recipes import metrics, models
from pulseopt_hf.recipes.keys import RecipeArguments, RecipeTrainingArguments
from pulseopt_hf.recipes.splits import Split, need
from pulseopt_hf.recipes.tasks import Task


def prepare(
    recipe: RecipeArguments, training: RecipeTrainingArguments, splits: list[Split]
) -> Task:
    """Prepare a translation, a summary or the like."""
    target = str(recipe.target_column)
    need(splits, recipe.text_column, target=target)
    tokenizer = models.load_tokenizer(recipe)
    settings = models.new_model_settings(recipe, tokenizer)
    if settings:
        settings["decoder_start_token_id"] = tokenizer.pad_token_id
    config = models.load_config(recipe, **settings)
    models.need_pad_token(tokenizer, config)
    longest, longest_target = recipe.max_length, recipe.max_target_length
    models.need_length("max_length", longest, tokenizer, config)
    models.need_length("max_target_length", longest_target, tokenizer, config)

    def tokenize(batch: dict[str, list[str]]) -> dict[str, Any]:
        texts = [recipe.source_prefix + text for text in batch["text"]]
        limits = {"truncation": True, "max_length": longest}
        made = dict(tokenizer(texts, return_token_type_ids=False, **limits))
        if "target" in batch:
            limits["max_length"] = longest_target
            made["labels"] = tokenizer(text_target=batch["target"], **limits)["input_ids"]
        else:
            # Seq2SeqTrainer calls the model even where there is nothing to compare with, and T5
            # refuses to be called without labels (transformers 5.23). Nothing reads these.
            made["labels"] = [[tokenizer.pad_token_id] for _ in texts]
        return made

    def examples(split: Split) -> Dataset:
        rows = {"text": split.texts(recipe.text_column)}
        if split.role != "test":
            rows["target"] = split.texts(target)
        return Dataset.from_dict(rows).map(tokenize, batched=True, remove_columns=list(rows))

    def decode(ids: Any) -> list[str]:
        ids = ids[0] if isinstance(ids, tuple) else ids
        filled = np.where(ids < 0, tokenizer.pad_token_id, ids)
        return [text.strip() for text in tokenizer.batch_decode(filled, skip_special_tokens=True)]

    def trainer(model: Any, **settings: Any) -> PulseOptSeq2SeqTrainer:
        collator = DataCollatorForSeq2Seq(tokenizer, model=model)
        return PulseOptSeq2SeqTrainer(model, data_collator=collator, **settings)

    return Task(
        config=config,
        processing_class=tokenizer,
        examples=examples,
        settings={"compute_metrics": metrics.computing(recipe.metrics, decode, decode)},
        trainer_class=trainer,
        # One line per example: a newline would make two.
        to_lines=lambda ids: [" ".join(text.split()) for text in decode(ids)],
    )
