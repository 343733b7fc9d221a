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

PAIRS = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=60)


@settings(max_examples=40, deadline=None)
@given(PAIRS)
def test_classes_equal_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    predictions, references = map(list, zip(*pairs, strict=True))
    average = "macro" if 2 in predictions + references else "binary"
    assert compute(["accuracy", "f1", "matthews"], predictions, references) == {
        "accuracy": sk.accuracy_score(references, predictions),
        "f1": sk.f1_score(references, predictions, average=average, zero_division=0),
        "matthews_correlation": sk.matthews_corrcoef(references, predictions),
    }


def test_correlations_equal_scipy() -> None:
    references, noise = np.random.default_rng(0).normal(size=(2, 200))
    found = compute(["pearson", "spearman"], references + noise, references)
    pearson = stats.pearsonr(references, references + noise)[0]
    assert found["pearson"] == pytest.approx(pearson, abs=1e-15)
    assert found["spearmanr"] == stats.spearmanr(references, references + noise)[0]


def test_perplexity_weighs_every_token_alike() -> None:
    def perplexity(losses: list[float], tokens: list[float]) -> float:
        return compute(["perplexity"], losses, tokens)["perplexity"]

    assert perplexity([10.0, 1.0], [5.0, 1.0]) == pytest.approx(math.exp(11 / 6))
    assert perplexity([1e6], [1]) == math.inf
    assert math.isnan(perplexity([0.0], [0]))


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
    assert metric.description
    values = ["a b", "b c"] if name == "rouge" else [0, 1]
    metric.add_batch(predictions=values, references=values)
    assert all(math.isfinite(value) for value in metric.compute().values())
