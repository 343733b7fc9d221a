"""Set the LR found beside a tenth, a third and three times of it, for other models and optimizers.

    python -m benchmarks.other_kinds [--kinds t5,...] [--steps 300] [--out FOLDER] [--write]

Nothing in the package was set by looking at these runs, and nothing is downloaded: they use the
help texts of CPython, scikit-learn's digits, lists of numbers to be sorted, and the MiniLM weights
of the extra `[demo]`. All runs of a kind cost the same. What was run before is kept in `--out` and
not run again. `--write` puts what is there into `benchmarks/results/other-kinds.json`.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from benchmarks import common
from pulseopt_hf import PulseOptTrainer, embedded
from pulseopt_hf.compare.cells import steps_after_calibration
from pulseopt_hf.compare.summary import markdown
from pulseopt_hf.files import write_whole
from pulseopt_hf.recipes.folder import versions

OUT = Path("runs/other-kinds")
RESULT = common.RESULTS / "other-kinds.json"
FACTORS = (0.1, 0.3, 3.0)  # of the LR found, tried as static LRs
BATCH = 16
UNTOUCHED = 5e-5
NUMBERS, LENGTH, END = 64, 8, 1  # tokens of a list, their count, and the token that ends it

# What makes a model, its training and its validation rows, and what makes a batch of them.
Kind = tuple[Callable[[], Any], Any, Any, Any]


def _pretrained(head: str, adapter: Any = None, **settings: Any) -> Any:
    """Load two layers of MiniLM with a new head, and an adapter if one is given."""
    auto = getattr(transformers, f"AutoModelFor{head}")
    model = auto.from_pretrained(embedded.minilm_folder(), num_hidden_layers=2, **settings)
    return model if adapter is None else peft.get_peft_model(model, adapter)


def _texts(label: Callable[[str, dict[str, Any]], Any]) -> tuple[Any, ...]:
    """Return the sentences of the help texts with what `label` makes of each, and the tokenizer.

    That is the label, or a mapping where there are several.
    """
    tokenizer = AutoTokenizer.from_pretrained(embedded.minilm_folder())

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        found = dict(tokenizer(row["text"], truncation=True, max_length=48))
        made = label(row["text"], found)
        return {**found, **(made if isinstance(made, dict) else {"labels": made})}

    rows = embedded.language_modelling().map(encode, remove_columns="text")
    return rows["train"], rows["validation"], tokenizer


def regression() -> Kind:
    """How many long words a sentence has."""
    *rows, tokenizer = _texts(lambda text, _: sum(len(w) > 5 for w in text.split()) / 3 - 1)
    new_model = partial(_pretrained, "SequenceClassification", num_labels=1)
    return new_model, *rows, DataCollatorWithPadding(tokenizer)


def token_classes() -> Kind:
    """The kind of each word, by its last letters."""
    endings = ("ing", "s", "ed", "e")

    def label(_: str, found: dict[str, Any]) -> list[int]:
        words = tokenizer.convert_ids_to_tokens(found["input_ids"])
        matches = [[i for i, end in enumerate(endings, 1) if word.endswith(end)] for word in words]
        return [match[0] if match else 0 for match in matches]

    tokenizer = AutoTokenizer.from_pretrained(embedded.minilm_folder())
    *rows, _ = _texts(label)
    new_model = partial(_pretrained, "TokenClassification", num_labels=len(endings) + 1)
    return new_model, *rows, DataCollatorForTokenClassification(tokenizer)


def spans() -> Kind:
    """Where the rarest token of a sentence is, as in question answering."""

    def label(_: str, found: dict[str, Any]) -> dict[str, int]:
        tokens = found["input_ids"]
        place = max(range(1, len(tokens) - 1), key=tokens.__getitem__)
        return {"start_positions": place, "end_positions": place + 1}

    *rows, tokenizer = _texts(label)
    return partial(_pretrained, "QuestionAnswering"), *rows, DataCollatorWithPadding(tokenizer)


def adapter(config: type[Any], **settings: Any) -> Kind:
    """Whether a sentence has the word "the", by an adapter and a new head on frozen weights."""
    *rows, tokenizer = _texts(lambda text, _: int("the" in text.lower().split()))
    own = config(task_type="SEQ_CLS", **settings)
    new_model = partial(_pretrained, "SequenceClassification", own, num_labels=2)
    return new_model, *rows, DataCollatorWithPadding(tokenizer)


def language(name: str, **settings: Any) -> Kind:
    """A causal language model from scratch."""
    tokenizer = embedded.train_tokenizer()
    rows = embedded.language_modelling().map(
        lambda row: tokenizer(row["text"], truncation=True, max_length=64), remove_columns="text"
    )
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    own = {"vocab_size": len(tokenizer), "pad_token_id": 0, **settings}
    return partial(_new, name, "ForCausalLM", **own), rows["train"], rows["validation"], collator


def sorting(name: str, **settings: Any) -> Kind:
    """Sort a list of numbers: an encoder-decoder from scratch."""
    drawn = torch.Generator().manual_seed(0)
    rows = torch.randint(2, NUMBERS, (6800, LENGTH), generator=drawn)

    def made(part: Tensor) -> Dataset:
        ends = torch.full((len(part), 1), END)
        columns = {"input_ids": part, "labels": part.sort(dim=1).values}
        return Dataset.from_dict(
            {key: torch.cat([value, ends], dim=1).tolist() for key, value in columns.items()}
        )

    own = {"vocab_size": NUMBERS, "pad_token_id": 0, "decoder_start_token_id": 0, "bos_token_id": 0}
    new_model = partial(_new, name, "ForConditionalGeneration", **own, eos_token_id=END, **settings)
    return new_model, made(rows[:6400]), made(rows[6400:]), default_data_collator


def digits(new_model: Callable[[], Any]) -> Kind:
    """Scikit-learn's digits."""

    def pixels(row: dict[str, Any]) -> dict[str, Any]:
        image = torch.tensor(row["image"]) / 127.5 - 1.0
        return {"pixel_values": image[None].tolist(), "labels": row["label"]}

    data = embedded.digits()
    rows = [data[part].map(pixels, remove_columns=["image", "label"]) for part in data]
    return new_model, *rows, default_data_collator


