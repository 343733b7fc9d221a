"""The page, opened in a real browser as a person would."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pulseopt_hf.cli import main
from pulseopt_hf.report.page import to_html
from pulseopt_hf.report.record_reader import read_run
from pulseopt_hf.report.tables import comparison_table
from tests.report.conftest import ARM_PLOTS, DESKTOP, HOSTILE, PHONE, Opened

Open = Callable[..., Opened]

# Of a plot: how many marks each view has, a curve being one, and where its picture lies.
DRAWN = """(element) => {
  const marks = {};
  const walk = (item) => {
    const count = item.marktype === "line" ? 1 : item.items?.length;
    if (item.name) marks[item.name] = (marks[item.name] ?? 0) + count;
    for (const child of item.items ?? []) walk(child);
  };
  walk(element.drawn.view.scenegraph().root);
  const box = element.querySelector("svg, canvas").getBoundingClientRect();
  const buttons = element.parentElement.querySelector("header").getBoundingClientRect();
  const isCutOff = (text) => {
    const { left, right, top, bottom } = text.getBoundingClientRect();
    return left < box.left || right > box.right || top < box.top || bottom > box.bottom;
  };
  const cutOff = [...element.querySelectorAll("text")].filter(isCutOff);
  return {
    marks, right: box.right, width: box.width, below: box.top - buttons.bottom,
    cutOff: cutOff.map((text) => text.textContent),
  };
}"""

# Which labels of learning rates lie on a trial's mark.
COVERED = """() => {
  const boxes = (marks) => [...document.querySelectorAll(`#run1-calibration ${marks}`)]
    .map((mark) => mark.getBoundingClientRect());
  const meet = (a, b) =>
    a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
  const labels = boxes(".role-mark.mark-text text:not([stroke-width])");
  const marks = boxes(".trials_marks path");
  return [labels.length, marks.length, labels.filter((a) => marks.some((b) => meet(a, b))).length];
}"""


# The texts that stand out too little from what is behind them, by WCAG's ratio.
FAINT = """() => {
  const linear = (part) => (part <= 10 ? part / 3294 : ((part / 255 + 0.055) / 1.055) ** 2.4);
  const light = (color) => {
    const [red, green, blue] = color.match(/\\d+/g).map((part) => linear(Number(part)));
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  };
  const behind = (element) => {
    const color = getComputedStyle(element).backgroundColor;
    return color === "rgba(0, 0, 0, 0)" ? behind(element.parentElement) : color;
  };
  const ratio = (element) => {
    const style = getComputedStyle(element);
    const ink = element.tagName === "text" ? style.fill : style.color;
    const [low, high] = [light(ink), light(behind(element))].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };
  const texts = "text:not([stroke-width]), h1, h3, p, dt, dd, button, label, figcaption, summary";
  const all = [...document.querySelectorAll(texts)];
  return [all.length, all.filter((one) => ratio(one) < 4.5).map((one) => one.textContent)];
}"""


@pytest.fixture(scope="session")
def page_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that writes the page of runs, once for each set of them."""
    made: dict[tuple[Path, ...], Path] = {}

    def make(*runs: Path) -> Path:
        if runs not in made:
            file = tmp_path_factory.mktemp("pages") / "page.html"
            assert main(["report", *map(str, runs), "--out", str(file)]) == 0
            made[runs] = file
        return made[runs]

    return make


def drawn(opened: Opened) -> dict[str, dict[str, Any]]:
    elements = opened.page.query_selector_all(".canvas")
    return {element.get_attribute("id"): element.evaluate(DRAWN) for element in elements}


def until(page: Any, expression: str) -> None:
    """Wait until something is so. Playwright's own way needs `eval`, which the page forbids."""
    deadline = time.monotonic() + 10
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, expression
        page.wait_for_timeout(50)


def hover(opened: Opened, marks: str, index: int = 0, *, down: float = 0.5) -> str:
    """Point at one of the marks and return what the hover says."""
    part = opened.page.locator(f"{marks} path").nth(index)
    part.scroll_into_view_if_needed()
    box = part.bounding_box()
    return point_at(opened, box["x"] + box["width"] / 2, box["y"] + box["height"] * down)


def zero(page: Any, plot: str) -> float:
    """Return how far down in a plot with a value axis 0 lies, as a share of its height."""
    view = f"document.getElementById('{plot}').drawn.view"
    down = f"({view}.scale('y')(0) + {view}.origin()[1]) / {view}._viewHeight"
    share: float = page.evaluate(down)
    return share


