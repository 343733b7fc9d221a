"""What plots are made of: the strip of episodes, thinned curves, colours."""

from __future__ import annotations

import io
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pulseopt_hf.aees.run_record import Log
from pulseopt_hf.report.arms import ArmStyles
from pulseopt_hf.report.drawing import thinned
from pulseopt_hf.report.figures import learning_rate_plot, loss_plot, plots_of_run
from pulseopt_hf.report.pictures import draw
from pulseopt_hf.report.reading import read_run
from pulseopt_hf.report.tables import tables_of_run
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
    logged = {step: float(f"{value:.6g}") for step, value in whole.loss}
    assert list(loss.y) == pytest.approx([logged[step] for step in loss.x], rel=1e-3)
    assert "the first and the last step loss of each episode" in plot.text


@pytest.mark.parametrize("lowest", [4.9e-5, 2e-5, 2e-6])
def test_a_logarithmic_axis_has_ticks_however_close_its_values_are(
    lowest: float, calibrated: Path
) -> None:
    rates = [Log(1, {"learning_rate": 5e-5}), Log(2, {"learning_rate": lowest})]
    run = replace(read_run(calibrated), logs=rates)
    plot = learning_rate_plot(run, ArmStyles(run.episodes))
    assert plot is not None
    # With `dtick` 1 plotly sets ticks at powers of ten alone.
    assert plot.figure.layout.yaxis.dtick is None
    low, high = (figure := draw(plot)).axes[0].get_ylim()
    figure.savefig(io.BytesIO(), format="png")
    ticks = [t for which in ("major", "minor") for t in figure.axes[0].get_yticklabels(which=which)]
    assert [t for t in ticks if t.get_text() and low <= t.get_position()[1] <= high]


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
    assert max(loss.y) == float(f"{max(value for _, value in run.loss):.6g}")
    (table,) = [table for table in tables_of_run(run) if table.name == "logged"]
    assert table.title == "Logged values, one row in 2"
    assert len(table.rows) == 10_000
