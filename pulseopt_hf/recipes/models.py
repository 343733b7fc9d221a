"""Models and tokenizers of a recipe, checked against its task before a run begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.auto import modeling_auto

from pulseopt_hf import embedded
from pulseopt_hf.errors import UsageError, nearest, one_line
from pulseopt_hf.recipes.fields import RecipeArguments

_AUTO = {
    "text-classification": ("AutoModelForSequenceClassification", "SEQUENCE_CLASSIFICATION"),
    "text-regression": ("AutoModelForSequenceClassification", "SEQUENCE_CLASSIFICATION"),
    "causal-lm": ("AutoModelForCausalLM", "CAUSAL_LM"),
    "masked-lm": ("AutoModelForMaskedLM", "MASKED_LM"),
    "seq2seq": ("AutoModelForSeq2SeqLM", "SEQ_TO_SEQ_CAUSAL_LM"),
    "image-classification": ("AutoModelForImageClassification", "IMAGE_CLASSIFICATION"),
}
_PEFT_TASK = {
    "text-classification": "SEQ_CLS",
    "text-regression": "SEQ_CLS",
    "causal-lm": "CAUSAL_LM",
    "seq2seq": "SEQ_2_SEQ_LM",
}


def model_folder(recipe: RecipeArguments) -> str | None:
    """Return where the pretrained model lies: a hub name or a folder.

    Raises:
        UsageError: it is an embedded model that is not there.
    """
    name = recipe.model_name_or_path
    if name is None or not name.startswith("embedded:"):
        return name
    if name != "embedded:minilm":
        raise UsageError(f"`model_name_or_path`: there is no `{name}`, only `embedded:minilm`.")
    try:
        return str(embedded.minilm_folder())
    except FileNotFoundError as error:
        raise UsageError(str(error)) from error


def check(recipe: RecipeArguments) -> None:
    """Check a model that is not on the hub, without loading its weights.

    Raises:
        UsageError: there is no such model, or it is of a type that cannot do the task.
    """
    folder = model_folder(recipe)
    if folder is None or Path(folder).is_dir():
        load_config(recipe)


def load_config(recipe: RecipeArguments, **settings: Any) -> Any:
    """Load or make the model's configuration, and check that it fits the task.

    Args:
        recipe: the recipe.
        **settings: what the task sets in it, such as `num_labels`.

    Raises:
        UsageError: there is no such model, or it is of a type that cannot do the task.
    """
    folder = model_folder(recipe)
    try:
        if folder is None:
            own = dict(recipe.model_config or {})  # type: ignore[arg-type]
            config = AutoConfig.for_model(str(recipe.model_type), **{**own, **settings})
        else:
            config = AutoConfig.from_pretrained(
                folder,
                revision=recipe.model_revision,
                trust_remote_code=recipe.trust_remote_code,
                **settings,
            )
    except Exception as error:  # the hub's client and the configurations have many kinds
        if folder is None:
            types = list(CONFIG_MAPPING)
            raise UsageError(
                f"`model_type`: `{recipe.model_type}` cannot be made"
                f"{nearest(str(recipe.model_type), types) or ':'} {one_line(error)}"
            ) from error
        raise UsageError(
            f"`model_name_or_path`: {folder} could not be loaded from a folder, the hub or its "
            f"local cache: {one_line(error)}"
        ) from error
    _check_fits(recipe, config)
    return config


def load_model(recipe: RecipeArguments, config: Any) -> Any:
    """Load the weights, or draw new ones; with LoRA where the recipe has it.

    Raises:
        UsageError: the weights are missing, or LoRA does not fit.
    """
    auto = getattr(transformers, _AUTO[recipe.task][0])
    folder = model_folder(recipe)
    if folder is None:
        model = auto.from_config(config)
    else:
        try:
            model = auto.from_pretrained(
                folder,
                config=config,
                revision=recipe.model_revision,
                trust_remote_code=recipe.trust_remote_code,
            )
        except OSError as error:
            raise UsageError(f"`model_name_or_path`: {folder}: {one_line(error)}") from error
    return model if recipe.lora_r is None else _with_lora(recipe, model)


def load_tokenizer(recipe: RecipeArguments) -> PreTrainedTokenizerBase:
    """Load the tokenizer, or train the embedded one; with the recipe's pad token.

    Raises:
        UsageError: it is missing, or the pad token is no token of it.
    """
    name = recipe.tokenizer_name or model_folder(recipe)
    if name is None:
        raise UsageError("`tokenizer_name` must be set for a new model; `embedded:bpe` will do.")
    if name == "embedded:bpe":
        return embedded.train_tokenizer()
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=recipe.model_revision, trust_remote_code=recipe.trust_remote_code
        )
    except Exception as error:  # as in `load_config`
        key = "tokenizer_name" if recipe.tokenizer_name else "model_name_or_path"
        raise UsageError(
            f"`{key}`: {name} has no tokenizer that could be loaded: {one_line(error)}"
        ) from error
    if recipe.pad_token is not None:
        if recipe.pad_token not in tokenizer.get_vocab():
            raise UsageError(f"`pad_token`: {recipe.pad_token!r} is not a token of {name}.")
        tokenizer.pad_token = recipe.pad_token
    return tokenizer


def need_pad_token(tokenizer: PreTrainedTokenizerBase, config: Any) -> None:
    """Check that texts of different lengths can be put into one batch.

    Raises:
        UsageError: the tokenizer has no pad token.
    """
    if tokenizer.pad_token_id is None:
        example = tokenizer.eos_token or tokenizer.unk_token or next(iter(tokenizer.get_vocab()))
        raise UsageError(
            "`pad_token`: the tokenizer has none, and batches of texts need one; name a token of "
            f"its vocabulary, such as `pad_token: {example!r}`."
        )
    if getattr(config, "pad_token_id", None) is None or config.model_type == "gpt2":
        config.pad_token_id = tokenizer.pad_token_id


def _check_fits(recipe: RecipeArguments, config: Any) -> None:
    mapping = f"MODEL_FOR_{_AUTO[recipe.task][1]}_MAPPING_NAMES"
    fitting = getattr(modeling_auto, mapping)
    kind = config.model_type
    own_code = recipe.trust_remote_code and getattr(config, "auto_map", None)
    if kind not in fitting and not own_code:
        raise UsageError(
            f"`model_name_or_path`: a `{kind}` model does not fit `task: {recipe.task}`; types "
            f"that do are {', '.join(sorted(fitting)[:6])} and {len(fitting) - 6} more."
            if recipe.model_type is None
            else f"`model_type`: a `{kind}` model does not fit `task: {recipe.task}`."
        )
    # An encoder sees the tokens that it is to predict: its perplexity would be a false 1.
    encoder = kind in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    encoder &= kind not in modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    if recipe.task == "causal-lm" and encoder and not getattr(config, "is_decoder", False):
        raise UsageError(
            f"`task: causal-lm` does not fit the encoder `{kind}`, which sees the words that it is "
            "to predict; use `task: masked-lm`."
        )


def _with_lora(recipe: RecipeArguments, model: Any) -> Any:
    if recipe.task not in _PEFT_TASK:
        raise UsageError(f"`lora_r` does not go with `task: {recipe.task}`; leave it out.")
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise UsageError("`lora_r` needs `pip install 'pulseopt-hf[recipes]'`.") from error
    config = LoraConfig(
        task_type=_PEFT_TASK[recipe.task],
        r=int(recipe.lora_r or 0),
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        target_modules=recipe.lora_target_modules or None,
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise UsageError(f"`lora_target_modules`: {one_line(error)}") from error
