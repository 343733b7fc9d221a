"""The tasks' metrics as `evaluate` modules that need no hub.

`evaluate.load` downloads a script for each metric. `load` returns the same metrics, computed by
scikit-learn, scipy and rouge-score, which the extra `[recipes]` installs.
"""

from __future__ import annotations

import math
import pkgutil
from collections.abc import Callable
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


def _perplexity(losses: Any, tokens: Any) -> dict[str, float]:
    """Exponential of the mean loss per token.

    Predictions are the sum of token losses of each example, references its number of tokens.
    """
    count = math.fsum(tokens)
    mean = math.fsum(losses) / count if count else math.nan
    return {"perplexity": math.inf if mean >= 700 else math.exp(mean)}


def _rouge(predictions: Any, references: Any) -> dict[str, float]:
    """ROUGE-1, ROUGE-2 and ROUGE-L: F-measures with stemming, in percent."""
    from rouge_score.rouge_scorer import RougeScorer

    names = ("rouge1", "rouge2", "rougeL")
    scorer = RougeScorer(names, use_stemmer=True)
    scores = [scorer.score(r, p) for p, r in zip(predictions, references, strict=True)]
    return {k: 100 * math.fsum(s[k].fmeasure for s in scores) / len(scores) for k in names}


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


class _Offline(evaluate.Metric):  # type: ignore[misc]
    """A metric that keeps its inputs in memory."""

    def __init__(self, name: str) -> None:
        self._function, self._kind = METRICS[name]
        super().__init__(keep_in_memory=True, seed=0)

    def _build_data_dir(self) -> str:
        return ""  # nothing is written, so no folder is made

    def _info(self) -> evaluate.MetricInfo:
        features = Features({key: Value(self._kind) for key in ("predictions", "references")})
        about = str(self._function.__doc__)
        return evaluate.MetricInfo(about, citation="", features=features)

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return self._function(predictions, references)


def load(name: str) -> evaluate.Metric:
    """Return one of `METRICS`, to use like what `evaluate.load` returns."""
    return _Offline(name)


def compute(names: list[str], predictions: Any, references: Any) -> dict[str, float]:
    """Compute several metrics of the same predictions; one that is undefined is NaN."""
    result: dict[str, float] = {}
    for name in names:
        result |= load(name).compute(predictions=predictions, references=references)
    return result
