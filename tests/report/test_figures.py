"""What plots are made of: the strip of episodes, thinned curves, colours."""

from __future__ import annotations

import io
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pulseopt_hf.aees.calibration import NOT_FINITE, Outcome, Trial
from pulseopt_hf.aees.run_record import FILE_NAME, Log, encode
from pulseopt_hf.report.arms import ArmStyles
from pulseopt_hf.report.drawing import thinned
from pulseopt_hf.report.figures import (
    calibration_plot,
    learning_rate_plot,
    loss_plot,
    plots_of_run,
    trials_figure,
)
from pulseopt_hf.report.pictures import draw
from pulseopt_hf.report.reading import read_run
from pulseopt_hf.report.tables import facts, tables_of_run
from pulseopt_hf.report.wording import trial_line
from tests.report.conftest import edit_record


def test_a_thinned_curve_keeps_its_peaks_and_its_order() -> None:
    rng = random.Random(0)
    curve = [(step, rng.gauss(0.0, 1.0)) for step in range(50_001)]
    curve[12_345] = (12_345, 99.0)
    curve[40_000] = (40_000, -99.0)
    kept = thinned(curve, most=1000)
    assert 900 < len(kept) <= 1000
    assert kept == sorted(kept)
    assert {(12_345, 99.0), (40_000, -99.0)} <= set(kept) <= set(curve)
    assert thinned(curve[:1000], most=1000) == curve[:1000]


def test_the_strip_has_a_cell_for_each_episode_and_none_for_the_calibration(
    calibrated: Path,
) -> None:
    run = read_run(calibrated)
    styles = ArmStyles(run.episodes)
    plot = loss_plot(run, styles)
    assert plot is not None
    strip = plot.figure.data[0]
    edges, cells = list(strip.x), list(strip.z[0])
    assert len(edges) == len(cells) + 1
    assert cells == [styles.index(record) for record in run.episodes]
    # In steps that are done: an episode from step 100 to 104 lies between 100 and 105.
    assert edges[0] == run.episodes[0].start_step >= run.trials[-1].step + 1
    assert edges[1:] == [record.end_step + 1 for record in run.episodes]


def test_a_run_that_logged_nothing_shows_the_losses_of_its_episodes(finished: Path) -> None:
    whole = read_run(finished)
    assert not whole.logged_seldom
    edit_record(finished, lambda line: line["kind"] != "log")
    run = read_run(finished)
    plot = loss_plot(run, ArmStyles(run.episodes))
    assert plot is not None
    (loss,) = [trace for trace in plot.figure.data if trace.name == "training loss"]
    assert len(loss.x) == 2 * len(run.episodes)
    # Of every step the log of the whole run has its loss.
    logged = {step: float(f"{value:.8g}") for step, value in whole.loss}
    assert list(loss.y) == pytest.approx([logged[step] for step in loss.x], rel=1e-3)
    assert "the first and the last step loss of each episode" in plot.text


@pytest.mark.parametrize("lowest", [4.9e-5, 2e-5, 2e-6])
def test_a_logarithmic_axis_has_ticks_however_close_its_values_are(
    lowest: float, calibrated: Path
) -> None:
    rates = [Log(1, {"learning_rate": 5e-5}), Log(2, {"learning_rate": lowest})]
    run = replace(read_run(calibrated), logs=rates, episodes=[])
    plot = learning_rate_plot(run, ArmStyles(run.episodes))
    assert plot is not None
    # With `dtick` 1 plotly sets ticks at powers of ten alone.
    assert plot.figure.layout.yaxis.dtick is None
    low, high = (figure := draw(plot)).axes[0].get_ylim()
    figure.savefig(io.BytesIO(), format="png")
    ticks = [t for which in ("major", "minor") for t in figure.axes[0].get_yticklabels(which=which)]
    assert [t for t in ticks if t.get_text() and low <= t.get_position()[1] <= high]


