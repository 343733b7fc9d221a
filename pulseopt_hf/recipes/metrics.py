"""The tasks' metrics as `evaluate` modules that need no hub.

`evaluate.load` downloads a script for each metric. These are the same metrics, computed by
scikit-learn, scipy and rouge-score, which the extra `[recipes]` installs.
"""

from __future__ import annotations

import math
from typing import Any

import evaluate
import numpy as np
from datasets import Features, Value


class _Offline(evaluate.Metric):  # type: ignore[misc]
    """A metric that keeps its inputs in memory."""

    kind = "int64"
    summary = ""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"keep_in_memory": True, "seed": 0, **kwargs})

    def _build_data_dir(self) -> str:
        return ""  # nothing is written, so no folder for it is made

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": Value(self.kind), "references": Value(self.kind)}
        return evaluate.MetricInfo(
            description=self.summary,
            citation="",
            inputs_description="",
            features=Features(features),
        )


class Accuracy(_Offline):
    """Share of predictions that are right."""

    summary = "Share of predictions that are right."

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        from sklearn.metrics import accuracy_score

        return {"accuracy": float(accuracy_score(references, predictions))}


class F1(_Offline):
    """F1 of label 1 for two labels, and the mean over all labels for more."""

    summary = "Harmonic mean of precision and recall."

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        from sklearn.metrics import f1_score

        binary = set(predictions) | set(references) <= {0, 1}
        average = "binary" if binary else "macro"
        return {"f1": float(f1_score(references, predictions, average=average, zero_division=0))}


class Matthews(_Offline):
    """Matthews's correlation coefficient."""

    summary = "Matthews's correlation coefficient."

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        from sklearn.metrics import matthews_corrcoef

        return {"matthews_correlation": float(matthews_corrcoef(references, predictions))}


class Pearson(_Offline):
    """Pearson's correlation coefficient."""

    kind = "float64"
    summary = "Pearson's correlation coefficient."

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        from scipy.stats import pearsonr

        return {"pearson": float(pearsonr(references, predictions).statistic)}


class Spearman(_Offline):
    """Spearman's rank correlation coefficient."""

    kind = "float64"
    summary = "Spearman's rank correlation coefficient."

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        from scipy.stats import spearmanr

        return {"spearmanr": float(spearmanr(references, predictions).statistic)}


class Perplexity(_Offline):
    """Exponential of the mean loss of a token, over all tokens of all examples."""

    kind = "float64"
    summary = "Exponential of the mean loss of a token. Predictions are the sums of the losses of "
    summary += "each example's tokens, references the numbers of those tokens."

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        tokens = math.fsum(references)
        if not tokens:
            return {"perplexity": math.nan}
        mean = math.fsum(predictions) / tokens
        return {"perplexity": math.exp(mean) if mean < 700 else math.inf}


class Rouge(_Offline):
    """ROUGE-1, ROUGE-2 and ROUGE-L: F-measures with stemming, in percent."""

    kind = "string"
    summary = "Overlap of words, of pairs of words, and of the longest common sequence."

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        from rouge_score.rouge_scorer import RougeScorer

        names = ("rouge1", "rouge2", "rougeL")
        scorer = RougeScorer(names, use_stemmer=True)
        scores = [scorer.score(r, p) for p, r in zip(predictions, references, strict=True)]
        return {name: 100 * float(np.mean([s[name].fmeasure for s in scores])) for name in names}


METRIC_OF_NAME: dict[str, type[_Offline]] = {
    "accuracy": Accuracy,
    "f1": F1,
    "matthews": Matthews,
    "pearson": Pearson,
    "spearman": Spearman,
    "perplexity": Perplexity,
    "rouge": Rouge,
}


def compute(names: list[str], predictions: Any, references: Any) -> dict[str, float]:
    """Compute several metrics of the same predictions; one that is undefined is NaN.

    Args:
        names: keys of `METRIC_OF_NAME`.
        predictions: one an example; labels, values, texts, or sums of losses for perplexity.
        references: one an example, of the same kind, or numbers of tokens for perplexity.
    """
    result: dict[str, float] = {}
    for name in names:
        metric = METRIC_OF_NAME[name]()
        result.update(metric.compute(predictions=predictions, references=references))
    return result
