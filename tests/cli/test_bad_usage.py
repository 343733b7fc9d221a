"""What a user can get wrong: one clear line each, exit code 2, and nothing written."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from pulseopt_hf.cli import main
from pulseopt_hf.recipes import keys
from tests.recipes.tiny import write_glue

Refused = Callable[..., str]
Local = Callable[..., list[str]]


@pytest.fixture
def local(tmp_path: Path, bert: str) -> Local:
    """Return the words that train on local files, with some of their lines replaced."""

    def words(task: str = "rte", model: str = "", **content: str) -> list[str]:
        files = write_glue(tmp_path / "data", task)
        for split, text in content.items():
            files[split].write_text(text)
        return [
            *("train", f"glue/{task}", "--model_name_or_path", model or bert, "--use_cpu"),
            *("--train_file", str(files["train"]), "--validation_file", str(files["validation"])),
        ]

    return words


ROWS = "sentence1,sentence2,label\n" + "the film,a story,0\nthe scene,a film,1\n" * 4


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"train": ""}, "train.csv: is empty"),
        ({"train": "sentence1,sentence2,label\n"}, "has no rows"),
        (
            {"train": ROWS.replace("sentence2", "sentense2")},
            "has no column `sentence2`; did you mean `sentense2`?",
        ),
        (
            {"train": ROWS + "x,y,2\n"},
            "row 9 has the label 2 in `label`; labels are 0 to 1, or `entailment`, "
            "`not_entailment`",
        ),
        ({"train": ROWS + "x,y,-1\n"}, "row 9 has the label -1"),
        ({"train": ROWS + "x,y,maybe\n"}, "row 9 has the label 'maybe'"),
        ({"train": ROWS + "x,y,\n"}, "row 9 has the label ''"),
        ({"train": ROWS + "x,y,0.5\n"}, "has the label 0.0"),
        ({"validation": ROWS + "x,y,7\n"}, "validation.csv: row 9 has the label 7"),
        (
            {"validation": "a,b,label\n1,2,1\n"},
            "validation.csv: has no columns `sentence1`, `sentence2`; its columns are `a`, `b`, "
            "`label`",
        ),
        ({"validation": "sentence1,label\na,1\n"}, "validation.csv: has no column `sentence2`"),
        ({"train": 'sentence1,sentence2,label\n"a,b,c\n'}, "cannot be read as csv"),
    ],
)
def test_data_that_does_not_fit_is_named(
    content: dict[str, str], says: str, refused: Refused, local: Local
) -> None:
    assert says in refused(*local(**content))


@pytest.mark.parametrize("value", ["7", "-1", "warm", ""])
def test_a_regressions_label_out_of_range_is_named(
    value: str, refused: Refused, local: Local
) -> None:
    line = refused(*local("stsb", train=ROWS + f"x,y,{value}\n"))
    assert "row 9 has the label" in line
    assert "labels are numbers from 0 to 5" in line


def test_a_missing_file_is_named(refused: Refused, local: Local) -> None:
    assert "`train_file` gone.csv: there is no such file" in refused(
        *local(), "--train_file=gone.csv"
    )
    assert "must be one of csv, tsv" in refused(*local(), f"--train_file={__file__}")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--train_file", "gone.csv"], "`train_file` gone.csv: there is no such file"),
        (["--validation_file", "gone.csv"], "`validation_file` gone.csv: there is no such file"),
        (["--do_predict"], "`test_file` is not set"),
        (["--report_to", "wandbb"], "unknown tracker `wandbb`; did you mean `wandb`?"),
        (["--report_to", "none", "x"], "unknown tracker `x`. Trackers are"),
    ],
)
def test_what_train_refuses_validate_refuses_too(
    words: list[str], says: str, refused: Refused, local: Local
) -> None:
    for command in ("validate", "train"):
        assert says in refused(command, *local()[1:], *words)
        assert "There is no data" in refused(command, "lm/text_file")
        line = refused(command, "quickstart/lm", "--dataset_name", "embedded:sentence")
        assert "did you mean `embedded:sentences`?" in line
        line = refused(command, "quickstart/lm", "--model_type", "gpt3", "--model_config", "{}")
        assert "`model_type`: `gpt3` cannot be made" in line
        assert "`max_steps`: invalid int value: 'x'" in refused(
            command, "lm/wikitext2", "--max_steps=x"
        )


def test_a_tracker_that_is_not_installed_is_named(
    refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "get_available_reporting_integrations", lambda: ["wandb"])
    line = refused("train", "quickstart/lm", "--report_to", "wandb", "mlflow")
    assert line.endswith("`report_to`: `mlflow` is not installed.")


def test_half_of_the_local_files_is_not_enough(refused: Refused, local: Local) -> None:
    words = local()[:-2]
    assert "`validation_file` is not set" in refused(*words)
    assert "`test_file` is not set" in refused(*local(), "--do_predict")
    assert "There is no data" in refused("train", "lm/text_file")


def test_a_name_that_the_hub_would_have_is_named_offline(
    refused: Refused, local: Local, bert: str
) -> None:
    assert "nyu-mll/glue (rte) could not be loaded from the hub or its local cache" in refused(
        "train", "glue/rte", "--model_name_or_path", bert
    )
    assert "HF_HUB_OFFLINE is set" in refused("train", "glue/rte", "--model_name_or_path", bert)
    line = refused(*local(model="google-bert/bert-base-cased"))
    assert "google-bert/bert-base-cased" in line


def test_a_tokenizer_without_a_pad_token_is_named_and_can_be_given_one(
    refused: Refused, local: Local, gpt2: str, tmp_path: Path
) -> None:
    line = refused(*local(model=gpt2))
    fix = re.search(r"such as `pad_token: '(.*)'`", line)
    assert fix is not None
    assert "'nothing' is not a token" in refused(*local(model=gpt2), "--pad_token", "nothing")
    fixed = [*local(model=gpt2), "--pad_token", fix[1], "--max_steps", "15", "--quiet"]
    assert main([*fixed, "--output_dir", str(tmp_path / "run")]) == 0


def test_a_model_that_does_not_fit_the_task_is_named(
    refused: Refused, local: Local, bert: str, t5: str, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the film was a story\n" * 500)
    files = ["--train_file", str(text), "--validation_file", str(text)]
    line = refused("train", "lm/wikitext2_mlm", "--model_name_or_path", t5, *files)
    assert "a `t5` model does not fit `task: masked-lm`" in line
    line = refused("train", "lm/wikitext2", "--model_name_or_path", bert, *files)
    assert "use `task: masked-lm`" in line
    digits = ["train", "image/digits", "--model_type", "gpt2", "--model_config", "{}"]
    assert "a `gpt2` model does not fit `task: image-classification`" in refused(*digits)


def test_lengths_that_do_not_fit_are_named(
    refused: Refused, local: Local, gpt2: str, tmp_path: Path
) -> None:
    assert "`max_length` must be at most 128 for this model" in refused(
        *local(), "--max_length", "129"
    )
    assert "`episode_length` must be at most the 20 optimizer steps of this run, got 21" in refused(
        *local(), "--max_steps", "20", "--episode_length", "21"
    )
    text = tmp_path / "text.txt"
    text.write_text("few words")
    files = ["--train_file", str(text), "--validation_file", str(text)]
    line = refused("train", "lm/wikitext2", "--model_name_or_path", gpt2, *files)
    assert "makes no block of 1024 tokens" in line


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- a\n", "a recipe is a mapping"),
        ("task: causal-lm\ntask: masked-lm\n", "`task` is set twice"),
        ("a: &a [*a, *a]\n", "aliases such as `*a` are not allowed"),
        ("# filler\n" * 1_200_000, "10,800,000 bytes long"),
        ("model_name_or_path: x\nlearning_rat: 1\n", "did you mean `learning_rate`?"),
    ],
)
@pytest.mark.parametrize("command", ["train", "validate", "find-lr"])
def test_a_file_that_is_no_recipe_is_named(
    command: str, text: str, says: str, refused: Refused, tmp_path: Path
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    assert says in refused(command, str(path))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["tran", "glue/sst2"], "did you mean `train`?"),
        (["-v"], "Unknown option `-v`. `pulseopt-hf --help` lists the commands"),
        (["train", "glue/sst2", "-v"], "unexpected `-v`, which belongs to no option"),
        (["train", "glue/sst22"], "did you mean `glue/sst2`?"),
        (["train", "gone.yaml"], "gone.yaml: there is no such file"),
        (["train"], "The recipe comes first"),
        (["train", "--resume", "glue/sst2"], "The recipe comes first"),
        (["train", "glue/sst2", "--resume", "--overwrite"], "choose one"),
        (["train", "launch/ddp"], "is a launch profile"),
        (["show"], "arguments are required: RECIPE. `pulseopt-hf show --help`"),
        (["cp", "glue/sst2", "no/such/folder.yaml"], "there is no such folder"),
        (["list", "more"], "unrecognized arguments: more. `pulseopt-hf list --help`"),
    ],
)
def test_a_command_that_is_none_is_named(words: list[str], says: str, refused: Refused) -> None:
    assert says in refused(*words)


def test_a_runs_folder_is_no_recipe_and_the_recipe_in_it_is_named(
    refused: Refused, tmp_path: Path
) -> None:
    run = tmp_path / "quickstart-lm"
    run.mkdir()
    (run / "recipe.yaml").touch()
    for command in ("train", "validate", "show", "find-lr", "compare"):
        assert f"is a folder; did you mean `{run / 'recipe.yaml'}`?" in refused(command, str(run))


def test_validate_tells_every_error_of_a_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("model_name_or_path: x\nmax_step: 1\nlr_candidates: []\nseed: -1\n")
    assert main(["validate", str(path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 3


def test_debug_shows_where_an_error_came_from(
    local: Local, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*local(), "--debug", "--train_file", "gone.csv"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_run_that_fails_has_another_exit_code_and_no_traceback(
    local: Local, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    words = [*local(), "--quiet", "--max_steps", "15", "--output_dir", str(folder)]
    assert main([*words, "--learning_rate", "1e30", "--nonfinite", "raise"]) == 1
    error = capsys.readouterr().err
    assert "pulseopt-hf: failed: ValueError: The loss or a gradient is not finite" in error
    assert "Add --debug" in error
    assert "Traceback" not in error
