"""`pulseopt-hf compare`: real runs of tiny models, and the arithmetic of the scores."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pulseopt_hf.cli import main
from pulseopt_hf.compare.cells import EVALUATIONS, steps_after_calibration
from pulseopt_hf.compare.compare import plan_of
from pulseopt_hf.compare.drawing import draw
from pulseopt_hf.compare.scores import DIVERGED, score, tuned_lr
from pulseopt_hf.compare.summary import table, verdict
from tests.recipes.tiny import files_of


def cell(method: str, lr: float, seed: int, loss: float | None, seconds: float = 1.0) -> Any:
    return {
        "cell": {"method": method, "learning_rate": lr, "seed": seed, "steps": 10},
        "loss_before": 3.0,
        "loss_after": loss,
        "steps": 10,
        "seconds": seconds,
        "peak_mib": 100.0,
        "lr_scale": None,
    }


@pytest.fixture
def words(bert: str, tmp_path: Path) -> list[str]:
    """Return a comparison on tiny data, which is evaluated on the rows that it trains on."""
    files = files_of("cola", tmp_path)
    files[files.index("--validation_file") + 1] = files[files.index("--train_file") + 1]
    found = ["compare", "glue/cola", "--model_name_or_path", bert, *files, "--use_cpu"]
    return [*found, "--seeds", "0", "--out", str(tmp_path / "out")]


def test_scores_by_hand() -> None:
    static = [
        cell("static", lr, s, loss) for s in (0, 1) for lr, loss in ((1e-4, 2.0), (1e-3, 1.0))
    ]
    far = [cell("static", 1e-6, s, 2.9) for s in (0, 1)]  # beyond a thirtieth of the tuned LR
    new = [cell("new", 1e-4, s, 1.2 + 0.2 * s, 2.0) for s in (0, 1)]
    new += [cell("new", 1e-3, s, None if s else 1.1, 2.0) for s in (0, 1)]
    scores = score([*static, *far, *new])
    assert (scores.tuned, scores.loss_before, scores.loss_tuned) == (1e-3, 3.0, 1.0)
    one, other = scores.scores
    assert (one.method, one.harm, one.robustness, one.worst) == ("static", 0.0, 0.25, 0.5)
    assert other.harm == pytest.approx((0.05 + DIVERGED) / 2)
    assert other.robustness == pytest.approx(((0.1 + 0.05) / 2 + (0.2 + DIVERGED) / 2) / 2)
    assert other.low <= other.robustness <= other.high
    assert other.seconds == pytest.approx(2.0)


def test_a_loss_beyond_all_bounds_counts_as_diverged() -> None:
    scores = score([cell("static", 1e-3, 0, 1.0), cell("static", 1e-2, 0, 1e9)])
    assert scores.scores[0].worst == DIVERGED


@pytest.mark.parametrize(
    "grid", [[1e-4, 3e-4, 1e-3], [2e-4, 3e-4, 1e-3], [1e-5, 1e-4, 3e-4, 1e-3, 1e-2]]
)
def test_a_parabola_over_log_lr_is_found_again_whatever_the_grid(grid: list[float]) -> None:
    losses = {lr: 1.0 + math.log(lr / 4.2e-4) ** 2 for lr in grid}
    assert tuned_lr(losses) == pytest.approx(4.2e-4)


@pytest.mark.parametrize(
    "losses",
    [
        {1e-5: 2.0, 1e-4: 1.0, 1e-3: 1.5},  # neighbours too far for a parabola
        {1e-4: 1.0, 3e-4: 1.5},  # the best lies at the edge
        {3e-5: 2.0, 1e-4: 1.0, 3e-4: math.inf},
    ],
)
def test_without_a_parabola_the_best_lr_of_the_grid_counts(losses: dict[float, float]) -> None:
    assert tuned_lr(losses) == 1e-4


def test_the_metric_is_scored_at_the_end_and_at_the_best_evaluation() -> None:
    static = {**cell("static", 1e-3, 0, 1.0), "metric": "accuracy"}
    static["evaluations"] = [(5, 1.5, 0.7), (10, 1.0, 0.9)]
    new = {**cell("new", 1e-3, 0, 2.0), "metric": "accuracy"}
    new["evaluations"] = [(5, 1.2, 0.85), (10, 2.0, 0.8)]
    scores = score([static, new])
    assert (scores.metric, scores.metric_tuned) == ("accuracy", 0.9)
    row = scores.scores[1]
    assert (row.robustness, row.metric) == (0.5, 0.8)
    assert (row.best, row.best_metric) == (pytest.approx(0.1), 0.85)


def test_nothing_to_measure_against_is_an_error() -> None:
    with pytest.raises(ValueError, match="needs static runs"):
        score([cell("new", 1e-3, 0, 1.0)])
    with pytest.raises(ValueError, match="No static run learned anything"):
        score([cell("static", 1e-3, 0, 3.5)])


def test_a_picture_has_a_panel_for_each_task(tmp_path: Path) -> None:
    cells = [cell("static", 1e-3, 0, 1.0), cell("static", 1e-2, 0, 2.0)]
    tasks = {name: (cells, asdict(score(cells))) for name in "abcd"}
    assert draw(tasks, tmp_path / "tasks.svg")
    assert (tmp_path / "tasks.svg").read_text().count(">base learning rate</text>") == len(tasks)


@pytest.mark.parametrize(
    ("rows", "steps", "batch", "left"),
    [
        (480, 600, 16, 590),  # three rows that go forward cost as much as one that is trained on
        (481, 600, 16, 589),
        (480, 600, 32, 595),
        (480, 49, 16, 49),  # too short to be calibrated, so it pays nothing
        (480, 55, 16, 50),  # and no other becomes so
    ],
)
def test_what_a_calibration_takes_is_paid_for(rows: int, steps: int, batch: int, left: int) -> None:
    asked = SimpleNamespace(find_learning_rate=lambda: SimpleNamespace(replayed_rows=rows))
    assert steps_after_calibration(asked, steps, batch) == left


def test_a_comparison_is_run_kept_and_written(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words += ["--per_device_train_batch_size", "16", "--steps", "70"]
    words += ["--learning_rates", "3e-5,1e-3"]
    methods = "published,pulseopt,default"
    assert main([*words, "--methods", methods]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("8 runs of 70 steps: `static`, `published`, `pulseopt`, `default` at ")
    before = shown.split("\n1/8  static at 3e-05, seed 0: ")[0]
    assert "whether `published` or `pulseopt` or `default` ends lower than `static` at " in before
    assert re.search(r"\nAbout \d+ (s|min); Ctrl-C stops", before)
    assert "8/8  default at 0.001, seed 0: eval loss" in shown
    content = json.loads((tmp_path / "out/compare.json").read_text())
    assert [row["method"] for row in content["scores"]["scores"]] == ["static", *methods.split(",")]
    for result in content["cells"]:
        # What a calibration takes is paid for in steps.
        calibrated = result["cell"]["method"] == "default"
        assert (0 < result["paid_steps"] <= 20) == calibrated
        assert (result["lr_scale"] is not None) == calibrated
        assert result["steps"] == 70 - result["paid_steps"]
    last = content["cells"][1]["evaluations"][-1]
    assert -1.0 <= last[2] <= 1.0
    found = {
        cell["lr_scale"] * cell["cell"]["learning_rate"]
        for cell in content["cells"]
        if cell["cell"]["method"] == "default"
    }
    assert max(found) < 2 * min(found)  # whatever LR was set
    # The package itself and its twin of this project end in the same place.
    losses = {
        method: [c["loss_after"] for c in content["cells"] if c["cell"]["method"] == method]
        for method in ("static", "published", "pulseopt")
    }
    assert losses["published"] == losses["pulseopt"] != losses["static"]
    page = (tmp_path / "out/compare.md").read_text()
    said = page.splitlines()[0]
    assert re.match(r"At your learning rate of 3e-05 the default ends \S+ (low|high)er", said)
    assert f"\n{said}\n" in shown
    assert "which it found, and a sweep would have found " in said
    assert "| default | " in page
    assert "| method | robustness | " in page
    assert re.search(r"\nmethod +final eval loss from 3e-05 .* matthews_correlation from", shown)
    assert re.search(r"\nuntrained +\d", shown)
    assert shown.count(str(tmp_path / "out")) == 1
    for result in content["cells"]:
        assert result["metric"] == "matthews_correlation"
        steps, _, values = zip(*result["evaluations"], strict=True)
        assert steps[-1] == result["steps"]
        assert None not in values
        assert len(steps) >= EVALUATIONS
    picture = (tmp_path / "out/compare.svg").read_text()
    assert "<svg" in picture
    assert picture.count("<path") > 20

    # Done cells are not run again, a lost one is.
    cells = sorted((tmp_path / "out/cells").iterdir())
    assert len(cells) == 8
    cells[0].unlink()
    before = {file: file.stat().st_mtime_ns for file in cells[1:]}
    assert main([*words, "--methods", methods]) == 0
    assert "\n1 run to go. About " in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in cells[1:]} == before
    again = json.loads((tmp_path / "out/compare.json").read_text())
    for one, other in zip(content["cells"], again["cells"], strict=True):
        assert one["loss_after"] == other["loss_after"]


@pytest.mark.slow
def test_at_a_base_lr_of_zero_nothing_is_calibrated_or_paid_for(
    words: list[str], tmp_path: Path
) -> None:
    words += ["--steps", "50", "--learning_rates", "0,1e-3", "--methods", "default"]
    assert main(words) == 0
    cells = json.loads((tmp_path / "out/compare.json").read_text())["cells"]
    zero, other = (cell for cell in cells if cell["cell"]["method"] == "default")
    assert (zero["lr_scale"], zero["paid_steps"], zero["steps"]) == (None, 0, 50)
    assert zero["loss_after"] == zero["loss_before"]
    assert other["lr_scale"] > 0.0


@pytest.mark.slow
def test_what_is_stopped_goes_on_where_it_was(words: list[str], tmp_path: Path) -> None:
    words += ["--steps", "60", "--learning_rates", "1e-3,1e-2"]
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "pulseopt_hf", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    while not process.stdout.readline().startswith("1/4"):
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to parent and child
    _, errors = process.communicate()
    assert process.returncode == 1
    left = re.search(
        r"^pulseopt-hf: stopped with ([123]) runs? to go\. Finished runs are kept: the same "
        r"command continues from there\.$",
        errors,
        re.M,
    )
    assert left is not None, errors
    assert "Traceback" not in errors
    done = list((tmp_path / "out/cells").iterdir())
    assert len(done) == 4 - int(left[1])
    before = {file: file.stat().st_mtime_ns for file in done}
    assert main(words) == 0
    assert len(list((tmp_path / "out/cells").iterdir())) == 4
    assert {file: file.stat().st_mtime_ns for file in done} == before


def test_the_grid_is_about_the_users_learning_rate_and_thorough_takes_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    short = plan_of(["quickstart/lm", "--learning_rate", "1e-4"])
    assert short.own_lr == 1e-4
    assert short.learning_rates == pytest.approx([2.5e-5, 1e-4, 4e-4, 1.6e-3, 6.4e-3])
    assert (short.methods, short.seeds, short.steps) == (["static", "default"], [0], 200)
    thorough = plan_of(["quickstart/lm", "--thorough", "--seeds", "7"])
    assert len(thorough.learning_rates) == 8  # and 5e-5, the recipe's own
    assert (len(thorough.methods), thorough.seeds, thorough.steps) == (4, [7], 600)
    assert len(thorough.runs) == 32
    own = plan_of(["quickstart/lm", "--learning_rates", "1e-3,1e-2", "--methods", "prodigy"])
    assert own.own_lr == 1e-3  # the recipe's is not among them
    assert (len(own.cells), len(own.runs)) == (4, 3)  # Prodigy ignores the base LR


@pytest.mark.parametrize(
    ("static", "other", "said"),
    [
        (1.5, 1.47, "the default ends 0.03 lower than static; a sweep"),
        (1.5, 1.75, "the default ends 0.25 higher than static; a sweep"),
        (1.5, 1.5002, "the default ends where static does; a sweep"),
        (None, 1.5, "the default ends at 1.5000 and static diverges; a sweep"),
        (1.5, None, "the default diverges and static ends at 1.5000; a sweep"),
    ],
)
def test_one_sentence_says_it(static: float | None, other: float | None, said: str) -> None:
    cells = [cell("static", 1e-4, 0, static), cell("static", 1e-3, 0, 1.0)]
    cells += [cell("default", rate, 0, other) for rate in (1e-4, 1e-3)]
    sentence = verdict(cells, score(cells), 1e-4)
    end = " would have found 0.001, the highest that was tried."
    assert sentence == f"At your learning rate of 0.0001 {said}{end}"


def test_it_says_what_was_found_and_what_there_is_without_another_method() -> None:
    rates = (1e-4, 3e-4, 1e-3)
    cells = [cell("static", rate, 0, abs(rate - 3e-4) + 1.0) for rate in rates]
    only = verdict(cells, score(cells), 1e-4)
    assert re.fullmatch(r"At your .* 0.0001 static ends at 1.0002; a sweep .* found \S+\.", only)
    cells += [{**cell("default", rate, 0, 0.9), "lr_scale": 2.5e-4 / rate} for rate in rates]
    cells += [cell("random", rate, 0, 1.2) for rate in rates]
    said = verdict(cells, score(cells), 1e-4)
    assert "lower than static: it trained at 0.00025, which it found, and a sweep" in said
    rows = table(cells, score(cells), 1e-4)
    assert [row[0] for row in rows] == ["method", "untrained", "static", "default", "random"]
    assert rows[2][1:4] == ("1.0002", "1.0000 (0.0003)", "1.0007 (0.001)")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "The recipe comes first"),
        (["glue/cola", "--learning_rate", "0"], "name some with `--learning_rates`"),
        (["glue/cola", "--methods", "statik"], "Unknown method `statik`"),
        (["glue/cola", "--seeds", "a"], "`--seeds` takes whole numbers"),
        (["glue/cola", "--seeds", "0.5"], "`--seeds` takes whole numbers"),
        (["glue/cola", "--learning_rates", "-1e-4"], "takes numbers >= 0"),
        (["glue/cola", "--learning_rates", "nan"], "`--learning_rates` takes numbers"),
        (["glue/cola", "--steps", "0"], "`--steps` must be at least 1"),
        (["glue/cola", "--steps", "x"], "invalid int value"),
        (["glue/colla"], "colla"),
        (
            ["glue/cola", "--train_file", "gone.csv", "--validation_percentage=5"],
            "gone.csv: there is no such file",
        ),
        (["glue/cola", "--lerning_rate", "1"], "unknown option `--lerning_rate`"),
    ],
)
def test_bad_usage(words: list[str], message: str, refused: Callable[..., str]) -> None:
    assert message in refused("compare", *words)
