"""The model card of a run: its results, what was done to the LR, and how to repeat it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from pulseopt_hf.aees.record_format import FILE_NAME
from pulseopt_hf.recipes import folder
from pulseopt_hf.recipes.keys import TASKS
from pulseopt_hf.recipes.parsing import Resolved
from pulseopt_hf.trainer.card import TAGS, table

# Where the hub's name of a metric is not the recipe's.
_METRIC = {"matthews": "matthews_correlation", "pearson": "pearsonr", "spearman": "spearmanr"}


def write_card(path: Path, resolved: Resolved, results: dict[str, Any], rate: str | None) -> None:
    """Write `README.md` into the run folder, in the form that the hub reads.

    `results` is the content of `all_results.json`; `rate` is the section on what was done to the
    LR, if anything was.
    """
    recipe = resolved.recipe
    model, dataset = recipe.model_name_or_path, recipe.dataset_name
    # A local folder or file is nobody else's to find.
    model_on_hub = model is not None and ":" not in model and not Path(model).exists()
    is_local = bool(recipe.train_file or recipe.validation_file)
    data_on_hub = dataset is not None and ":" not in dataset and not is_local
    scores = _scores(resolved, results) if data_on_hub else []
    name = path.resolve().name
    data = ModelCardData(
        base_model=model if model_on_hub else None,
        datasets=[str(dataset)] if data_on_hub else None,
        eval_results=scores or None,
        library_name="peft" if recipe.lora_r else "transformers",
        metrics=[_METRIC.get(metric, metric) for metric in recipe.metrics] or None,
        model_name=name if scores else None,
        pipeline_tag=TASKS[recipe.task].pipeline,
        tags=list(TAGS) if rate is not None else None,
    )
    shown = {k: f"{v:.4g}" if isinstance(v, float) else str(v) for k, v in results.items()}
    recorded = ""
    if (path / FILE_NAME).exists():
        recorded = f", every trial and episode in `{FILE_NAME}`"
    sections = [
        f"---\n{data.to_yaml()}\n---",
        f"# {name}",
        f"`{model or 'a new ' + str(recipe.model_type)}` trained for `{recipe.task}` on "
        f"{'local files' if is_local else dataset}.",
        f"## Results\n\n{table(('result', 'value'), sorted(shown.items()))}",
        *([rate] if rate is not None else []),
        "## To run it again",
        f"`{folder.RECIPE}` in this folder is the whole recipe: "
        f"`pulseopt-hf train {folder.RECIPE}`. Versions, command and commit are in "
        f"`{folder.RUN}`{recorded}.",
    ]
    (path / "README.md").write_text("\n\n".join(sections) + "\n", encoding="utf-8")


def _scores(resolved: Resolved, results: dict[str, Any]) -> list[EvalResult]:
    """Return the scores on the hub's data in the form that the hub shows beside the model."""
    recipe = resolved.recipe
    task = TASKS[recipe.task].pipeline
    if task is None or recipe.max_eval_samples or recipe.validation_percentage:
        return []  # not a score of the whole split
    scores = []
    for index, split in enumerate(recipe.validation_split):
        for metric in recipe.metrics:
            name = _METRIC.get(metric, metric)
            keys = [f"eval_{key}{recipe.suffix(index)}" for key in (name, metric)]
            value = next((results[key] for key in keys if key in results), math.nan)
            if math.isfinite(value):
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
