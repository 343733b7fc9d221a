"""The charts: what they hold, and as the files of `pulseopt-hf plot`."""

from __future__ import annotations

import os
import random
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from pulseopt_hf.aees.calibration import NOT_FINITE, Outcome, Trial
from pulseopt_hf.aees.left_out import ArmTotals
from pulseopt_hf.aees.record_format import FILE_NAME, Log, NumberedTrial, encode
from pulseopt_hf.cli import main
from pulseopt_hf.report.charts import Plot, thinned, write_chart
from pulseopt_hf.report.palette import arm_styles
from pulseopt_hf.report.record_reader import read_run
from pulseopt_hf.report.run_charts import plots_of, trials_plot
from pulseopt_hf.report.run_data import RunData
from pulseopt_hf.report.tables import facts, tables_of_run
from tests.report.conftest import ARM_PLOTS, HOSTILE, edit_record

SVG = "{http://www.w3.org/2000/svg}"


def plots(run: RunData) -> dict[str, Plot]:
    return {plot.name: plot for plot in plots_of([run], ["run"])}


def curve(plot: Plot, name: str) -> list[tuple[int, float]]:
    """Return a curve of a plot as it is drawn."""
    rows = [row for key, rows in plot.data.items() if key.startswith("panel") for row in rows]
    return [(row["step"], row["value"]) for row in rows if row["name"] == name]


def marks(file: Path, view: str) -> list[ElementTree.Element]:
    """Return what an SVG draws of a view."""
    groups = [g for g in ElementTree.parse(file).iter(f"{SVG}g") if view in (g.get("class") or "")]
    return [path for group in groups for path in group.iter(f"{SVG}path")]


def texts(file: Path) -> list[str]:
    return [text for text in ElementTree.parse(file).getroot().itertext() if text.strip()]


def tick_labels(file: Path) -> list[ElementTree.Element]:
    groups = [g for g in ElementTree.parse(file).iter(f"{SVG}g")]
    axes = [g for g in groups if "role-axis-label" in (g.get("class") or "")]
    return [text for axis in axes for text in axis.iter(f"{SVG}text")]


