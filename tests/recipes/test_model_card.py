"""A recipe's model card: what the hub reads of it. Its text is seen in test_folder.py."""

import math
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from pulseopt_hf.recipes.model_card import write_card
from pulseopt_hf.recipes.parsing import resolve


def card(recipe: str, results: dict[str, Any], folder: Path, *options: str) -> Any:
    write_card(folder, resolve(recipe, list(options)), results, None)
    return ModelCard.load(folder / "README.md").data  # raises where the metadata is wrong


@pytest.mark.parametrize(
    ("recipe", "results", "names"),
    [
        ("glue/cola", {"eval_matthews_correlation": 0.5}, ["matthews_correlation"]),
        ("glue/stsb", {"eval_pearson": 0.8, "eval_spearmanr": 0.7}, ["pearsonr", "spearmanr"]),
        ("lm/wikitext2", {"eval_perplexity": 20.0}, ["perplexity"]),
    ],
)
def test_metrics_have_the_hubs_names(recipe, results, names, tmp_path):
    data = card(recipe, results, tmp_path)
    assert data.metrics == names
    assert data.model_name == tmp_path.name
    found = [(score.metric_type, score.metric_value) for score in data.eval_results]
    assert found == list(zip(names, results.values(), strict=True))


def test_scores_name_their_split_of_the_hubs_data(tmp_path: Path) -> None:
    results = {"eval_accuracy": 0.84, "eval_accuracy_mm": 0.85, "eval_loss": 0.4}
    scores = card("glue/mnli", results, tmp_path).eval_results
    found = [(score.dataset_split, score.metric_value) for score in scores]
    assert found == [("validation_matched", 0.84), ("validation_mismatched", 0.85)]
    assert scores[0].task_type == "text-classification"
    assert (scores[0].dataset_type, scores[0].dataset_config) == ("nyu-mll/glue", "mnli")


def test_scores_on_other_rows_or_without_a_value_are_not_claimed_of_the_hubs_data(tmp_path):
    file = tmp_path / "train.csv"
    file.write_text("sentence,label\na good film,1\n")
    local = ["--train_file", str(file), "--validation_file", str(file)]
    data = card("glue/sst2", {"eval_accuracy": 0.9}, tmp_path, *local)
    assert (data.eval_results, data.datasets) == (None, None)
    some = card("glue/sst2", {"eval_accuracy": 0.9}, tmp_path, "--max_eval_samples", "100")
    assert some.eval_results is None
    assert card("lm/wikitext2", {"eval_perplexity": math.inf}, tmp_path).eval_results is None