class Recurrent(nn.Module):
    """An LSTM over the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.LSTM(8, 64, batch_first=True)
        self.head = nn.Linear(64, 10)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the loss, shape (), and the logits, shape (rows, classes)."""
        states, _ = self.recurrent(pixel_values[:, 0])
        logits = self.head(states[:, -1])
        return {"loss": functional.cross_entropy(logits, labels), "logits": logits}


def _new(name: str, head: str, **settings: Any) -> Any:
    config = getattr(transformers, f"{name}Config")(**settings)
    return getattr(transformers, f"{name}{head}")(config)


_IMAGE = {"num_channels": 1, "num_labels": 10}
_VIT = {"image_size": 8, "patch_size": 2, "hidden_size": 64, "num_hidden_layers": 3}
_BART = {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 128}
_ATTENTION = {"target_modules": ["query", "value"]}
_HEADS = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_ffn_dim": 128}
_GATED = {"hidden_size": 96, "num_attention_heads": 4, "intermediate_size": 256}
_RESNET = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic"}
KINDS: dict[str, Callable[[], Kind]] = {
    "regression": regression,
    "token_classes": token_classes,
    "spans": spans,
    "lora": partial(adapter, peft.LoraConfig, r=8, **_ATTENTION),
    "dora": partial(adapter, peft.LoraConfig, r=8, use_dora=True, **_ATTENTION),
    "ia3": partial(
        adapter, peft.IA3Config, feedforward_modules=[], target_modules=["key", "value"]
    ),
    "prompt": partial(adapter, peft.PromptTuningConfig, num_virtual_tokens=8),
    "llama": partial(language, "Llama", num_hidden_layers=3, **_GATED),
    "mixtral": partial(
        language,
        "Mixtral",
        **{**_GATED, "num_hidden_layers": 2, "num_key_value_heads": 2, "num_local_experts": 4},
    ),
    "mamba": partial(language, "Mamba", hidden_size=64, num_hidden_layers=2, state_size=8),
    "t5": partial(sorting, "T5", d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4),
    "bart": partial(sorting, "Bart", max_position_embeddings=32, **_BART, **_HEADS),
    "vit": partial(
        digits,
        partial(
            *(_new, "ViT", "ForImageClassification"),
            **{**_IMAGE, **_VIT, "num_attention_heads": 4, "intermediate_size": 128},
        ),
    ),
    "resnet": partial(
        digits, partial(_new, "ResNet", "ForImageClassification", **_IMAGE, **_RESNET)
    ),
    "lstm": partial(digits, Recurrent),
}
# A kind with an optimizer that is not AdamW: Trainer's name for it, or a class of torch's.
OPTIMIZERS: dict[str, tuple[str, Any]] = {
    "llama_sgd": ("llama", "sgd"),
    "llama_adafactor": ("llama", "adafactor"),
    "llama_nadam": ("llama", torch.optim.NAdam),
    "llama_adamax": ("llama", torch.optim.Adamax),
    "llama_adadelta": ("llama", torch.optim.Adadelta),
    "lstm_sgd": ("lstm", "sgd"),
    "lstm_nadam": ("lstm", torch.optim.NAdam),
    "lstm_adamax": ("lstm", torch.optim.Adamax),
}