def test_every_plot_of_the_page_is_a_file(
    calibrated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "pictures"
    assert main(["plot", str(calibrated), "--out", str(out)]) == 0
    run = read_run(calibrated)
    assert list(plots(run)) == ARM_PLOTS
    assert capsys.readouterr().out.split() == [str(out / f"{name}.svg") for name in ARM_PLOTS]
    assert len(marks(out / "reward.svg", "episodes_marks")) == len(run.episodes)
    assert len(marks(out / "loss.svg", "episodes_marks")) == len(run.episodes)
    assert len(marks(out / "calibration.svg", "trials_marks")) == 2 * len(run.trials)
    assert len(marks(out / "calibration.svg", "found_marks")) == 1
    assert {"effective LR", "base LR", "Loss and learning rate"} <= set(texts(out / "loss.svg"))
    again = tmp_path / "again"
    assert main(["plot", str(calibrated), "--out", str(again)]) == 0
    for name in ARM_PLOTS:
        assert (again / f"{name}.svg").read_bytes() == (out / f"{name}.svg").read_bytes()


def test_png_is_png_and_lies_in_the_runs_folder_unasked(
    eventful: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plot", str(eventful), "--format", "png"]) == 0
    files = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert {file.parent for file in files} == {eventful / "plots"}
    for file in files:
        assert file.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert file.stat().st_size > 5000


def test_with_one_arm_the_calibration_comes_first_and_nothing_is_said_of_arms(
    one_arm: Path,
) -> None:
    run = read_run(one_arm)
    found = plots(run)
    assert list(found) == ["calibration", "loss", "metrics", "gradient-norm", "throughput"]
    assert "episodes" not in found["loss"].data
    assert next(iter(facts(run).items())) == ("learning rate found", f"{run.calibrated_lr:.5g}")
    assert "arms" not in [table.name for table in tables_of_run(run)]
    assert len(curve(found["loss"], "learning rate")) == run.max_steps
    assert len(curve(found["metrics"], "score")) == 2
    assert len(curve(found["gradient-norm"], "gradient norm")) == run.max_steps
    assert all(speed > 0 for _, speed in curve(found["throughput"], "steps per second"))
    assert re.search(r"The LR follows from trials [\d, ]+ of \d+", found["calibration"].text)
    seldom = replace(run, logs=[])
    assert len(curve(plots(seldom)["loss"], "learning rate")) == len(run.episodes)


def test_what_happened_to_episodes_is_marked(eventful: Path, tmp_path: Path) -> None:
    run = read_run(eventful)
    happened = {
        "clipped": sum(run.was_clipped(record) for record in run.episodes),
        "rolled back": sum(record.outcome is not None for record in run.episodes),
        "with skipped steps": sum(count > 0 for count in run.skips()),
    }
    assert min(happened.values()) > 0
    assert main(["plot", str(eventful), "--out", str(tmp_path)]) == 0
    assert len(marks(tmp_path / "reward.svg", "marks_marks")) == sum(happened.values())
    assert happened.keys() <= set(texts(tmp_path / "reward.svg"))
    for name, count in happened.items():
        assert f" {count} episode{'' if count == 1 else 's'} {name}." in plots(run)["reward"].text


def test_several_runs_lie_over_each_other_under_names_that_are_text(
    calibrated: Path, eventful: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plot", str(calibrated), str(eventful)]) == 0
    files = sorted((tmp_path / "plots").iterdir())
    names = ["eval-loss", "gradient-norm", "loss", "throughput"]
    assert [file.name for file in files] == [f"{name}.svg" for name in names]
    for file in files:
        assert not list(ElementTree.parse(file).iter(f"{SVG}script"))
        assert HOSTILE in texts(file)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "required"),
        (["nowhere"], "nowhere"),
        (["RUN", "--format", "gif"], "invalid choice: 'gif'"),
        (["RUN", "--out", "RUN/pulse.jsonl"], "is a file; name a folder"),
        (["RUN", "RUN"], "named twice"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    words: list[str], message: str, calibrated: Path, capsys: Any
) -> None:
    assert main(["plot", *(word.replace("RUN", str(calibrated)) for word in words)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("$x_1$ and \\$y", "$x_1$ and \\$y"),
        ("_under", "_under"),
        ("\x1b[31m\x00\uffff", "\ufffd[31m\ufffd\ufffd"),
        ("\ud800", "\ufffd"),
        ("日本", "日本"),
    ],
)
def test_a_name_is_shown_as_it_is_where_a_picture_may_hold_it(
    name: str, shown: str, finished: Path, calibrated: Path, tmp_path: Path
) -> None:
    edit_record(finished, lambda line: line["kind"] != "head" or line.update(name=name))
    for kind in ("png", "svg"):
        words = [str(finished), str(calibrated), "--out", str(tmp_path), "--format", kind]
        assert main(["plot", *words]) == 0
    assert shown in texts(tmp_path / "loss.svg")


def test_a_picture_is_written_whole_or_not_at_all(
    finished: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A full disk leaves the picture that is there."""
    assert main(["plot", str(finished), "--out", str(small_disk)]) == 0
    before = {file.name: file.read_bytes() for file in small_disk.iterdir()}
    free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    (small_disk / "full").write_bytes(bytes(free))
    capsys.readouterr()
    assert main(["plot", str(finished), "--out", str(small_disk)]) == 2
    assert "cannot be written: No space left" in capsys.readouterr().err
    (small_disk / "full").unlink()
    assert {file.name: file.read_bytes() for file in small_disk.iterdir()} == before


def test_runs_without_curves_are_refused_and_leave_no_folder(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Path(shutil.copytree(finished, tmp_path / "other"))
    for folder in (finished, other):
        edit_record(folder, lambda line: line["kind"] not in ("log", "episode"))
    out = tmp_path / "pictures"
    assert main(["plot", str(finished), str(other), "--out", str(out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "logged neither loss nor LR" in line
    assert not out.exists()


def test_names_of_arms_do_not_overlap(eventful: Path, calibrated: Path, tmp_path: Path) -> None:
    """Long ones, of arms with noise, are slanted; short ones are not."""
    for folder, slanted in ((eventful, True), (calibrated, False)):
        assert main(["plot", str(folder), "--out", str(tmp_path)]) == 0
        labels = {style.label for style in arm_styles(read_run(folder).arms()).values()}
        ticks = [t for t in tick_labels(tmp_path / "plays.svg") if t.text in labels]
        assert {tick.text for tick in ticks} == labels
        assert {"rotate(" in tick.get("transform", "") for tick in ticks} == {slanted}


@pytest.mark.slow
def test_ten_thousand_episodes_make_small_pictures(long: Path, tmp_path: Path) -> None:
    assert main(["plot", str(long), "--out", str(tmp_path)]) == 0
    sizes = {file.name: file.stat().st_size for file in tmp_path.iterdir()}
    assert len(sizes) == 6
    assert max(sizes.values()) < 3_000_000


def test_a_thinned_curve_keeps_its_peaks_and_its_order(long: Path) -> None:
    rng = random.Random(0)
    points = [(step, rng.gauss(0.0, 1.0)) for step in range(50_001)]
    points[12_345] = (12_345, 99.0)
    points[40_000] = (40_000, -99.0)
    kept = thinned(points, most=1000)
    assert 900 < len(kept) <= 1000
    assert kept == sorted(kept)
    assert {(12_345, 99.0), (40_000, -99.0)} <= set(kept) <= set(points)
    assert thinned(points[:1000], most=1000) == points[:1000]
    run = read_run(long)
    loss = curve(plots(run)["loss"], "training loss")
    assert 3000 < len(loss) <= 6000
    highest = max(value for _, value in run.loss)
    assert max(value for _, value in loss) == pytest.approx(highest, rel=1e-7)
    (table,) = [table for table in tables_of_run(run) if table.name == "logged"]
    assert table.title == "Logged values, one row in 2"
    assert len(table.rows) == 10_000


def test_the_shade_has_a_place_for_each_episode_and_none_for_the_calibration(
    calibrated: Path,
) -> None:
    run = read_run(calibrated)
    places = [(row["start"], row["end"]) for row in plots(run)["loss"].data["episodes"]]
    # In steps that are done: an episode from step 100 to 104 lies between 100 and 105.
    assert places == [(r.start_step, r.end_step + 1) for r in run.episodes]
    assert places[0][0] >= run.trials[-1].step + 1


@pytest.mark.parametrize("logs", [0, 1, 10])
def test_a_run_that_logged_seldom_shows_the_losses_of_its_episodes(
    finished: Path, logs: int
) -> None:
    whole = read_run(finished)
    assert not whole.logged_seldom
    kept = [log.step for log in whole.logs if "loss" in log.values][:logs]
    edit_record(finished, lambda line: line["kind"] != "log" or line["step"] in kept)
    run = read_run(finished)
    plot = plots(run)["loss"]
    loss = curve(plot, "training loss")
    assert len(loss) == 2 * len(run.episodes)
    # Of every step the log of the whole run has its loss.
    logged = dict(whole.loss)
    assert loss == [(step, pytest.approx(logged[step], rel=1e-3)) for step, _ in loss]
    assert "the first and the last step loss of each episode" in plot.text


@pytest.mark.parametrize("lowest", [4.9e-5, 2e-5, 2e-6])
def test_a_logarithmic_axis_has_ticks_however_close_its_values_are(
    lowest: float, calibrated: Path, tmp_path: Path
) -> None:
    rates = [Log(1, {"learning_rate": 5e-5}), Log(2, {"learning_rate": lowest})]
    plot = plots(replace(read_run(calibrated), logs=rates, episodes=[]))["loss"]
    write_chart(plot.picture(), tmp_path / "lr.svg")
    ticks = [label.text or "" for label in tick_labels(tmp_path / "lr.svg")]
    assert [t for t in ticks if "e" in t and 0.9 * lowest <= float(t) <= 5.5e-5]


def stars(plot: Plot) -> Sequence[Any]:
    return plot.data.get("star", [])


def shares(plot: Plot, measure: str) -> list[float]:
    return [r["share"] for r in plot.data["trials"] if r["measure"] == f"{measure} moved"]


@pytest.mark.parametrize("factor", [0.5, 4.0])
def test_the_lr_that_was_found_is_marked_where_its_movement_reaches_what_is_allowed(
    factor: float, calibrated: Path
) -> None:
    run = read_run(calibrated)
    assert run.outcome is not None
    found_lr = run.outcome.learning_rate * factor
    run = replace(run, outcome=replace(run.outcome, learning_rate=found_lr, factor=factor))
    found = plots(run)
    plot = found["calibration"]
    assert run.outcome is not None
    assert run.calibrated_lr is not None
    label = f"found: {run.calibrated_lr:.3g}\nlimited by the {run.outcome.limited_by}"
    assert [row["label"] for row in plot.data["rates"]] == ["set: 0.0001", label]
    (star,), (first, last) = stars(plot), plot.data["line"]
    assert star["rate"] == pytest.approx(run.calibrated_lr, rel=1e-7)
    # The limit is reached where the line ends, and the LR lies on it, below or beyond.
    assert star["share"] == factor
    assert last["share"] == max(1.0, star["share"])
    for row in (first, star):
        assert last["share"] / row["share"] == pytest.approx(last["rate"] / row["rate"])
    assert last["measure"] == f"{run.outcome.limited_by} moved"
    assert shares(plot, "outputs") == pytest.approx([t.movement / 3.3 for t in run.trials])
    assert shares(plot, "weights") == pytest.approx([t.weight_movement / 0.25 for t in run.trials])
    assert plot.text.startswith(str(run.outcome))
    said = f"The LR was set to 0.0001 and calibrated to {run.calibrated_lr:.3g}."
    assert said in found["loss"].text
    assert facts(run)["LR that was set"] == "0.0001"
    assert float(facts(run)["learning rate found"]) == pytest.approx(run.calibrated_lr, rel=1e-3)


def test_a_calibration_that_was_taken_back_has_no_lr_and_says_why(finished: Path) -> None:
    """The last outcome of the record counts."""
    found = read_run(finished).outcome
    assert found is not None
    back = Outcome(found.set_lr, found.set_lr, None, "the loss rose", found.step + 20)
    with (finished / FILE_NAME).open("ab") as file:
        file.write(encode(back, 0.0))
    run = read_run(finished)
    assert (run.outcome, run.calibrated_lr) == (back, None)
    assert "learning rate found" not in facts(run)
    plot = plots(run)["calibration"]
    assert not stars(plot)
    assert "the loss rose" in plot.text
    assert plot.title == "Why no learning rate was found"


def test_a_trial_that_broke_the_model_is_within_sight_and_no_percentage() -> None:
    broken = Trial(1.0, NOT_FINITE, NOT_FINITE, True, 0)
    plot = trials_plot([Trial(1e-3, 3.3, 0.01, True, 0), broken], None, None, 1e-3)
    assert shares(plot, "outputs") == [1.0, 1000.0]
    assert plot.data["trials"][1]["outputs moved"] == "inf or NaN"
    assert str(NumberedTrial(2, broken)).endswith("outputs moved inf or NaN, weights inf or NaN")


def test_no_trials_and_no_lr_make_an_empty_picture(tmp_path: Path) -> None:
    plot = trials_plot([], 1e-3, None, 0.0)
    write_chart(plot.altair_chart().to_dict(), tmp_path / "empty.svg")
    assert (plot.data["trials"], stars(plot)) == ([], [])
    assert "the limit" in texts(tmp_path / "empty.svg")


def test_every_arm_has_a_colour_of_its_own() -> None:
    rates, noises = (0.1, 0.5, 1.0, 2.0, 10.0), (0.0, 1e-3, 1e-2)
    styles = arm_styles([ArmTotals(rate, noise) for rate in rates for noise in noises])
    assert list(styles) == [(r, n) for r in rates for n in noises]
    assert len({style.color for style in styles.values()}) == 15
    assert styles[0.1, 1e-3].label == "×0.1, noise 0.001"  # noqa: RUF001
