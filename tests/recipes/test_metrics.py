"""The metrics equal scikit-learn's and scipy's, and need no hub."""

import math
import socket
from typing import Any

import evaluate
import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk

from pulseopt_hf.recipes.metrics import METRICS, Offline, compute


@pytest.mark.parametrize(("classes", "average"), [(2, "binary"), (3, "macro")])
def test_classes_equal_scikit_learn(classes: int, average: str) -> None:
    predictions, references = np.random.default_rng(0).integers(0, classes, size=(2, 60))
    assert compute(["accuracy", "f1", "matthews"], predictions, references) == {
        "accuracy": (predictions == references).mean(),
        "f1": sk.f1_score(references, predictions, average=average),
        "matthews_correlation": sk.matthews_corrcoef(references, predictions),
    }
    assert compute(["f1"], [0, 0], [0, 0]) == {"f1": 0.0}


def test_correlations_equal_scipy() -> None:
    references, noise = np.random.default_rng(0).normal(size=(2, 200))
    found = compute(["pearson", "spearman"], references + noise, references)
    pearson = np.corrcoef(references, references + noise)[0, 1]
    assert found["pearson"] == pytest.approx(pearson, abs=1e-12)
    assert found["spearmanr"] == stats.spearmanr(references, references + noise)[0]


@pytest.mark.parametrize(
    ("losses", "tokens", "perplexity"),
    [
        ([10.0, 1.0], [5.0, 1.0], math.exp(11 / 6)),  # every token weighs alike
        ([1e6], [1], math.inf),
        ([0.0], [0], math.nan),
    ],
)
def test_perplexity(losses: list[float], tokens: list[float], perplexity: float) -> None:
    found = compute(["perplexity"], losses, tokens)["perplexity"]
    assert found == pytest.approx(perplexity, nan_ok=True)


def test_rouge_of_a_known_pair() -> None:
    found = compute(["rouge"], ["the cat sat"], ["the cat sat on the mat"])
    assert found["rouge1"] == pytest.approx(100 * 2 * 1.0 * 0.5 / 1.5)
    assert found["rouge2"] == pytest.approx(100 * 2 * 1.0 * 0.4 / 1.4)


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_is_an_evaluate_module_and_opens_no_connection(name, monkeypatch):
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a metric went to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    metric = Offline(name)
    assert isinstance(metric, evaluate.Metric)
    assert metric.description
    values = ["a b", "b c"] if name == "rouge" else [0, 1]
    metric.add_batch(predictions=values, references=values)
    assert all(math.isfinite(value) for value in metric.compute().values())
