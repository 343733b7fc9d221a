"""Models and tokenizers of a recipe, checked against its task before a run begins.

What is missing or does not fit is named in a `UsageError`.
"""

from __future__ import annotations

import os
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D

from pulseopt_hf import embedded
from pulseopt_hf.errors import UsageError, nearest, needs_extra, usage_error
from pulseopt_hf.recipes.keys import TASKS, RecipeArguments


def model_folder(recipe: RecipeArguments) -> str | None:
    """Return where the pretrained model lies: a hub name or a folder."""
    name = recipe.model_name_or_path
    if name is None or not name.startswith("embedded:"):
        return name
    if name != "embedded:minilm":
        raise UsageError(f"`model_name_or_path`: there is no `{name}`, only `embedded:minilm`.")
    with usage_error("`model_name_or_path`", FileNotFoundError):
        return str(embedded.minilm_folder())


def check(recipe: RecipeArguments) -> None:
    """Check a model that is not on the hub, without loading its weights."""
    folder = model_folder(recipe)
    if folder is None or os.path.isdir(folder):
        load_config(recipe)


def load_config(recipe: RecipeArguments, **settings: Any) -> Any:
    """Load or make the model's configuration with the task's settings; check that it fits."""
    folder, kind = model_folder(recipe), str(recipe.model_type)
    if folder is None:
        with usage_error(f"`model_type`: `{kind}` cannot be made{nearest(kind, CONFIG_MAPPING)}"):
            own = dict(recipe.model_config or {})  # type: ignore[arg-type]
            config = AutoConfig.for_model(kind, **{**own, **settings})
    else:
        with usage_error(
            f"`model_name_or_path`: {folder} could not be loaded from a folder, the hub or its "
            "local cache"
        ):
            config = AutoConfig.from_pretrained(folder, **source(recipe), **settings)
    _check_fits(recipe, config)
    return config


def load_model(recipe: RecipeArguments, config: Any) -> Any:
    """Load the weights, or initialise new ones, and add LoRA if the recipe has it."""
    auto = getattr(transformers, TASKS[recipe.task].model)
    folder = model_folder(recipe)
    if folder is None:
        model = auto.from_config(config)
    else:
        with usage_error(f"`model_name_or_path`: {folder}", OSError):
            model = auto.from_pretrained(folder, config=config, **source(recipe))
    lora = lora_config(recipe)
    if lora is None:
        return model
    from peft import get_peft_model

    # As peft finds out by itself, with a warning.
    lora.fan_in_fan_out = any(isinstance(module, Conv1D) for module in model.modules())
    with usage_error("`lora_target_modules`", ValueError):
        return get_peft_model(model, lora)


def lora_config(recipe: RecipeArguments) -> Any:
    """Return peft's configuration of a recipe's LoRA, or `None` where it has none."""
    if recipe.lora_r is None:
        return None
    with needs_extra("`lora_r`", "recipes"):
        from peft import LoraConfig
    return LoraConfig(
        task_type=TASKS[recipe.task].peft,
        r=recipe.lora_r,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        target_modules=recipe.lora_target_modules or None,
    )


def source(recipe: RecipeArguments) -> dict[str, Any]:
    """Return the revision of a model to load, and whether its own code may run."""
    return {"revision": recipe.model_revision, "trust_remote_code": recipe.trust_remote_code}


def load_tokenizer(recipe: RecipeArguments) -> PreTrainedTokenizerBase:
    """Load the tokenizer, or train the embedded one, with the recipe's pad token."""
    name = recipe.tokenizer_name or model_folder(recipe)
    if name == "embedded:bpe":
        return embedded.train_tokenizer()
    key = "tokenizer_name" if recipe.tokenizer_name else "model_name_or_path"
    with usage_error(f"`{key}`: {name} has no tokenizer that could be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(name, **source(recipe))
    if recipe.pad_token is not None:
        if recipe.pad_token not in tokenizer.get_vocab():
            raise UsageError(f"`pad_token`: {recipe.pad_token!r} is not a token of {name}.")
        tokenizer.pad_token = recipe.pad_token
    return tokenizer


def new_model_settings(
    recipe: RecipeArguments, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """Return what the configuration of a new model takes over from its tokenizer."""
    settings = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id or tokenizer.eos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    is_new = recipe.model_type is not None
    return {name: value for name, value in settings.items() if is_new and value is not None}


def need_pad_token(tokenizer: PreTrainedTokenizerBase, config: Any) -> None:
    """Refuse a tokenizer without a pad token, which batches of texts need."""
    if tokenizer.pad_token_id is None:
        example = tokenizer.eos_token or tokenizer.unk_token or next(iter(tokenizer.get_vocab()))
        raise UsageError(
            "`pad_token`: the tokenizer has none, and batches of texts need one; name a token of "
            f"its vocabulary, such as `pad_token: {example!r}`."
        )
    if getattr(config, "pad_token_id", None) is None or config.model_type == "gpt2":
        config.pad_token_id = tokenizer.pad_token_id


def need_length(key: str, length: int, tokenizer: PreTrainedTokenizerBase, config: Any) -> None:
    """Refuse texts that are too long for the tokenizer or the model's positions."""
    positions = getattr(config, "max_position_embeddings", None)
    most = min(tokenizer.model_max_length, positions or tokenizer.model_max_length)
    if length > most:
        raise UsageError(f"`{key}` must be at most {most} for this model, got {length}.")


def _check_fits(recipe: RecipeArguments, config: Any) -> None:
    fitting = getattr(modeling_auto, f"MODEL_FOR_{TASKS[recipe.task].fitting}_MAPPING_NAMES")
    kind = config.model_type
    if kind not in fitting and not (
        recipe.trust_remote_code and getattr(config, "auto_map", None)  # code of its own
    ):
        key = "model_name_or_path" if recipe.model_type is None else "model_type"
        raise UsageError(
            f"`{key}`: a `{kind}` model does not fit `task: {recipe.task}`; types that do are "
            f"{', '.join(sorted(fitting)[:6])} and {len(fitting) - 6} more."
        )
    # An encoder sees the tokens that it is to predict: its perplexity would be a false 1.
    encoder = kind in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    encoder &= kind not in modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    if recipe.task == "causal-lm" and encoder and not getattr(config, "is_decoder", False):
        raise UsageError(
            f"`task: causal-lm` does not fit the encoder `{kind}`, which sees the words that it is "
            "to predict; use `task: masked-lm`."
        )
