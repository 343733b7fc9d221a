"""The metrics equal scikit-learn's and scipy's, and need no hub."""

from __future__ import annotations

import math
import socket
from typing import Any

import evaluate
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as sk

from pulseopt_hf.recipes.metrics import METRICS, compute, load

PAIRS = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=60)


@settings(max_examples=40, deadline=None)
@given(PAIRS)
def test_two_classes_equal_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    predictions, references = map(list, zip(*pairs, strict=True))
    found = compute(["accuracy", "f1", "matthews"], predictions, references)
    assert found == {
        "accuracy": sk.accuracy_score(references, predictions),
        "f1": sk.f1_score(references, predictions, zero_division=0),
        "matthews_correlation": sk.matthews_corrcoef(references, predictions),
    }


def test_f1_of_three_classes_is_the_mean_over_classes() -> None:
    references, predictions = [0, 1, 2, 2, 1], [0, 2, 2, 1, 1]
    found = compute(["f1"], predictions, references)["f1"]
    assert found == sk.f1_score(references, predictions, average="macro")


def test_correlations_equal_scipy() -> None:
    rng = np.random.default_rng(0)
    references = rng.normal(size=200)
    predictions = references + rng.normal(size=200)
    found = compute(["pearson", "spearman"], predictions, references)
    assert found["pearson"] == pytest.approx(stats.pearsonr(references, predictions)[0], abs=1e-15)
    assert found["spearmanr"] == stats.spearmanr(references, predictions)[0]


def test_perplexity_weighs_every_token_alike() -> None:
    losses, tokens = [10.0, 1.0], [5.0, 1.0]
    found = compute(["perplexity"], losses, tokens)["perplexity"]
    assert found == pytest.approx(math.exp(11 / 6))
    assert compute(["perplexity"], [1e6], [1])["perplexity"] == math.inf
    assert math.isnan(compute(["perplexity"], [0.0], [0])["perplexity"])


def test_rouge_of_a_known_pair() -> None:
    found = compute(["rouge"], ["the cat sat"], ["the cat sat on the mat"])
    assert found["rouge1"] == pytest.approx(100 * 2 * 1.0 * 0.5 / 1.5)
    assert found["rouge2"] == pytest.approx(100 * 2 * 1.0 * 0.4 / 1.4)


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_is_an_evaluate_module_and_opens_no_connection(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a metric went to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    metric = load(name)
    assert isinstance(metric, evaluate.Metric)
    values = ["a b", "b c"] if name == "rouge" else [0, 1]
    metric.add_batch(predictions=values, references=values)
    assert all(math.isfinite(value) for value in metric.compute().values())
