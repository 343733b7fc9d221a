"""All nine GLUE recipes from files of each task's schema to a run folder, with a tiny model."""

import csv
import json
import math
from pathlib import Path

import pytest
from datasets import load_dataset
from sklearn.metrics import accuracy_score, f1_score

from tests.recipes.tiny import GLUE, SHARED, files_of, needs_shared, train, write_glue

NAMES = {
    "mnli": {"entailment", "neutral", "contradiction"},
    "qnli": {"entailment", "not_entailment"},
    "rte": {"entailment", "not_entailment"},
}


@pytest.mark.parametrize("name", GLUE)
def test_a_glue_recipe_trains_evaluates_and_predicts_from_local_files(name, bert, tmp_path):
    run = tmp_path / "run"
    options = ["--model_name_or_path", bert, "--do_predict", *files_of(name, tmp_path)]
    scores = train(f"glue/{name}", run, *options)
    _, _, score, _, submission = GLUE[name]
    assert scores["train_samples"] == scores["eval_samples"] == 32
    assert -1 <= scores[f"eval_{score}"] <= 1
    assert math.isfinite(scores["eval_loss"])
    assert ("eval_accuracy_mm" in scores) == (name == "mnli")
    assert set(json.loads((run / "train_results.json").read_text())) <= set(scores)
    assert json.loads((run / "trainer_state.json").read_text())["global_step"] == 15
    for file in submission:
        head, *lines = (line.split("\t") for line in (run / file).read_text().splitlines())
        assert head == ["index", "prediction"]
        assert [index for index, _ in lines] == [str(i) for i in range(32)]
        if name == "stsb":
            assert all(0 <= float(value) <= 5 for _, value in lines)
        else:
            assert {value for _, value in lines} <= NAMES.get(name, {"0", "1"})


def test_the_score_of_a_run_is_scikit_learns_of_its_predictions(bert: str, tmp_path: Path) -> None:
    run, files = tmp_path / "run", write_glue(tmp_path, "mrpc")
    validation = str(files["validation"])
    options = ["--train_file", str(files["train"]), "--validation_file", validation]
    options += ["--test_file", validation, "--do_predict", "--learning_rate", "1e-2"]
    scores = train("glue/mrpc", run, *options, "--model_name_or_path", bert)
    with files["validation"].open() as file:
        truth = [int(row["label"]) for row in csv.DictReader(file)]
    lines = (run / "MRPC.tsv").read_text().splitlines()[1:]
    predictions = [int(line.split("\t")[1]) for line in lines]
    assert scores["eval_accuracy"] == accuracy_score(truth, predictions)
    assert scores["eval_f1"] == f1_score(truth, predictions)


def test_json_parquet_and_saved_folders_give_the_numbers_of_csv(bert: str, tmp_path: Path) -> None:
    files, losses = write_glue(tmp_path, "rte"), set()
    for kind in ("csv", "jsonl", "parquet", "folder"):
        options = ["--model_name_or_path", bert]
        for split in ("train", "validation"):
            path = files[split].with_suffix("" if kind == "folder" else f".{kind}")
            if kind != "csv":
                rows = load_dataset("csv", data_files=str(files[split]), split="train")
                write = {"jsonl": rows.to_json, "parquet": rows.to_parquet}
                write.get(kind, rows.save_to_disk)(str(path))
            options += [f"--{split}_file", str(path)]
        losses.add(train("glue/rte", tmp_path / f"run-{kind}", *options)["eval_loss"])
    assert len(losses) == 1


@needs_shared
@pytest.mark.parametrize(
    ("name", "rows"), [("cola", (8551, 1043)), ("rte", (2490, 277)), ("sst2", (6920, 872))]
)
def test_a_recipe_reads_all_of_glues_own_files(name, rows, bert, tmp_path):
    folder = SHARED / "glue" / name
    options = ["--train_file", str(folder / "train.csv"), "--model_name_or_path", bert]
    options += ["--validation_file", str(folder / "validation.csv")]
    scores = train(f"glue/{name}", tmp_path / "run", *options)
    assert (scores["train_samples"], scores["eval_samples"]) == rows
