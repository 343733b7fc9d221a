"""What a user can get wrong: one clear line each, exit code 2, and nothing written."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from pulseopt_hf.cli import main
from pulseopt_hf.recipes import keys

Refused = Callable[..., str]
Local = Callable[..., list[str]]
HEAD = "sentence1,sentence2,label\n"
ROWS = HEAD + "the film,a story,0\nthe scene,a film,1\n" * 4
KNOWN = "`label` must be 0 to 1, or `entailment`, `not_entailment`"
RANGE = "`label` must be a number from 0 to 5"
TYPO = "has no column `sentence2`; did you mean `sentense2`?"
OTHERS = "has no columns `sentence1`, `sentence2`; its columns are `a`, `b`, `label`"


@pytest.mark.parametrize(
    ("task", "split", "content", "says"),
    [
        ("rte", "train", "", "train.csv: is empty"),
        ("rte", "train", HEAD, "has no rows"),
        ("rte", "train", ROWS.replace("sentence2", "sentense2"), TYPO),
        ("rte", "train", ROWS + "x,y,2\n", f"train.csv: row 9: {KNOWN}, got 2."),
        ("rte", "train", ROWS + "x,y,-1\n", f"row 9: {KNOWN}, got -1."),
        ("rte", "train", ROWS + "x,y,maybe\n", f"row 9: {KNOWN}, got 'maybe'."),
        ("rte", "train", ROWS + "x,y,\n", f"row 9: {KNOWN}, got ''."),
        ("rte", "train", ROWS + "x,y,0.5\n", f"row 1: {KNOWN}, got 0.0."),
        ("rte", "train", HEAD + '"a,b,c\n', "cannot be read as csv"),
        ("rte", "validation", ROWS + "x,y,7\n", f"validation.csv: row 9: {KNOWN}, got 7."),
        ("rte", "validation", "a,b,label\n1,2,1\n", f"validation.csv: {OTHERS}"),
        (
            "rte",
            "validation",
            "sentence1,label\na,1\n",
            "validation.csv: has no column `sentence2`",
        ),
        ("stsb", "train", ROWS + "x,y,7\n", f"row 9: {RANGE}, got 7."),
        ("stsb", "train", ROWS + "x,y,-1\n", f"row 9: {RANGE}, got -1."),
        ("stsb", "train", ROWS + "x,y,warm\n", f"row 9: {RANGE}, got 'warm'."),
        ("stsb", "train", ROWS + "x,y,\n", f"row 9: {RANGE}, got ''."),
    ],
)
def test_data_that_does_not_fit_is_named(task, split, content, says, refused, local):
    assert says in refused("train", *local(task, **{split: content}))


@pytest.mark.parametrize("command", ["validate", "train"])
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["LOCAL", "--train_file", "gone.csv"], "`train_file` gone.csv: there is no such file"),
        (["LOCAL", "--validation_file", "gone"], "`validation_file` gone: there is no such file"),
        (["LOCAL", "--train_file", __file__], "must be one of csv, tsv"),
        (["LOCAL", "--do_predict"], "`test_file` is not set"),
        (["LOCAL", "--report_to", "wandbb"], "unknown tracker `wandbb`; did you mean `wandb`?"),
        (["LOCAL", "--report_to", "none", "x"], "unknown tracker `x`. Trackers are"),
        (["lm/text_file"], "There is no data"),
        (["quickstart/lm", "--dataset_name", "embedded:sentence"], "mean `embedded:sentences`?"),
        (["quickstart/lm", "--model_type", "gpt3"], "`model_type`: `gpt3` cannot be made"),
        (["lm/wikitext2", "--max_steps=x"], "`max_steps`: invalid int value: 'x'"),
        (["launch/ddp"], "is a launch profile"),
        (["glue/sst22"], "did you mean `glue/sst2`?"),
        (["gone.yaml"], "gone.yaml: there is no such file"),
        ([], "The recipe comes first"),
        (["glue/sst2", "-v"], "unexpected `-v`, which belongs to no option"),
    ],
)
def test_what_train_refuses_validate_refuses_too(command, words, says, refused, local):
    if words[:1] == ["LOCAL"]:
        words = [*local("rte"), *words[1:]]
    assert says in refused(command, *words)


def test_a_tracker_that_is_not_installed_is_named(refused, monkeypatch):
    monkeypatch.setattr(keys, "get_available_reporting_integrations", lambda: ["wandb"])
    line = refused("train", "quickstart/lm", "--report_to", "wandb", "mlflow")
    assert line.endswith("`report_to`: `mlflow` is not installed.")


def test_what_is_not_here_is_named_offline(refused: Refused, local: Local, bert: str) -> None:
    line = refused("train", "glue/rte", "--model_name_or_path", bert)
    assert "nyu-mll/glue (rte) could not be loaded from the hub or its local cache" in line
    assert "HF_HUB_OFFLINE is set" in line
    name = "google-bert/bert-base-cased"
    assert name in refused("train", *local("rte", model=name))
    assert "`validation_file` is not set" in refused("train", *local("rte")[:-2])


def test_a_tokenizer_without_a_pad_token_is_named_and_can_be_given_one(
    refused: Refused, local: Local, gpt2: str, tmp_path: Path
) -> None:
    fix = re.search(r"such as `pad_token: '(.*)'`", refused("train", *local("rte", model=gpt2)))
    assert fix is not None
    assert "'nothing' is not a token" in refused(
        "train", *local("rte", model=gpt2), "--pad_token", "nothing"
    )
    fixed = ["train", *local(model=gpt2), "--pad_token", fix[1], "--max_steps", "15", "--quiet"]
    assert main([*fixed, "--output_dir", str(tmp_path / "run")]) == 0


def test_a_model_that_does_not_fit_the_task_is_named(refused, bert, gpt2, t5, tmp_path):
    def text(recipe: str, model: str, content: str = "the film was a story\n" * 500) -> str:
        (tmp_path / "text.txt").write_text(content)
        files = [f"--{split}_file={tmp_path / 'text.txt'}" for split in ("train", "validation")]
        return refused("train", recipe, "--model_name_or_path", model, *files)

    fits_not = "a `t5` model does not fit `task: masked-lm`"
    assert fits_not in text("lm/wikitext2_mlm", t5)
    assert "use `task: masked-lm`" in text("lm/wikitext2", bert)
    assert "makes no block of 1024 tokens" in text("lm/wikitext2", gpt2, "few words")
    digits = ["train", "image/digits", "--model_type", "gpt2", "--model_config", "{}"]
    fits_not = "a `gpt2` model does not fit `task: image-classification`"
    assert fits_not in refused(*digits)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--max_length", "129"], "`max_length` must be at most 128 for this model"),
        (
            ["--max_steps", "20", "--episode_length", "21"],
            "most the 20 optimizer steps of this run",
        ),
    ],
)
def test_lengths_that_do_not_fit_are_named(words, says, refused, local):
    assert says in refused("train", *local("rte"), *words)


@pytest.mark.parametrize("command", ["train", "validate", "find-lr"])
@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- a\n", "a recipe is a mapping"),
        ("task: causal-lm\ntask: masked-lm\n", "`task` is set twice"),
        ("model_name_or_path: x\nlearning_rat: 1\n", "did you mean `learning_rate`?"),
    ],
)
def test_a_file_that_is_no_recipe_is_named(command, text, says, refused, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    assert says in refused(command, str(path))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["tran", "glue/sst2"], "Unknown command `tran`; did you mean `train`?"),
        (["-v"], "Unknown option `-v`. `pulseopt-hf --help` lists the commands"),
        (["train", "--resume", "glue/sst2"], "The recipe comes first"),
        (["train", "glue/sst2", "--resume", "--overwrite"], "choose one"),
        (["show"], "arguments are required: RECIPE. `pulseopt-hf show --help`"),
        (["cp", "glue/sst2", "no/such/folder.yaml"], "there is no such folder"),
        (["list", "more"], "unrecognized arguments: more. `pulseopt-hf list --help`"),
    ],
)
def test_a_command_that_is_none_is_named(words: list[str], says: str, refused: Refused) -> None:
    assert says in refused(*words)


@pytest.mark.parametrize("command", ["train", "validate", "show", "find-lr", "compare"])
def test_a_runs_folder_is_no_recipe_and_the_recipe_in_it_is_named(command, refused, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.touch()
    assert f"is a folder; did you mean `{recipe}`?" in refused(command, str(tmp_path))


def test_validate_tells_every_error_of_a_recipe(tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text("model_name_or_path: x\nmax_step: 1\nlr_candidates: []\nseed: -1\n")
    assert main(["validate", str(path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 3


def test_debug_shows_where_an_error_came_from(local, capsys):
    assert main(["train", *local(), "--debug", "--train_file", "gone.csv"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_run_that_fails_has_another_exit_code_and_no_traceback(local, tmp_path, capsys):
    words = ["train", *local(), "--max_steps", "15", "--output_dir", str(tmp_path / "run")]
    assert main([*words, "--learning_rate", "1e30", "--nonfinite", "raise"]) == 1
    error = capsys.readouterr().err
    assert "pulseopt-hf: failed: ValueError: The loss or a gradient is not finite" in error
    assert "Add --debug" in error
    assert "Traceback" not in error
