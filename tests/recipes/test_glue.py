"""All nine GLUE recipes from files of each task's schema to a run folder, with a tiny model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from pulseopt_hf.cli import main
from tests.recipes.tiny import FAST, GLUE, SHARED, files_of, results, write_glue

SUBMISSION = {
    "cola": ["CoLA.tsv"],
    "sst2": ["SST-2.tsv"],
    "mrpc": ["MRPC.tsv"],
    "stsb": ["STS-B.tsv"],
    "qqp": ["QQP.tsv"],
    "mnli": ["MNLI-m.tsv", "MNLI-mm.tsv"],
    "qnli": ["QNLI.tsv"],
    "rte": ["RTE.tsv"],
    "wnli": ["WNLI.tsv"],
}
NAMES = {
    "mnli": {"entailment", "neutral", "contradiction"},
    "qnli": {"entailment", "not_entailment"},
    "rte": {"entailment", "not_entailment"},
}


@pytest.mark.parametrize("name", GLUE)
def test_a_glue_recipe_trains_evaluates_and_predicts_from_local_files(
    name: str, bert: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    options = ["--model_name_or_path", bert, "--output_dir", str(run), "--do_predict"]
    assert main(["train", f"glue/{name}", *options, *files_of(name, tmp_path), *FAST]) == 0

    scores = results(run)
    assert scores["train_samples"] == scores["eval_samples"] == 32
    assert -1 <= scores[f"eval_{GLUE[name][2]}"] <= 1
    assert math.isfinite(scores["eval_loss"])
    if name == "mnli":
        assert "eval_accuracy_mm" in scores
    train = json.loads((run / "train_results.json").read_text())
    assert set(train) <= set(scores)
    assert json.loads((run / "trainer_state.json").read_text())["global_step"] == 15

    for file in SUBMISSION[name]:
        lines = (run / file).read_text().splitlines()
        assert lines[0] == "index\tprediction"
        assert [line.split("\t")[0] for line in lines[1:]] == [str(i) for i in range(32)]
        predictions = {line.split("\t")[1] for line in lines[1:]}
        if name == "stsb":
            assert all(0 <= float(value) <= 5 for value in predictions)
        else:
            assert predictions <= NAMES.get(name, {"0", "1"})


def test_the_score_of_a_run_is_scikit_learns_of_its_predictions(bert: str, tmp_path: Path) -> None:
    import csv

    from sklearn.metrics import accuracy_score, f1_score

    files = write_glue(tmp_path, "mrpc")
    run = tmp_path / "run"
    validation = str(files["validation"])
    options = ["--train_file", str(files["train"]), "--validation_file", validation]
    options += ["--test_file", validation, "--do_predict", "--learning_rate", "1e-2"]
    options += ["--model_name_or_path", bert, "--output_dir", str(run), *FAST]
    assert main(["train", "glue/mrpc", *options]) == 0
    with files["validation"].open() as file:
        truth = [int(row["label"]) for row in csv.DictReader(file)]
    lines = (run / "MRPC.tsv").read_text().splitlines()[1:]
    predictions = [int(line.split("\t")[1]) for line in lines]
    assert results(run)["eval_accuracy"] == accuracy_score(truth, predictions)
    assert results(run)["eval_f1"] == f1_score(truth, predictions)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "folder"])
def test_json_parquet_and_saved_folders_give_the_numbers_of_csv(
    kind: str, bert: str, tmp_path: Path
) -> None:
    from datasets import load_dataset

    scores = []
    files = write_glue(tmp_path, "rte")
    for form in ("csv", kind):
        paths = []
        for split in ("train", "validation"):
            path = files[split]
            if form != "csv":
                rows = load_dataset("csv", data_files=str(path), split="train")
                path = path.with_suffix("" if form == "folder" else f".{form}")
                writers = {
                    "jsonl": rows.to_json,
                    "parquet": rows.to_parquet,
                    "folder": rows.save_to_disk,
                }
                writers[form](str(path))
            paths.append(str(path))
        run = tmp_path / f"run-{form}"
        options = ["--train_file", paths[0], "--validation_file", paths[1]]
        options += ["--model_name_or_path", bert, "--output_dir", str(run), *FAST]
        assert main(["train", "glue/rte", *options]) == 0
        scores.append(results(run)["eval_loss"])
    assert scores[0] == scores[1]


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the GLUE files in ../shared/data")
@pytest.mark.parametrize(("name", "rows"), [("cola", 8551), ("rte", 2490), ("sst2", 6920)])
def test_a_recipe_reads_all_of_glues_own_files(
    name: str, rows: int, bert: str, tmp_path: Path
) -> None:
    folder, run = SHARED / "glue" / name, tmp_path / "run"
    options = ["--train_file", str(folder / "train.csv")]
    options += ["--validation_file", str(folder / "validation.csv")]
    options += ["--model_name_or_path", bert, "--output_dir", str(run), *FAST]
    assert main(["train", f"glue/{name}", *options]) == 0
    assert results(run)["train_samples"] == rows
    assert results(run)["eval_samples"] == {"cola": 1043, "rte": 277, "sst2": 872}[name]