def point_at(opened: Opened, x: float, y: float) -> str:
    page = opened.page
    page.mouse.move(x - 2, y)
    page.mouse.move(x, y)
    page.wait_for_selector("#vg-tooltip-element.visible", timeout=5000)
    return " ".join(page.locator("#vg-tooltip-element td").all_text_contents())


@pytest.mark.parametrize("view", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_every_plot_is_drawn_and_nothing_leaves_the_page(
    calibrated: Path, page_of: Any, open_page: Open, view: dict[str, Any]
) -> None:
    run, file = read_run(calibrated), page_of(calibrated)
    assert file.stat().st_size < 1.5e6
    opened = open_page(file, **view)
    plots = drawn(opened)
    assert list(plots) == [f"run1-{name}" for name in ARM_PLOTS]
    width = view["viewport"]["width"]
    for name, plot in plots.items():
        assert plot["right"] <= width, name
        assert plot["width"] > 250, name
        assert plot["below"] >= 0, name  # so that no legend meets the buttons
        assert plot["cutOff"] == [], name
    assert plots["run1-loss"]["marks"]["episodes_marks"] == len(run.episodes) > 10
    assert plots["run1-reward"]["marks"]["episodes_marks"] == len(run.episodes)
    for index in (0, 1):  # training and evaluation loss, base and effective LR
        assert plots["run1-loss"]["marks"][f"curves_{index}_marks"] == 2
    assert plots["run1-calibration"]["marks"]["trials_marks"] == 2 * len(run.trials)
    assert plots["run1-calibration"]["marks"]["found_marks"] == 1
    # The limit, the LR that was set and the one that was found, on none of the trials.
    assert opened.page.evaluate(COVERED) == [3, 2 * len(run.trials), 0]
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
    tiles = [tile.bounding_box() for tile in opened.page.query_selector_all(".facts > div")]
    right = max(tile["x"] + tile["width"] for tile in tiles)
    for row in {tile["y"] for tile in tiles}:
        ends = [tile["x"] + tile["width"] for tile in tiles if tile["y"] == row]
        assert max(ends) == pytest.approx(right, abs=1), "the tiles fill their rows"
    assert opened.complaints == []
    assert opened.requests == [file.as_uri()]


def test_hover_shows_an_episodes_numbers(calibrated: Path, page_of: Any, open_page: Open) -> None:
    run = read_run(calibrated)
    opened = open_page(page_of(calibrated))
    record = run.episodes[3]
    numbers = f"first loss {record.start_loss:.5g} last loss {record.end_loss:.5g}"
    steps = f"episode 4 steps {record.start_step} to {record.end_step} "
    # Away from the curves, the shade behind the loss tells of the episode that is pointed at.
    for plot, down in (("reward", 0.5), ("loss", 0.1)):
        said = hover(opened, f"#run1-{plot} .episodes_marks", 3, down=down)
        assert said.startswith(steps)
        assert f"{numbers} reward {record.reward:+.4f}" in said
    assert "outputs moved " in hover(opened, "#run1-calibration .trials_marks")
    assert "LR found " in hover(opened, "#run1-calibration .found_marks")
    said = hover(opened, "#run1-mean-reward .mark-symbol.role-mark")
    assert f"mean reward {run.arms()[0].mean:+.4f} spread " in said


def test_what_happened_to_an_episode_is_said_when_it_is_pointed_at(
    eventful: Path, page_of: Any, open_page: Open
) -> None:
    run = read_run(eventful)
    undone = [r for r in run.episodes if r.outcome == "rolled back"]
    opened = open_page(page_of(eventful))
    assert drawn(opened)["run1-reward"]["marks"]["marks_marks"] > len(undone) > 0
    index = run.episodes.index(undone[0])
    said = hover(opened, "#run1-loss .episodes_marks", index, down=0.1)
    assert said.startswith(f"episode {index + 1} ")
    assert "note " in said
    assert "rolled back" in said


def test_a_hostile_name_is_shown_as_text(
    eventful: Path, calibrated: Path, page_of: Any, open_page: Open
) -> None:
    opened = open_page(page_of(eventful))
    page = opened.page
    assert page.locator("h1").inner_text() == HOSTILE
    assert page.title() == HOSTILE
    assert "<b>bold&amp;</b>" in page.locator(".folder").inner_text()
    assert page.locator("main img, main script, main b").count() == 0

    both = open_page(page_of(eventful, calibrated))
    legend = both.page.locator("#all-loss .role-legend-label text").all_text_contents()
    assert HOSTILE in legend
    assert both.page.locator("td", has_text=HOSTILE).count() == 1
    assert f"curve {HOSTILE}" in hover(both, "#all-eval-loss .mark-symbol.role-mark", 1)
    assert both.page.locator("#vg-tooltip-element :is(img, script)").count() == 0
    assert opened.complaints == both.complaints == []


def test_several_runs_are_compared_in_a_table_that_can_be_sorted(
    eventful: Path, calibrated: Path, page_of: Any, open_page: Open
) -> None:
    runs = [read_run(eventful), read_run(calibrated)]
    opened = open_page(page_of(eventful, calibrated))
    plots = drawn(opened)
    for name in ("all-loss", "all-eval-loss"):
        assert plots[name]["marks"]["curves_0_marks"] == 2
    assert plots["all-loss"]["marks"]["curves_1_marks"] == 2
    table = opened.page.locator("section[aria-label=Comparison] table")
    head = table.locator("th").all_text_contents()

    def rows() -> list[dict[str, str]]:
        cells = [row.locator("td").all_text_contents() for row in table.locator("tbody tr").all()]
        return [dict(zip(head, row, strict=True)) for row in cells]

    for row, run in zip(rows(), runs, strict=True):
        assert (row["run"], row["status"]) == (run.name, "finished")
        assert row["steps"] == f"{run.step} of {run.max_steps}"
        assert float(row["evaluation loss"]) == pytest.approx(run.metrics["eval_loss"], rel=1e-4)
    # Of the settings those that differ are there, and no others.
    assert [row["lr_candidates"] for row in rows()] == ["[1.0, 300.0]", "[0.5, 1.0, 2.0]"]
    assert "seed" not in head
    for names in (["calibrated", HOSTILE], [HOSTILE, "calibrated"]):
        table.locator("th", has_text="evaluation loss").locator("button").click()
        assert [row["run"] for row in rows()] == names
    assert opened.complaints == []
    # On paper, where nothing can be scrolled, the table fits the page.
    opened.page.set_viewport_size({"width": 700, "height": 1000})
    opened.page.emulate_media(media="print")
    until(opened.page, "document.documentElement.scrollWidth <= 700")


def test_training_arguments_that_differ_are_compared(eventful: Path) -> None:
    run = read_run(eventful)
    assert run.arguments["per_device_train_batch_size"] != 3
    changed = {"per_device_train_batch_size": 3, "learning_rate": 1.0, "max_steps": 7}
    other = replace(run, arguments={**run.arguments, **changed})
    one, three = comparison_table([run, other], ["one", "three"]).rows
    assert three["per_device_train_batch_size"] == "3"
    assert [key for key in one if one[key] != three[key]] == ["run", "per_device_train_batch_size"]
    assert not set(one) & {"seed", "optim", "learning_rate", "max_steps"}


def test_a_comparison_of_more_runs_than_a_long_table_has_rows_shows_them_all(
    calibrated: Path, one_arm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pulseopt_hf.report.page._LONG", 1)
    page = to_html([read_run(calibrated), read_run(one_arm)], ["first", "second"])
    assert page.count("<td>first<td>") == page.count("<td>second<td>") == 1


def test_several_runs_fit_a_phone(
    eventful: Path, calibrated: Path, page_of: Any, open_page: Open
) -> None:
    opened = open_page(page_of(eventful, calibrated), **PHONE)
    page, width = opened.page, PHONE["viewport"]["width"]
    for name, plot in drawn(opened).items():
        assert plot["right"] <= width, name
        assert plot["below"] >= 0, name
        assert plot["cutOff"] == [], name
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    table = page.locator("section[aria-label=Comparison] .scroll")
    assert table.evaluate("element => element.scrollWidth > element.clientWidth"), "is wider"
    assert table.bounding_box()["width"] <= width
    table.evaluate("element => element.scrollBy(200, 0)")
    name = table.locator("tbody td").first.bounding_box()
    assert name["x"] == pytest.approx(table.bounding_box()["x"], abs=1), "names stay in sight"


def test_the_training_loss_can_be_smoothed_and_its_axis_be_logarithmic(
    one_arm: Path, page_of: Any, open_page: Open
) -> None:
    losses = [loss for _, loss in read_run(one_arm).loss]
    opened = open_page(page_of(one_arm))
    page = opened.page
    assert page.locator("[data-control]").count() == 2, "of the loss, and of nothing else"
    faint = page.locator("#run1-loss .mark-line path[stroke-opacity='0.3']")
    assert faint.count() == 0
    view = "document.getElementById('run1-loss').drawn.view"
    page.get_by_label("Smoothing").evaluate(
        "(slider) => { slider.value = 0.9; slider.dispatchEvent(new Event('change')); }"
    )
    until(page, f"'smoothed' in {view}.getState({{ data: () => true }}).data")
    rows = page.evaluate(f"{view}.data('smoothed')")
    expected, mean, weight = [], 0.0, 0.0
    for loss in losses:
        mean, weight = 0.9 * mean + 0.1 * loss, 0.9 * weight + 0.1
        expected.append(mean / weight)
    drawn_losses = [row["value"] for row in rows if row["name"] == "training loss"]
    assert drawn_losses == pytest.approx(expected, rel=1e-6)
    evaluated = [row["value"] for row in rows if row["name"] == "evaluation loss"]
    logged = [loss for _, loss in read_run(one_arm).series("eval_loss")]
    assert evaluated == pytest.approx(logged, rel=1e-6), "few points stay as they are"
    assert faint.count() > 0, "what was logged is there too"
    assert page.evaluate(f"{view}.scale('concat_0_y').type") == "linear"
    page.get_by_label("Logarithmic axis").check()
    until(page, f"{view}.scale('concat_0_y').type === 'log'")
    assert page.evaluate(f"{view}.data('smoothed').length") == len(rows), "both hold at once"
    assert opened.complaints == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_stands_out_from_what_is_behind_it(
    calibrated: Path, page_of: Any, open_page: Open, scheme: str
) -> None:
    count, faint = open_page(page_of(calibrated), color_scheme=scheme).page.evaluate(FAINT)
    assert count > 100
    assert faint == []


@pytest.mark.parametrize(("button", "magic"), [("PNG", b"\x89PNG"), ("SVG", b"<svg")])
def test_a_plot_is_saved(
    calibrated: Path, page_of: Any, open_page: Open, button: str, magic: bytes
) -> None:
    opened = open_page(page_of(calibrated))
    figure = opened.page.locator("figure", has=opened.page.locator("#run1-loss"))
    with opened.page.expect_download() as download:
        figure.get_by_title(f"Save as {button}").click()
    assert download.value.suggested_filename == f"run1-loss.{button.lower()}"
    assert Path(download.value.path()).read_bytes().startswith(magic)
    assert opened.complaints == []


def test_a_plot_can_be_zoomed_and_its_panels_go_together(
    calibrated: Path, page_of: Any, open_page: Open
) -> None:
    opened = open_page(page_of(calibrated))
    page = opened.page
    shown = "document.querySelector('#run1-loss').drawn.view.signal('zoom_step')"
    box = page.locator("#run1-loss").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.keyboard.down("Shift")
    page.mouse.wheel(0, -300)
    until(page, f"{shown} && {shown}[1] - {shown}[0] < 90")
    ticks = page.locator("#run1-loss .role-axis-label text").all_text_contents()
    assert len([tick for tick in ticks if tick in ("5", "100")]) < 2
    assert opened.complaints == []


def test_dark_is_dark_and_paper_is_light(calibrated: Path, page_of: Any, open_page: Open) -> None:
    background = "getComputedStyle(document.querySelector('.plot')).backgroundColor"
    paper = "document.getElementById('run1-loss').drawn.view.background()"
    ink = "document.querySelector('#run1-loss .role-legend-label text').getAttribute('fill')"
    light, dark = (
        open_page(page_of(calibrated), color_scheme=scheme).page for scheme in ("light", "dark")
    )
    assert light.evaluate(background) == "rgb(255, 255, 255)"
    assert dark.evaluate(background) == "rgb(27, 32, 41)"
    assert (light.evaluate(paper), dark.evaluate(paper)) == ("#ffffff", "#1b2029")
    assert light.evaluate(ink) != dark.evaluate(ink)
    dark.emulate_media(media="print")
    until(dark, f"{paper} === '#ffffff'")
    assert dark.evaluate(background) == "rgb(255, 255, 255)"
    assert dark.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert dark.evaluate("getComputedStyle(document.documentElement).colorScheme") == "light"
    assert dark.locator("[data-save]").first.is_hidden()
    dark.emulate_media(media="screen", color_scheme="light")
    until(dark, f"{paper} === '#ffffff'")


def test_every_plot_has_a_text_and_the_data_is_a_table_too(
    calibrated: Path, page_of: Any, open_page: Open
) -> None:
    run = read_run(calibrated)
    page = open_page(page_of(calibrated)).page
    for element in page.query_selector_all("[role=img]"):
        described = element.get_attribute("aria-describedby")
        assert len(page.locator(f"#{described}").inner_text()) > 20
    table = page.locator("#run1-episodes")
    assert table.locator("tbody").is_hidden()
    table.locator("summary").click()
    assert table.locator("tbody").is_visible()
    rows = table.locator("tbody tr")
    assert rows.count() == len(run.episodes)
    cells = rows.nth(3).locator("td").all_text_contents()
    record = run.episodes[3]
    assert cells[:2] == ["4", f"{record.start_step} to {record.end_step}"]
    assert cells[5] == f"{record.reward:+.4f}"
    assert page.locator("#run1-trials tbody tr").count() == len(run.trials)
    without = open_page(page_of(calibrated), java_script_enabled=False).page
    assert without.locator("#run1-episodes tbody tr").count() == len(run.episodes)
    assert "need JavaScript" in without.locator(".noscript").inner_text()


def test_a_short_run_that_logged_no_loss_still_shows_its_episodes(
    train: Any, tmp_path: Path, page_of: Any, open_page: Open
) -> None:
    knobs = {"lr_candidates": [2.0], "episode_length": 6}
    settings = {"max_steps": 6, "logging_steps": 500, "eval_strategy": "no"}
    folder = train(tmp_path / "short", knobs, **settings)
    opened = open_page(page_of(folder))
    plots = drawn(opened)
    assert list(plots) == ["run1-loss"]
    assert plots["run1-loss"]["marks"]["curves_0_marks"] == 1
    assert opened.page.locator("#run1-episodes tbody tr").count() == 1
    assert opened.complaints == []


def cut_off(run: Path, folder: Path, seconds_ago: float) -> Path:
    """Copy three quarters of a run's record, the last line in part, written so long ago."""
    folder.mkdir()
    lines = [json.loads(line) for line in (run / "pulse.jsonl").read_text().splitlines()]
    lines = lines[: len(lines) * 3 // 4]
    later = time.time() - seconds_ago - lines[-1]["time"]
    text = "\n".join(json.dumps({**line, "time": line["time"] + later}) for line in lines)
    (folder / "pulse.jsonl").write_text(text + '\n{"kind": "episode", "num')
    return folder


@pytest.mark.parametrize(
    ("seconds_ago", "status", "says"),
    [(1, "running", "Still running: "), (3600, "silent", "Silent: ")],
    ids=["goes on", "was killed"],
)
def test_a_run_without_an_end_says_so_on_its_page(
    calibrated: Path, tmp_path: Path, page_of: Any, open_page: Open,
    seconds_ago: float, status: str, says: str,
) -> None:  # fmt: skip
    folder = cut_off(calibrated, tmp_path / "run", seconds_ago)
    run = read_run(folder)
    assert run.status == status
    opened = open_page(page_of(folder))
    assert opened.page.locator(".status").inner_text().startswith(says)
    assert drawn(opened)["run1-reward"]["marks"]["episodes_marks"] == len(run.episodes) > 0
    assert opened.complaints == []


@pytest.mark.slow
def test_ten_thousand_episodes_open_within_three_seconds_and_stay_small(
    long: Path, page_of: Any, open_page: Open
) -> None:
    file = page_of(long)
    assert file.stat().st_size < 10e6
    seconds = []
    # The page's processor time, the best of a few: what else the machine does takes its time too.
    for _ in range(4):
        opened = open_page(file)
        seconds.append(opened.processor_seconds())
        assert opened.complaints == []
    assert 0.2 < min(seconds) < 3.0, seconds  # Vega alone takes longer than the lower bound
    plots, page = drawn(opened), opened.page
    for name, down in (("run1-loss", 0.3), ("run1-reward", None)):
        assert plots[name]["marks"]["episodes_marks"] == 10_000
        page.locator(f"#{name}").scroll_into_view_if_needed()
        box = page.locator(f"#{name} canvas").bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] * (down or zero(page, name))
        assert point_at(opened, x, y).startswith("episode ")
    assert page.locator("#run1-episodes tbody tr").count() == 0
    page.locator("#run1-episodes summary").click()
    until(page, "document.querySelectorAll('#run1-episodes tbody tr').length === 10000")
