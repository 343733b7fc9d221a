"""The page, opened in a real browser as a person would."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pulseopt_hf.cli import main
from pulseopt_hf.report.reading import read_run
from tests.report.conftest import DESKTOP, HOSTILE, PHONE, Opened

Open = Callable[..., Opened]

# Of a plot: what is really drawn, as the browser has it.
DRAWN = """(element) => {
  const paths = [...element.querySelectorAll(".plot path, .plot image")];
  const seen = paths.filter((path) => {
    const box = path.getBoundingClientRect();
    return box.width + box.height > 0 && (path.getAttribute("d") ?? "image").length > 3;
  });
  return {
    seen: seen.length,
    points: element.querySelectorAll(".scatterlayer path.point").length,
    lines: element.querySelectorAll(".scatterlayer path.js-line").length,
    strips: element.querySelectorAll(".heatmaplayer image").length,
    right: element.getBoundingClientRect().right,
    width: element.getBoundingClientRect().width,
  };
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


def arm_of(thing: Any) -> tuple[float, float]:
    """Return the LR multiplier and noise level of an episode or of a summary of an arm."""
    if hasattr(thing, "lr_value"):
        return thing.lr_value, thing.noise_value
    return thing.lr_multiplier, thing.noise_std


def hover(opened: Opened, plot: str, selector: str, index: int = 0, *, down: float = 0.5) -> str:
    """Point at a part of a plot and return what the hover says."""
    page = opened.page
    part = page.locator(f"#{plot} {selector}").nth(index)
    part.scroll_into_view_if_needed()
    box = part.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] * down
    page.mouse.move(x - 2, y)
    page.mouse.move(x, y)
    page.wait_for_selector(f"#{plot} .hoverlayer .hovertext", timeout=5000)
    return " ".join(page.locator(f"#{plot} .hoverlayer .hovertext").all_text_contents())