def train(
    kind: Kind, learning_rate: float | None, steps: int, optimizer: Any = None
) -> dict[str, Any]:
    """Train at a static LR, or by default if it is `None`, and return what came of it."""
    new_model, rows, validation, collator = kind
    named = {"optim": optimizer} if isinstance(optimizer, str) else {}
    set_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            learning_rate=UNTOUCHED if learning_rate is None else learning_rate,
            max_steps=steps,
            warmup_steps=steps // 20,
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=64,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            **named,
        )
        own = (optimizer, {"lr": arguments.learning_rate}) if isinstance(optimizer, type) else None
        trainer = (PulseOptTrainer if learning_rate is None else Trainer)(
            *(new_model(), arguments, collator, rows, validation), optimizer_cls_and_kwargs=own
        )
        if learning_rate is None:
            arguments.max_steps = steps_after_calibration(trainer, steps, BATCH)
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        after = trainer.evaluate()["eval_loss"]
        used = trainer.lr_scheduler.base_lrs[0]
    return {"lr": used, "before": before, "loss": after if math.isfinite(after) else None}


def summarise(name: str, steps: int, out: Path) -> dict[str, Any]:
    """Run what a kind lacks, and return the LR found and the losses of all its runs."""
    model, *optimizer = OPTIMIZERS.get(name, (name,))
    kind, done = KINDS[model](), {}

    def cell(what: str, learning_rate: float | None) -> dict[str, Any]:
        file = out / f"{name} {steps} {what}.json"
        if not file.exists():
            write_whole(file, json.dumps(train(kind, learning_rate, steps, *optimizer)) + "\n")
        done[what] = common.read(file)
        print(name, what, done[what], flush=True)
        return done[what]  # type: ignore[no-any-return]

    found = cell("found", None)["lr"]
    for factor in FACTORS:
        cell(f"{factor:g} x", factor * found)
    cell("untouched", UNTOUCHED)
    losses = {what: run["loss"] for what, run in done.items()}
    return {"lr": found, "before": done["found"]["before"], "losses": losses}


def to_markdown(result: dict[str, Any]) -> str:
    """Return a table with a row for each kind."""
    head = ("kind", "LR found", "untouched 5e-5", "a tenth", "a third", "**ours**", "three times")
    rows = [(*head, "excess")]
    for name, kind in result["kinds"].items():
        losses = kind["losses"]
        order = [losses["untouched"], *(losses[f"{x:g} x"] for x in FACTORS)]
        order.insert(3, losses["found"])
        best = min(loss for loss in order if loss is not None)
        excess = (losses["found"] - best) / (kind["before"] - best)
        shown = ["diverged" if loss is None else f"{loss:.3f}" for loss in order]
        rows.append((f"`{name}`", f"{kind['lr']:.1e}", *shown, f"{excess:.2f}"))
    return markdown(rows) + "\n"


def main() -> None:
    parser = common.parser(str(__doc__), RESULT)
    parser.add_argument("--kinds", default=",".join([*KINDS, *OPTIMIZERS]))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    kinds = {name: summarise(name, options.steps, options.out) for name in options.kinds.split(",")}
    result = {"versions": versions(), "steps": options.steps, "kinds": kinds}
    common.finish(result, to_markdown, options.write)


if __name__ == "__main__":
    main()
