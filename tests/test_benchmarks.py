"""The benchmarks run, and their figures are what the documentation says they are."""

import json
import math
import re
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from benchmarks import compare_tasks, held_out, tables
from pulseopt_hf.aees import controller
from pulseopt_hf.aees.calibration import OUTPUT_RADIUS, WEIGHT_RADIUS
from pulseopt_hf.trainer import session
from tests.conftest import Make, run_python

ROOT = Path(__file__).parents[1]
SHIPPED = "`scaled_ucb`, `slope`"
PAGES = tables.pages()


def run(name: str, *words: object) -> str:
    """Run a benchmark, and return what it prints."""
    return run_python("-m", f"benchmarks.{name}", *words, cwd=ROOT).stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_tables_of_the_documentation_are_those_of_the_results(page: Path) -> None:
    assert page.read_text(encoding="utf-8") == PAGES[page], f"{page.name}: run `make readme`"


@pytest.mark.slow
def test_the_overhead_benchmark_measures_every_variant(tmp_path: Path) -> None:
    out = tmp_path / "overhead.json"
    words = ("--layers", "1", "--width", "48", "--rounds", "2", "--steps", "3")
    run("overhead", *words, "--calibration-rounds", "1", "--write", out)
    variants = json.loads(out.read_text())["variants"]
    assert next(iter(variants)) == "vanilla"
    assert variants["vanilla"]["step_ratio"] == 1.0
    assert len(variants) == 6
    assert 0.0 < json.loads(out.read_text())["calibration_steps"] < 75


@pytest.mark.slow
def test_the_pictures_of_the_documentation_are_made_from_a_run(tmp_path: Path) -> None:
    run("figures", "--steps", "60", "--run", tmp_path / "run", "--out", tmp_path / "figures")
    made = {path.name: path.stat().st_size for path in (tmp_path / "figures").iterdir()}
    assert set(made) == {path.name for path in (ROOT / "docs" / "figures").iterdir()}
    assert min(made.values()) > 1000


