"""The model card of a run: its results, what was done to the LR, and how to make it again."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from pulseopt_hf.recipes import folder
from pulseopt_hf.recipes.parsing import Resolved
from pulseopt_hf.trainer.card import TAGS, table

_PIPELINE = {
    "text-classification": "text-classification",
    "text-regression": "text-classification",
    "causal-lm": "text-generation",
    "masked-lm": "fill-mask",
    "image-classification": "image-classification",
}
# Where the hub's name of a metric is not the recipe's.
_METRIC = {"matthews": "matthews_correlation", "pearson": "pearsonr", "spearman": "spearmanr"}


def write_card(path: Path, resolved: Resolved, results: dict[str, Any], rate: str | None) -> None:
    """Write `README.md` in the form that the hub reads.

    Args:
        path: the run folder.
        resolved: the recipe.
        results: what `all_results.json` holds.
        rate: the section on what was done to the LR, or `None` where nothing was.
    """
    recipe = resolved.recipe
    base = recipe.model_name_or_path
    # A local folder or file is nobody else's to find.
    on_hub = base is not None and ":" not in base and not Path(base).exists()
    local = recipe.train_file or recipe.validation_file
    named = recipe.dataset_name is not None and ":" not in recipe.dataset_name
    scores = _scores(resolved, results) if named and not local else []
    data = ModelCardData(
        base_model=base if on_hub else None,
        datasets=[str(recipe.dataset_name)] if named and not local else None,
        eval_results=scores or None,
        library_name="peft" if recipe.lora_r else "transformers",
        metrics=[_METRIC.get(metric, metric) for metric in recipe.metrics] or None,
        model_name=path.resolve().name if scores else None,
        pipeline_tag=_PIPELINE.get(recipe.task),
        tags=list(TAGS) if rate is not None else None,
    )
    source = "local files" if local else recipe.dataset_name
    sections = [
        f"---\n{data.to_yaml()}\n---",
        f"# {path.resolve().name}",
        f"`{base or 'a new ' + str(recipe.model_type)}` trained for `{recipe.task}` on {source}.",
        "## Results",
        table(("result", "value"), _result_rows(results)),
    ]
    if rate is not None:
        sections.append(rate)
    sections += [
        "## To run it again",
        f"`{folder.RECIPE}` in this folder is the whole recipe: "
        f"`pulseopt-hf train {folder.RECIPE}`. Versions, command and commit are in "
        f"`{folder.RUN}`, every episode in `episodes.json`.",
    ]
    (path / "README.md").write_text("\n\n".join(sections) + "\n", encoding="utf-8")


def _scores(resolved: Resolved, results: dict[str, Any]) -> list[EvalResult]:
    """Return the scores on the hub's data in the form that the hub shows beside the model."""
    recipe = resolved.recipe
    task = _PIPELINE.get(recipe.task)
    if task is None or recipe.max_eval_samples or recipe.validation_percentage:
        return []  # no score of the whole split
    scores = []
    for index, split in enumerate(recipe.validation_split):
        suffixes = recipe.validation_suffixes
        suffix = suffixes[index] if index < len(suffixes) else f"_{index + 1}"
        for metric in recipe.metrics:
            name = _METRIC.get(metric, metric)
            keys = (f"eval_{name}{suffix}", f"eval_{metric}{suffix}")
            value = next((results[key] for key in keys if key in results), None)
            if value is not None and math.isfinite(value):
                score = EvalResult(
                    task_type=task,
                    dataset_type=str(recipe.dataset_name),
                    dataset_name=str(recipe.dataset_name),
                    dataset_config=recipe.dataset_config_name,
                    dataset_split=split,
                    metric_type=name,
                    metric_value=value,
                )
                scores.append(score)
    return scores


def _result_rows(results: dict[str, Any]) -> list[tuple[str, ...]]:
    return [
        (key, f"{value:.4g}" if isinstance(value, float) else str(value))
        for key, value in sorted(results.items())
    ]
