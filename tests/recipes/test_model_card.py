"""A recipe's model card: what the hub reads of it. Its text is seen in test_folder.py."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from pulseopt_hf.recipes.model_card import write_card
from pulseopt_hf.recipes.parsing import resolve


def card(recipe: str, results: dict[str, Any], folder: Path, *options: str) -> ModelCard:
    write_card(folder, resolve(recipe, list(options)), results, None)
    return ModelCard.load(folder / "README.md")  # raises where the metadata is wrong


def test_scores_on_the_hubs_data_stand_where_the_hub_looks_for_them(tmp_path: Path) -> None:
    results = {"eval_accuracy": 0.84, "eval_accuracy_mm": 0.85, "eval_loss": 0.4}
    data = card("glue/mnli", results, tmp_path).data
    assert data.model_name == tmp_path.name
    found = [(score.dataset_split, score.metric_value) for score in data.eval_results]
    assert found == [("validation_matched", 0.84), ("validation_mismatched", 0.85)]
    (first, _) = data.eval_results
    assert (first.task_type, first.metric_type) == ("text-classification", "accuracy")
    assert (first.dataset_type, first.dataset_config) == ("nyu-mll/glue", "mnli")


@pytest.mark.parametrize(
    ("recipe", "results", "names"),
    [
        ("glue/cola", {"eval_matthews_correlation": 0.5}, ["matthews_correlation"]),
        ("glue/stsb", {"eval_pearson": 0.8, "eval_spearmanr": 0.7}, ["pearsonr", "spearmanr"]),
        ("lm/wikitext2", {"eval_perplexity": 20.0}, ["perplexity"]),
    ],
)
def test_metrics_have_the_hubs_names(
    recipe: str, results: dict[str, Any], names: list[str], tmp_path: Path
) -> None:
    data = card(recipe, results, tmp_path).data
    assert data.metrics == names
    assert [score.metric_type for score in data.eval_results] == names
    assert [score.metric_value for score in data.eval_results] == list(results.values())


def test_scores_on_other_rows_or_without_a_value_are_not_claimed_of_the_hubs_data(
    tmp_path: Path,
) -> None:
    file = tmp_path / "train.csv"
    file.write_text("sentence,label\na good film,1\n")
    words = ["--train_file", str(file), "--validation_file", str(file)]
    data = card("glue/sst2", {"eval_accuracy": 0.9}, tmp_path, *words).data
    assert (data.eval_results, data.datasets) == (None, None)
    data = card("lm/wikitext2", {"eval_perplexity": math.inf}, tmp_path).data
    assert data.eval_results is None
    options = ["--max_eval_samples", "100"]
    data = card("glue/sst2", {"eval_accuracy": 0.9}, tmp_path, *options).data
    assert data.eval_results is None
