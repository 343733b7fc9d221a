"""The embedded data: real sentences, deterministic, with splits that share none."""

import os

import pytest

from pulseopt_hf import embedded
from tests.conftest import run_python


def test_there_are_enough_sentences_and_they_read_as_sentences() -> None:
    found = embedded.sentences()
    assert len(set(found)) == len(found) > 1500
    assert all(5 <= len(s.split()) <= 40 and s[0].isupper() and s.endswith(".") for s in found)
    assert not any(">>>" in s or "::=" in s for s in found)


def test_displaced_sentences_have_the_same_words_in_another_order_in_the_same_split() -> None:
    originals = {name: set(part["text"]) for name, part in embedded.language_modelling().items()}
    assert not originals["train"] & originals["validation"]
    share = len(originals["validation"]) / sum(map(len, originals.values()))
    assert share == pytest.approx(0.1, abs=0.02)
    for name, part in embedded.word_order().items():
        written = [row["sentence"] for row in part if row["label"] == 1]
        displaced = [row["sentence"] for row in part if row["label"] == 0]
        assert len(written) == len(displaced) > 100
        assert set(written) <= originals[name]
        bags = {tuple(sorted(s[:-1].split())) for s in written}
        assert all(tuple(sorted(s[:-1].split())) in bags for s in displaced)
        assert not set(written) & set(displaced)
        # As many at the start as at the end: the order of rows says nothing about the label.
        half = part["label"][: len(part) // 2]
        assert sum(half) / len(half) == pytest.approx(0.5, abs=0.1)


def test_the_data_is_the_same_in_every_process() -> None:
    code = (
        "import hashlib, json; from pulseopt_hf import embedded;"
        "rows = [embedded.word_order()[s].to_dict() for s in ('train', 'validation')];"
        "print(hashlib.sha256(json.dumps(rows).encode()).hexdigest())"
    )
    digests = set()
    for seed in ("0", "1"):
        digests.add(run_python("-c", code, env={**os.environ, "PYTHONHASHSEED": seed}).stdout)
    assert len(digests) == 1


def test_the_tokenizer_reproduces_every_sentence() -> None:
    tokenizer, used = embedded.train_tokenizer(600), set()
    assert len(tokenizer) == 600
    for sentence in embedded.sentences()[:300]:
        ids = tokenizer(sentence)["input_ids"]
        used.update(ids)
        assert tokenizer.decode(ids) == sentence
    assert len(used) > 300
