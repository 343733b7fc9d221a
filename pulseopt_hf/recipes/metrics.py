"""The tasks' metrics as `evaluate` modules that need no hub.

`evaluate.load` downloads a script for each metric. These are computed by scikit-learn, scipy and
rouge-score, which the extra `[recipes]` installs.
"""

from __future__ import annotations

import math
import pkgutil
from collections.abc import Callable
from statistics import fmean
from typing import Any

import evaluate
from datasets import Features, Value

_Compute = Callable[[Any, Any], dict[str, float]]


def _library(key: str, function: str, **settings: Any) -> _Compute:
    """Return a metric that a library computes, which is imported when it is needed."""

    def compute(predictions: Any, references: Any) -> dict[str, float]:
        """As the library computes it."""
        value = pkgutil.resolve_name(function)(references, predictions, **settings)
        return {key: float(getattr(value, "statistic", value))}

    return compute


def _f1(predictions: Any, references: Any) -> dict[str, float]:
    """F1 of label 1 for two labels; for more, the mean over all labels."""
    average = "binary" if {*predictions, *references} <= {0, 1} else "macro"
    f1 = _library("f1", "sklearn.metrics:f1_score", average=average, zero_division=0)
    return f1(predictions, references)


def _perplexity(predictions: Any, references: Any) -> dict[str, float]:
    """Exponential of the mean loss per token.

    Predictions are the sum of token losses of each example, references its number of tokens.
    """
    tokens = math.fsum(references)
    mean = math.fsum(predictions) / tokens if tokens else math.nan
    return {"perplexity": math.inf if mean >= 700 else math.exp(mean)}


def _rouge(predictions: Any, references: Any) -> dict[str, float]:
    """ROUGE-1, ROUGE-2 and ROUGE-L: F-measures with stemming, in percent."""
    from rouge_score.rouge_scorer import RougeScorer

    names = ("rouge1", "rouge2", "rougeL")
    scores = list(map(RougeScorer(names, use_stemmer=True).score, references, predictions))
    return {name: 100 * fmean(score[name].fmeasure for score in scores) for name in names}


# What computes each, of what kind of value.
METRICS: dict[str, tuple[_Compute, str]] = {
    "accuracy": (_library("accuracy", "sklearn.metrics:accuracy_score"), "int64"),
    "f1": (_f1, "int64"),
    "matthews": (_library("matthews_correlation", "sklearn.metrics:matthews_corrcoef"), "int64"),
    "pearson": (_library("pearson", "scipy.stats:pearsonr"), "float64"),
    "spearman": (_library("spearmanr", "scipy.stats:spearmanr"), "float64"),
    "perplexity": (_perplexity, "float64"),
    "rouge": (_rouge, "string"),
}


class Offline(evaluate.Metric):  # type: ignore[misc]
    """One of `METRICS`, to use like what `evaluate.load` returns; it keeps its inputs in memory."""

    def __init__(self, name: str) -> None:
        self._compute, self._kind = METRICS[name]  # which `evaluate` calls
        super().__init__(keep_in_memory=True, seed=0)

    def _build_data_dir(self) -> str:
        return ""  # nothing is written, so no folder is made

    def _info(self) -> evaluate.MetricInfo:
        features = Features({key: Value(self._kind) for key in ("predictions", "references")})
        return evaluate.MetricInfo(str(self._compute.__doc__), citation="", features=features)


def compute(names: list[str], predictions: Any, references: Any) -> dict[str, float]:
    """Compute several metrics of the same predictions; one that is undefined is NaN."""
    result: dict[str, float] = {}
    for name in names:
        result |= Offline(name).compute(predictions=predictions, references=references)
    return result


def computing(
    names: list[str],
    predicted: Callable[[Any], Any],
    expected: Callable[[Any], Any] = lambda labels: labels,
) -> Callable[[Any], dict[str, float]] | None:
    """Return Trainer's `compute_metrics`, or `None` where there are no metrics.

    `predicted` makes predictions of what the model returned, `expected` references of the labels.
    """
    if not names:
        return None
    return lambda result: compute(names, predicted(result[0]), expected(result[1]))