@pytest.mark.parametrize("view", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_every_plot_is_drawn_and_nothing_leaves_the_page(
    calibrated: Path, page_of: Any, open_page: Open, view: dict[str, Any]
) -> None:
    run, file = read_run(calibrated), page_of(calibrated)
    opened = open_page(file, **view)
    plots = drawn(opened)
    names = ["loss", "learning-rate", "reward", "plays", "mean-reward", "calibration"]
    assert list(plots) == [f"run1-{name}" for name in names]
    width = view["viewport"]["width"]
    for name, plot in plots.items():
        assert plot["seen"] > 0, name
        assert plot["right"] <= width, name
        assert plot["width"] > 250, name
    assert plots["run1-loss"]["strips"] == 1
    assert plots["run1-loss"]["lines"] == 2
    assert plots["run1-learning-rate"]["lines"] == 2
    assert plots["run1-reward"]["points"] == len(run.episodes) > 10
    assert plots["run1-mean-reward"]["points"] == len(run.arms()) == 3
    assert plots["run1-calibration"]["points"] == 2 * len(run.trials) + 1 > 7
    cells = "document.getElementById('run1-loss').data[0].z[0].filter((z) => z !== null).length"
    assert opened.page.evaluate(cells) == len(run.episodes)
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
    assert opened.complaints == []
    assert opened.requests == [file.as_uri()]


def losses_in(said: str) -> list[float]:
    """Return the two losses of an episode; the browser may round them another way than Python."""
    (found,) = re.findall(r"loss (\d+\.\d{4}) to (\d+\.\d{4})", said)
    return [float(loss) for loss in found]


def test_hover_shows_an_episodes_numbers(calibrated: Path, page_of: Any, open_page: Open) -> None:
    run = read_run(calibrated)
    opened = open_page(page_of(calibrated))
    first = run.arms()[0]
    numbers = [i for i, r in enumerate(run.episodes, 1) if r.name == first.name]
    said = hover(opened, "run1-reward", ".scatterlayer path.point", 0)
    record = run.episodes[numbers[0] - 1]
    assert f"Episode {numbers[0]}, steps {record.start_step} to {record.end_step}" in said
    assert losses_in(said) == pytest.approx([record.start_loss, record.end_loss], abs=5.1e-5)
    assert f"reward {record.reward:+.4f}" in said
    said = hover(opened, "run1-mean-reward", ".scatterlayer path.point", 0)
    assert f"mean {first.mean:+.4f}, standard deviation" in said
    # Away from the curves, the strip behind the loss tells of the episode that is pointed at.
    said = hover(opened, "run1-loss", ".heatmaplayer image", down=0.1)
    number = int(said.split("Episode ")[1].split(",")[0])
    record = run.episodes[number - 1]
    assert f"steps {record.start_step} to {record.end_step}" in said
    assert losses_in(said) == pytest.approx([record.start_loss, record.end_loss], abs=5.1e-5)
    said = hover(opened, "run1-calibration", ".scatterlayer path.point", 0)
    assert "Trial " in said
    assert "outputs moved by" in said


def test_what_happened_to_episodes_is_marked(eventful: Path, page_of: Any, open_page: Open) -> None:
    run = read_run(eventful)
    clipped = [r for r in run.episodes if run.was_clipped(r)]
    undone = [r for r in run.episodes if r.outcome == "rolled back"]
    assert clipped
    assert undone
    assert run.skipped_steps == 2
    opened = open_page(page_of(eventful))
    lengths = opened.page.evaluate(
        "Object.fromEntries(document.getElementById('run1-reward').data.map("
        "(trace) => [trace.name, trace.x.length]))"
    )
    assert lengths["clipped"] == len(clipped)
    assert lengths["rolled back"] == len(undone)
    assert lengths["with skipped steps"] == sum(1 for count in run.skips() if count)
    assert drawn(opened)["run1-reward"]["points"] == len(run.episodes) + sum(
        lengths[mark] for mark in ("clipped", "rolled back", "with skipped steps")
    )
    index = run.episodes.index(undone[0])
    same_arm = [r for r in run.episodes if (r.lr_value, r.noise_value) == arm_of(undone[0])]
    before = sum(arm.plays for arm in run.arms() if arm_of(arm) < arm_of(undone[0]))
    point = before + same_arm.index(undone[0])
    said = hover(opened, "run1-reward", ".scatterlayer path.point", point)
    assert f"Episode {index + 1}, " in said
    assert "rolled back" in said
    text = opened.page.locator("#run1-reward-text").inner_text()
    assert f"{len(undone)} episode{'s' if len(undone) > 1 else ''} rolled back." in text


def test_a_hostile_name_is_shown_as_text(
    eventful: Path, calibrated: Path, page_of: Any, open_page: Open
) -> None:
    opened = open_page(page_of(eventful))
    page = opened.page
    assert page.locator("h1").inner_text() == HOSTILE
    assert page.title() == HOSTILE
    assert "<b>bold&amp;</b>" in page.locator(".folder").inner_text()
    assert page.locator("main img, main script, main b").count() == 0

    opened_both = open_page(page_of(eventful, calibrated))
    legend = opened_both.page.locator("#all-loss .legendtext").all_text_contents()
    assert HOSTILE in legend
    assert opened_both.page.locator("td", has_text=HOSTILE).count() == 1
    said = hover(opened_both, "all-eval-loss", ".scatterlayer path.point", 0)
    assert HOSTILE in said
    assert opened.complaints == opened_both.complaints == []


def test_several_runs_are_compared(
    eventful: Path, calibrated: Path, page_of: Any, open_page: Open
) -> None:
    runs = [read_run(eventful), read_run(calibrated)]
    opened = open_page(page_of(eventful, calibrated))
    plots = drawn(opened)
    for name in ("all-loss", "all-eval-loss", "all-learning-rate"):
        assert plots[name]["lines"] == 2
    assert all(plot["seen"] for plot in plots.values())
    rows = opened.page.locator("section[aria-label=Comparison] tbody tr")
    assert rows.count() == 2
    for index, run in enumerate(runs):
        cells = rows.nth(index).locator("td").all_text_contents()
        assert cells[0] == run.name
        assert cells[1:3] == ["finished", f"{run.step} of {run.max_steps}"]
        assert float(cells[7]) == pytest.approx(run.metrics["eval_loss"], rel=1e-4)
    assert opened.complaints == []
    # On paper, where nothing can be scrolled, the table fits the page.
    opened.page.set_viewport_size({"width": 700, "height": 1000})
    opened.page.emulate_media(media="print")
    until(opened.page, "document.documentElement.scrollWidth <= 700")


@pytest.mark.parametrize(("button", "magic"), [("PNG", b"\x89PNG"), ("SVG", b"<svg")])
def test_a_plot_is_saved(
    calibrated: Path, page_of: Any, open_page: Open, button: str, magic: bytes
) -> None:
    opened = open_page(page_of(calibrated))
    with opened.page.expect_download() as download:
        opened.page.locator(f"#run1-loss [data-title='Save as {button}']").click()
    assert download.value.suggested_filename == f"run1-loss.{button.lower()}"
    assert Path(download.value.path()).read_bytes().startswith(magic)
    assert opened.complaints == []


def test_dark_is_dark_and_paper_is_light(calibrated: Path, page_of: Any, open_page: Open) -> None:
    background = "getComputedStyle(document.querySelector('.plot')).backgroundColor"
    paper = "document.getElementById('run1-loss').layout.paper_bgcolor"
    ink = (
        "document.getElementById('run1-loss').data.find((t) => t.name === 'training loss')"
        ".line.color"
    )
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
    assert dark.locator(".modebar").first.is_hidden()
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
    assert cells[6] == f"{record.reward:+.4f}"
    assert page.locator("#run1-trials tbody tr").count() == len(run.trials)


def test_without_javascript_the_data_is_there(
    calibrated: Path, page_of: Any, open_page: Open
) -> None:
    page = open_page(page_of(calibrated), java_script_enabled=False).page
    assert page.locator("#run1-episodes tbody tr").count() == len(read_run(calibrated).episodes)
    assert "need JavaScript" in page.locator(".noscript").inner_text()


def test_a_short_run_that_logged_no_loss_still_shows_its_episodes(
    train: Any, tmp_path: Path, page_of: Any, open_page: Open
) -> None:
    knobs = {"lr_candidates": [2.0], "episode_length": 6}
    settings = {"max_steps": 6, "logging_steps": 500, "eval_strategy": "no"}
    folder = train(tmp_path / "short", knobs, **settings)
    opened = open_page(page_of(folder))
    plots = drawn(opened)
    names = ["loss", "learning-rate", "reward", "plays", "mean-reward"]
    assert list(plots) == [f"run1-{name}" for name in names]
    assert plots["run1-reward"]["points"] == 1
    assert "Rewards of 1 episode, " in opened.page.locator("#run1-reward-text").inner_text()
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
    [(1, "running", "Still running: "), (3600, "silent", "Broken off: ")],
    ids=["goes on", "was killed"],
)
def test_a_run_without_an_end_says_so_on_its_page(
    calibrated: Path,
    tmp_path: Path,
    page_of: Any,
    open_page: Open,
    seconds_ago: float,
    status: str,
    says: str,
) -> None:
    folder = cut_off(calibrated, tmp_path / "run", seconds_ago)
    run = read_run(folder)
    assert run.status == status
    opened = open_page(page_of(folder))
    assert opened.page.locator(".status").inner_text().startswith(says)
    assert drawn(opened)["run1-reward"]["points"] == len(run.episodes) > 0
    assert opened.complaints == []


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
    assert 0.2 < min(seconds) < 3.0, seconds  # plotly alone takes longer than the lower bound
    plots = drawn(opened)
    assert all(plot["seen"] for plot in plots.values())
    page = opened.page
    count = (
        "document.getElementById('run1-reward').data.filter((t) => t.mode === 'none')"
        ".map((t) => t.x.length).reduce((a, b) => a + b)"
    )
    assert page.evaluate(count) == 10_000
    cells = "document.getElementById('run1-loss').data[0].z[0].length"
    assert page.evaluate(cells) == 10_000
    assert "Episode " in hover(opened, "run1-loss", ".heatmaplayer image", down=0.1)
    assert "Episode " in hover(opened, "run1-reward", ".scatterlayer path.js-line")
    assert page.locator("#run1-episodes tbody tr").count() == 0
    page.locator("#run1-episodes summary").click()
    until(page, "document.querySelectorAll('#run1-episodes tbody tr').length === 10000")
