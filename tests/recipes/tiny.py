"""Tiny models and data files of every schema, for runs of the command that take seconds."""

import csv
import json
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    set_seed,
)

from pulseopt_hf import embedded
from pulseopt_hf.cli import main
from pulseopt_hf.report.record_reader import read_run

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the files in ../shared/data")

GOOD = ["fine", "bright", "warm", "clever"]
BAD = ["dull", "cold", "stale", "clumsy"]
PLAIN = ["the", "film", "was", "a", "story", "and", "this", "scene", "looks", "very"]

# Of each GLUE task: columns of its texts, number of classes (0 for a regression), the score and
# its published value, and the files of a submission.
GLUE = {
    "cola": (["sentence"], 2, "matthews_correlation", "56.5", ["CoLA.tsv"]),
    "sst2": (["sentence"], 2, "accuracy", "92.3", ["SST-2.tsv"]),
    "mrpc": (["sentence1", "sentence2"], 2, "f1", "88.9/84.1", ["MRPC.tsv"]),
    "stsb": (["sentence1", "sentence2"], 0, "spearmanr", "88.6/88.5", ["STS-B.tsv"]),
    "qqp": (["question1", "question2"], 2, "f1", "90.7/87.5", ["QQP.tsv"]),
    "mnli": (["premise", "hypothesis"], 3, "accuracy", "83.9/84.1", ["MNLI-m.tsv", "MNLI-mm.tsv"]),
    "qnli": (["question", "sentence"], 2, "accuracy", "90.7", ["QNLI.tsv"]),
    "rte": (["sentence1", "sentence2"], 2, "accuracy", "65.7", ["RTE.tsv"]),
    "wnli": (["sentence1", "sentence2"], 2, "accuracy", "56.3", ["WNLI.tsv"]),
}
FAST = ["--use_cpu", "--quiet", "--per_device_train_batch_size", "8", "--max_steps", "15"]


def write_glue(folder: Path, name: str) -> dict[str, Path]:
    """Write `train`, `validation`, `validation2`, `test` and `test2` of a task's schema."""
    folder.mkdir(parents=True, exist_ok=True)
    columns, classes, *_ = GLUE[name]
    rng = random.Random(name)
    files = {}
    for split in ("train", "validation", "validation2", "test", "test2"):
        files[split] = folder / f"{split}.csv"
        with files[split].open("w", newline="") as file:
            writer = csv.DictWriter(file, ["idx", *columns, "label"])
            writer.writeheader()
            for index in range(32):
                grade = rng.random()
                row: dict[str, object] = {"idx": index}
                for column in columns:
                    words = rng.sample(PLAIN, 5) + [
                        rng.choice(GOOD if rng.random() < grade else BAD) for _ in range(3)
                    ]
                    row[column] = " ".join(words) + ', "as they say", .'
                label: object = int(grade * classes) if classes else round(5 * grade, 2)
                writer.writerow({**row, "label": -1 if split.startswith("test") else label})
    return files


def files_of(name: str, folder: Path) -> list[str]:
    """Write a task's files and return the options that name them."""
    files = {split: str(path) for split, path in write_glue(folder, name).items()}
    second = name == "mnli"
    return [
        *("--train_file", files["train"], "--validation_file", files["validation"]),
        *([files["validation2"]] if second else []),
        *("--test_file", files["test"], *([files["test2"]] if second else [])),
    ]


def save(folder: Path, tokenizer: Any, model: Any, config: Any, **settings: Any) -> str:
    """Write a tokenizer and a model with new weights, and return their folder."""
    tokenizer.save_pretrained(folder)
    set_seed(0)
    model(config(vocab_size=len(tokenizer), **settings)).save_pretrained(folder)
    return str(folder)


def write_bert(folder: Path) -> str:
    """Write a two-layer BERT with a word tokenizer, which knows segments, and return its folder."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *GOOD, *BAD, *PLAIN, ",", "."]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    special = {
        f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")
    }
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=128, **special)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 64, "max_position_embeddings": 128}
    return save(folder, wrapped, BertForMaskedLM, BertConfig, **sizes)


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the folder of `write_bert`."""
    return write_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the folder of a one-layer GPT-2 whose tokenizer has no pad token."""
    tokenizer = embedded.train_tokenizer(400)
    tokenizer.pad_token = None
    tokenizer.model_max_length = 1024
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 1024}
    folder = tmp_path_factory.mktemp("gpt2")
    return save(folder, tokenizer, GPT2LMHeadModel, GPT2Config, **sizes)


@pytest.fixture(scope="session")
def t5(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the folder of a one-layer T5."""
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2}
    tokens = {"pad_token_id": 0, "eos_token_id": 0, "decoder_start_token_id": 0}
    folder, tokenizer = tmp_path_factory.mktemp("t5"), embedded.train_tokenizer(400)
    return save(folder, tokenizer, T5ForConditionalGeneration, T5Config, **sizes, **tokens)


CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def chat(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the folder of a one-layer Llama whose tokenizer has Qwen's markers of a chat."""
    tokenizer = embedded.train_tokenizer(400)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHAT_TEMPLATE
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "max_position_embeddings": 1024}
    tokens = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    folder = tmp_path_factory.mktemp("chat")
    return save(folder, tokenizer, LlamaForCausalLM, LlamaConfig, **sizes, **tokens)


def train(recipe: str, run: Path, *options: str) -> dict[str, float]:
    """Train a recipe briefly and quietly into a folder, and return its results."""
    assert main(["train", recipe, "--output_dir", str(run), *FAST, *options]) == 0
    return results(run)


def results(folder: Path) -> dict[str, float]:
    """Return a run's `all_results.json`."""
    content: dict[str, float] = json.loads((folder / "all_results.json").read_text())
    return content


def assert_same_run(one: Path, other: Path) -> None:
    """Assert that two runs have the same weights, trials and episodes, bit for bit."""
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    records = [read_run(folder) for folder in (one, other)]
    assert records[0].episodes == records[1].episodes
    assert records[0].trials == records[1].trials
