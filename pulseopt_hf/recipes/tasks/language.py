"""Language models: the next word (causal), or words that were masked."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from datasets import Dataset
from transformers import DataCollatorForLanguageModeling, default_data_collator

from pulseopt_hf.errors import UsageError
from pulseopt_hf.recipes import metrics, models
from pulseopt_hf.recipes.keys import RecipeArguments, RecipeTrainingArguments
from pulseopt_hf.recipes.splits import Split, need
from pulseopt_hf.recipes.tasks import Task

LONGEST_BLOCK = 1024  # tokens, unless the recipe sets `block_size`


def prepare(
    recipe: RecipeArguments, training: RecipeTrainingArguments, splits: list[Split]
) -> Task:
    """Prepare a causal or masked language model."""
    need(splits, recipe.text_column)
    masked = recipe.task == "masked-lm"
    tokenizer = models.load_tokenizer(recipe)
    config = models.load_config(recipe, **models.new_model_settings(recipe, tokenizer))
    if masked and tokenizer.mask_token is None:
        raise UsageError("`task: masked-lm` needs a tokenizer with a mask token; this has none.")
    if recipe.separate_texts and tokenizer.eos_token_id is None:
        raise UsageError("`separate_texts` needs a tokenizer with an end-of-text token.")
    positions = getattr(config, "max_position_embeddings", None) or LONGEST_BLOCK
    block = recipe.block_size or min(LONGEST_BLOCK, tokenizer.model_max_length, positions)
    models.need_length("block_size", block, tokenizer, config)

    def to_blocks(batch: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        ids = tokenizer(batch[recipe.text_column], return_attention_mask=False)["input_ids"]
        if recipe.separate_texts:
            ids = [[*text, tokenizer.eos_token_id] for text in ids]
        joined = list(chain.from_iterable(ids))
        blocks = [joined[i : i + block] for i in range(0, len(joined) - block + 1, block)]
        if masked:
            return {"input_ids": blocks}
        # Nothing predicts a block's first token. Trainer divides by the labels it counts, before
        # the shift: with the first among them its losses would come out 1/block too small.
        return {"input_ids": blocks, "labels": [[-100, *block[1:]] for block in blocks]}

    def examples(split: Split) -> Dataset:
        columns = split.rows.column_names
        result = split.rows.map(
            to_blocks, batched=True, remove_columns=columns, load_from_cache_file=False
        )
        if not len(result):
            raise UsageError(
                f"{split.origin}: its text makes no block of {block} tokens; set a smaller "
                "`block_size`."
            )
        return result

    def token_losses(logits: Any, labels: torch.Tensor) -> torch.Tensor:
        logits = logits[0] if isinstance(logits, tuple) else logits
        return _losses(logits, labels) if masked else _losses(logits[:, :-1], labels[:, 1:])

    collator: Any = default_data_collator
    if masked:
        share = recipe.mlm_probability
        collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=share)
    return Task(
        config=config,
        processing_class=tokenizer,
        examples=examples,
        settings={
            "data_collator": collator,
            "compute_metrics": _perplexity if recipe.metrics else None,
            "preprocess_logits_for_metrics": token_losses,
        },
    )


def _perplexity(prediction: Any) -> dict[str, float]:
    losses, tokens = prediction[0][:, 0], prediction[0][:, 1]
    return metrics.compute(["perplexity"], losses, tokens)


def _losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Reduce each example to two numbers, so that evaluation never keeps the logits.

    Args:
        logits: shape (batch, tokens, vocabulary).
        labels: shape (batch, tokens), -100 where nothing is predicted.

    Returns:
        The sum of its token losses and their number, shape (batch, 2), float64.
    """
    result = []
    for one, targets in zip(logits, labels, strict=True):
        loss = torch.nn.functional.cross_entropy(one.float(), targets, reduction="sum")
        result.append(torch.stack([loss.double(), (targets != -100).sum().double()]))
    return torch.stack(result)