@pytest.fixture
def rows_to_hold_out(make_trainer: Make, tiny_data: Any, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Return a maker of Trainers whose rows can be held out; designs change modules."""
    monkeypatch.setattr(controller, "episode_reward", controller.episode_reward)
    monkeypatch.setattr(session, "length_of_run", session.length_of_run)
    rows = datasets.Dataset.from_list(
        [{k: v.tolist() for k, v in row.items()} for row in tiny_data]
    )
    pulse = {"lr_candidates": [0.5, 1.0], "episode_length": 6, "calibration": "off"}
    return lambda: make_trainer(pulse=pulse, train_dataset=rows)


@pytest.mark.parametrize("average", [False, True])
def test_a_reward_is_the_fall_of_the_loss_of_the_rows_held_out(rows_to_hold_out, average):
    trainer = held_out.reward(rows_to_hold_out(), average)
    assert len(trainer.train_dataset) == 70 - 1
    reader = trainer.callback_handler.callbacks[-1]
    before = reader.losses().mean().item()
    trainer.train()
    after = reader.losses().mean().item()
    rewards = trainer.aees.get_logs()["episode_rewards"]
    assert len(rewards) == 4
    # An average goes on after the step that ends an episode.
    assert sum(rewards) == pytest.approx(math.log(before / after), abs=0.05 if average else 1e-5)
    assert (reader._average is not None) == average


def test_the_lr_falls_where_the_loss_of_the_rows_held_out_rises(rows_to_hold_out, monkeypatch):
    losses = iter([[1.0, 1.2], [0.9, 0.9], [1.4, 1.5]])
    monkeypatch.setattr(held_out.Drop, "losses", lambda *_: torch.tensor(next(losses)))
    trainer = held_out.drop(rows_to_hold_out())
    trainer.train()
    assert next(losses, None) is None
    assert set(trainer.lr_scheduler.base_lrs) == {held_out.DROP * trainer.args.learning_rate}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_cost_is_within_its_bounds(tmp_path: Path) -> None:
    out = tmp_path / "overhead.json"
    run("overhead", "--write", out)
    variants = json.loads(out.read_text())["variants"]
    # What the clock takes two equal Trainers apart by is not ours.
    resolution = abs(variants["vanilla again"]["step_ratio"] - 1.0)
    assert variants["lr"]["step_ratio"] <= 1.01 + resolution
    added = variants["lr+noise"]["step_ratio"] - 1.0
    published = variants["published lr+noise"]["step_ratio"] - 1.0
    assert added <= published / 2
    assert variants["lr"]["extra_peak_mib"] <= 64
    assert variants["lr+noise"]["extra_peak_mib"] <= 64


@pytest.mark.slow
def test_the_planted_bandit_and_the_measures_are_measured_anew(tmp_path: Path) -> None:
    """Short: the runs are real and the tables have their rows."""
    said = run("planted_bandit", "--steps", "120")
    assert re.search(rf"^\| {SHIPPED} \| +\d+%", said, re.M)
    said = run("measures", "--data", tmp_path, "--out", tmp_path, "--settings", "digits")
    number = r" ([\d.]+) \|"
    row = re.search(rf"^\| digits \|{number}  \|{3 * number}$", said, re.M)
    assert row is not None
    # A new model has no trained body. With ten classes alike, the Fisher length is that of logits.
    outputs, logits, fisher, weights = map(float, row.groups())
    assert OUTPUT_RADIUS / 3 < outputs < OUTPUT_RADIUS * 3
    assert fisher == pytest.approx(logits, rel=0.2)
    assert weights < WEIGHT_RADIUS


@pytest.mark.slow
def test_the_ablation_trains_without_the_part(tmp_path: Path) -> None:
    """Where trials go as far as a step may, outputs saturate, and the LR found is higher."""
    said = run(
        *("ablation", "--data", tmp_path, "--out", tmp_path, "--tasks", "sentences"),
        *("--variants", "full_trials,one_trial,cold", "--seeds", "0", "--steps", "60"),
    )
    found = {
        name: json.loads(next((tmp_path / name / "sentences").glob("*.json")).read_text())
        for name in ("full_trials", "one_trial", "cold")
    }
    assert found["full_trials"]["lr_scale"] > 1.1 * found["cold"]["lr_scale"]
    assert found["one_trial"]["paid_steps"] < found["cold"]["paid_steps"]
    assert len({row["loss_after"] for row in found.values()}) == 3
    assert re.search(r"^\| no warm-up \| -?\d\.\d{3} \|$", said, re.M)


def test_small_models_are_trained_from_a_wrong_lr() -> None:
    """From 25 times below the tuned LR a static run learns little, the default most of it."""
    said = run(
        *("small_models", "--tasks", "digits_mlp", "--learning_rates", "4e-4,1e-2"),
        *("--seeds", "0", "--steps", "200"),
    )
    rows = re.findall(r"^\| digits_mlp \| 0.01 .* \| (\w+) \| 1 \| (\S+) \|", said, re.M)
    found = {method: float(robustness) for method, robustness in rows}
    assert found["static"] > 0.15
    assert found["default"] < found["static"] / 3


@pytest.mark.slow
def test_other_kinds_are_trained_at_multiples_of_the_lr_found(tmp_path: Path) -> None:
    kinds = ("--kinds", "resnet,lstm_nadam", "--steps", "60", "--out", tmp_path)
    words = ("other_kinds", *kinds)
    table = run(*words).splitlines()[-5:]
    for row, share in zip(table[2:4], (0.5, 0.9), strict=True):
        found, untouched, *_, ours, _, _ = map(float, row.split("|")[2:-1])
        assert found > 1e-3
        assert ours < share * untouched
    kept = {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    assert len(kept) == 10
    assert run(*words).splitlines()[-5:] == table
    assert {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()} == kept


@pytest.mark.slow
def test_the_comparison_of_tasks_runs_and_writes_nothing_unasked(tmp_path: Path) -> None:
    before = compare_tasks.RESULT.read_text()
    words = ("--data", tmp_path, "--tasks", "sentences", "--methods", "static,prodigy")
    words += ("--learning_rates", "1e-2,3e-2", "--seeds", "0", "--steps", "4", "--out", tmp_path)
    said = run("compare_tasks", *words)
    rows = re.findall(r"^\| sentences \| \S+ \| 0.01 to 0.03 \| (\w+) \| 1 \| ", said, re.M)
    assert rows == ["static", "prodigy"]
    assert re.search(r"^\| \*\*mean\*\* \| {2}\| {2}\| static \|", said, re.M)
    assert compare_tasks.RESULT.read_text() == before