def test_the_lr_that_was_found_is_marked_where_its_movement_reaches_what_is_allowed(
    calibrated: Path,
) -> None:
    run = read_run(calibrated)
    plot = calibration_plot(run, ArmStyles(run.episodes))
    assert plot is not None
    outputs, weights, star = plot.figure.data
    assert run.outcome is not None
    assert star.name == f"found: {run.calibrated_lr:.3g}, limited by the {run.outcome.limited_by}"
    assert (*star.x, *star.y) == (pytest.approx(run.calibrated_lr, rel=1e-5), 1.0)
    assert list(outputs.y) == pytest.approx([t.movement / 0.03 for t in run.trials], rel=1e-5)
    assert list(weights.y) == pytest.approx(
        [t.weight_movement / 0.25 for t in run.trials], rel=1e-5
    )
    assert plot.text.endswith(str(run.outcome))
    rate = learning_rate_plot(run, ArmStyles(run.episodes))
    assert rate is not None
    assert rate.text.startswith(
        f"The LR was set to 0.0001 and calibrated to {run.calibrated_lr:.3g}."
    )
    assert dict(facts(run))["LR that was set"] == "0.0001"
    assert float(dict(facts(run))["calibrated LR"]) == pytest.approx(run.calibrated_lr, rel=1e-3)


def test_a_calibration_that_was_taken_back_has_no_lr_and_says_why(finished: Path) -> None:
    """The last outcome of the record counts."""
    found = read_run(finished).outcome
    assert found is not None
    reason = "the loss rose"
    back = Outcome(found.set_lr, found.set_lr, None, reason, found.step + 20)
    with (finished / FILE_NAME).open("ab") as file:
        file.write(encode(back, 0.0))
    run = read_run(finished)
    assert run.outcome == back
    assert run.calibrated_lr is None
    assert "calibrated LR" not in dict(facts(run))
    plot = calibration_plot(run, ArmStyles(run.episodes))
    assert plot is not None
    assert [trace.name for trace in plot.figure.data] == ["outputs moved", "weights moved"]
    assert reason in plot.text


def test_a_trial_that_broke_the_model_is_within_sight_and_no_percentage() -> None:
    broken = Trial(1.0, NOT_FINITE, NOT_FINITE, True, 0)
    figure = trials_figure([Trial(1e-3, 0.03, 0.01, True, 0), broken], None, None)
    assert list(figure.data[0].y) == [1.0, 1000.0]
    assert figure.data[0].customdata[1][2] == "inf or NaN"
    assert trial_line(2, broken).endswith("moved outputs by inf or NaN, weights by inf or NaN")


def test_no_trials_and_no_lr_make_an_empty_figure() -> None:
    figure = trials_figure([], 1e-3, None)
    assert [list(trace.x) for trace in figure.data] == [[], []]


def test_every_arm_has_a_colour_of_its_own(calibrated: Path) -> None:
    (record, *_) = read_run(calibrated).episodes
    rates, noises = (0.1, 0.5, 1.0, 2.0, 10.0), (0.0, 1e-3, 1e-2)
    styles = list(
        ArmStyles([replace(record, lr_value=r, noise_value=n) for r in rates for n in noises])
    )
    assert len(styles) == 15
    assert len({style.color for style in styles}) == 15
    assert styles[1].label == "×0.1, noise 0.001"  # noqa: RUF001


def test_a_long_runs_curves_are_thinned_and_its_table_says_so(long: Path) -> None:
    run = read_run(long)
    plots: dict[str, Any] = {plot.name: plot.figure for plot in plots_of_run(run)}
    (loss,) = [trace for trace in plots["loss"].data if trace.name == "training loss"]
    assert 3000 < len(loss.x) <= 6000
    assert max(loss.y) == float(f"{max(value for _, value in run.loss):.8g}")
    (table,) = [table for table in tables_of_run(run) if table.name == "logged"]
    assert table.title == "Logged values, one row in 2"
    assert len(table.rows) == 10_000
