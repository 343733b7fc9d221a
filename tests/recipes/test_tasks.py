"""The recipes beyond GLUE, on local files, with tiny models."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as Pillow

from pulseopt_hf import embedded
from tests.recipes.tiny import SHARED, files_of, needs_shared, train


def files(folder: Path, ending: str, train: str, validation: str) -> list[str]:
    """Write local files, and return the options that name them."""
    for split, content in (("train", train), ("validation", validation)):
        (folder / f"{split}.{ending}").write_text(content)
    return [f"--{split}_file={folder}/{split}.{ending}" for split in ("train", "validation")]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    data = embedded.language_modelling()
    train, validation = ("\n".join(data[s]["text"][:200]) for s in ("train", "validation"))
    folder = tmp_path_factory.mktemp("texts")
    return ["--block_size", "64", *files(folder, "txt", train, validation)]


@pytest.mark.parametrize("recipe", ["lm/wikitext2", "lm/wikitext103", "lm/wikitext2_lora"])
def test_causal_language_models_report_the_perplexity_of_their_loss(recipe, gpt2, texts, tmp_path):
    scores = train(recipe, tmp_path / "run", "--model_name_or_path", gpt2, *texts)
    # Every block has as many tokens, so the mean over blocks is the mean over tokens.
    assert scores["eval_perplexity"] == pytest.approx(math.exp(scores["eval_loss"]), rel=1e-4)
    adapter = (tmp_path / "run" / "adapter_model.safetensors").exists()
    assert adapter == recipe.endswith("lora")


def test_a_text_file_alone_is_enough_for_a_language_model(gpt2, texts, tmp_path):
    scores = train("lm/text_file", tmp_path / "run", "--model_name_or_path", gpt2, *texts[:3])
    assert 0 < scores["eval_samples"] < scores["train_samples"] / 10


@needs_shared
def test_wikitext_itself_is_read(gpt2: str, tmp_path: Path) -> None:
    folder = SHARED / "wikitext2"
    options = ["--model_name_or_path", gpt2, "--block_size", "128", "--max_eval_samples", "500"]
    options += ["--train_file", str(folder / "train.txt"), "--max_train_samples", "2000"]
    options += ["--validation_file", str(folder / "validation.txt")]
    assert train("lm/wikitext2", tmp_path / "run", *options)["eval_perplexity"] > 1


def test_a_masked_language_model_guesses_words(bert: str, texts: list[str], tmp_path: Path) -> None:
    scores = train("lm/wikitext2_mlm", tmp_path / "run", "--model_name_or_path", bert, *texts)
    assert 1 < scores["eval_perplexity"] < 1000


def test_lora_trains_only_its_matrices_on_glue(bert: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = files_of("sst2", tmp_path)
    scores = train("glue/sst2_lora", run, "--model_name_or_path", bert, *options)
    assert 0 <= scores["eval_accuracy"] <= 1
    assert (run / "adapter_model.safetensors").exists()
    assert not (run / "model.safetensors").exists()
    config = json.loads((run / "adapter_config.json").read_text())
    assert config["r"] == 8
    assert sorted(config["target_modules"]) == ["query", "value"]
    assert "library_name: peft" in (run / "README.md").read_text()


def test_seq2seq_writes_texts_and_scores_them(t5: str, tmp_path: Path) -> None:
    rows = [{"article": f"the film number {i} was fine", "highlights": "fine"} for i in range(24)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    options = [*files(tmp_path, "jsonl", text, text), f"--test_file={tmp_path}/train.jsonl"]
    options += ["--model_name_or_path", t5, "--do_predict", "--generation_max_length", "8"]
    scores = train("seq2seq/cnn_dailymail", tmp_path / "run", *options)
    assert {"eval_rouge1", "eval_rouge2", "eval_rougeL"} <= set(scores)
    assert len((tmp_path / "run" / "predictions.tsv").read_text().splitlines()) == 25


def test_digits_are_learned(tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = "--max_steps -1 --num_train_epochs 2 --per_device_train_batch_size 32"
    assert train("image/digits", run, *options.split())["eval_accuracy"] > 0.9
    log = (run / "train.log").read_text()
    assert log.count("\nepoch ") + log.startswith("epoch ") == 2
    assert "epoch 2 of 2  step 90  loss " in log
    assert "step 45  eval loss " in log
    assert log.count("eval loss ") == 2  # the last one is among the results, and only there


def test_cifar_is_read_as_images_with_its_columns(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = [
        Pillow.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(16)
    ]
    names = [f"kind{i}" for i in range(100)]
    features = Features(
        {"img": Image(), "fine_label": ClassLabel(names=names), "coarse_label": Value("int64")}
    )
    rows = {"img": images, "fine_label": list(range(16)), "coarse_label": [0] * 16}
    for split in ("train", "test"):
        Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / split))
    tiny = {"layer_type": "basic", "embedding_size": 8, "depths": [1], "hidden_sizes": [8]}
    options = ["--train_file", str(tmp_path / "train"), "--validation_file", str(tmp_path / "test")]
    options += ["--model_config", json.dumps(tiny), "--dataloader_num_workers", "0"]
    scores = train("image/cifar100", tmp_path / "run", *options)
    assert scores["eval_samples"] == 16
    assert json.loads((tmp_path / "run" / "config.json").read_text())["id2label"]["99"] == "kind99"


def test_ag_news_takes_labels_by_name_or_number(bert: str, tmp_path: Path) -> None:
    contents = [
        "text,label\n" + "".join(f'"the film, {label}",{label}\n' for label in labels)
        for labels in (["World", "Sports", "Business", "Sci/Tech"], "0123")
    ]
    options = ["--model_name_or_path", bert, *files(tmp_path, "csv", *contents)]
    assert train("text/ag_news", tmp_path / "run", *options)["eval_samples"] == 4
