"""Saved states and recipes from hostile files: a valid object, or the package's own error."""

import ast
from pathlib import Path

import pytest

import pulseopt_hf
from pulseopt_hf import PulseOptConfig
from pulseopt_hf.aees import Controller, StateError, left_out
from tests.engines.engine import slow
from tests.robustness.fuzz import (
    LOADED,
    REFUSED,
    SETTINGS,
    Calibrating,
    all_examples,
    calibrations,
    played,
    refusal,
    throw,
)


@pytest.fixture
def few_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set bounds that leave out one episode of three, so that a state holds totals too."""
    monkeypatch.setattr(left_out, "MOST", 2)
    monkeypatch.setattr(left_out, "NEWEST", 1)
    assert played().state_dict()["controller"]["left_out"]


FEW = {"states": 600, "calibrations": 300, "files": 300, "recipes": 150}
MANY = [slow(kind, 20_000 if kind == "states" else 10_000) for kind in FEW]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "count"), [*FEW.items(), *MANY])
def test_spoiled_files(kind: str, count: int, few_kept: None, tmp_path: Path) -> None:
    seen = throw(all_examples(tmp_path)[kind], count, seed=0)
    assert seen[LOADED] > 0
    assert seen[REFUSED] > count / 3


def test_the_package_unpickles_nothing() -> None:
    for file in Path(pulseopt_hf.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
                assert not {"pickle", "shelve", "marshal", "dill"} & set(names), file
            if isinstance(node, ast.Attribute) and node.attr in ("load", "unsafe_load"):
                owner = getattr(node.value, "id", "")
                assert owner not in ("torch", "np", "numpy"), f"{file}: {owner}.{node.attr}"


def test_settings_that_differ_are_named_with_both_values() -> None:
    state = played().controller.state_dict()
    for knob, value, old in (
        ("lr_candidates", [1.0, 2.0], "[0.5, 1.0, 2.0]"),
        ("noise_candidates", [0.0], "[0.0, 0.001]"),
        ("episode_length", 4, "3"),
        ("context_mode", "none", "'trend'"),
        ("structured_control_mode", "independent", "'conditional'"),
        ("control_mode", "random", "'adaptive'"),
        ("calibration", "trust_region", "'off'"),
        ("bandit", "scaled_ucb", "'discounted_ucb'"),
        ("seed", 7, "0"),
    ):
        controller = Controller(PulseOptConfig.published(**{**SETTINGS, knob: value}))
        with pytest.raises(StateError) as error:
            controller.load_state_dict(state)
        assert f"`{knob}` was {old} and is now {value!r}" in str(error.value)
        assert str(error.value).count("` was ") == 1  # those that do not differ are not named
        assert "Set them back to resume it, or start a new run" in str(error.value)


def test_a_newer_version_names_itself_and_what_to_do() -> None:
    state = played().controller.state_dict()
    with pytest.raises(StateError, match=r"has version 99.*Resume with the release that wrote it"):
        Controller(PulseOptConfig(**SETTINGS)).load_state_dict({**state, "version": 99})


def test_totals_that_cannot_be_are_refused(few_kept: None) -> None:
    """Those of an arm that is there twice, and of other episodes than are left out."""
    aees = played()
    state = aees.controller.state_dict()
    (arm,) = state["left_out"]
    for wrong, said in (
        ([arm, arm], "`left_out` has an arm twice"),
        ([{**arm, "plays": 2}], "`records` has 2 of 4 episodes and must have 3"),
        ([{**arm, "plays": 0}], "`plays` counts from 1, got 0"),
        ([{**arm, "outcomes": {"cut": 0}}], "`outcomes` counts from 1, got 0"),
        ([{**arm, "outcomes": []}], r"`outcomes` must be a mapping, got \[\]"),
    ):
        with pytest.raises(StateError, match=said):
            Controller(aees.config).load_state_dict({**state, "left_out": wrong})


@pytest.mark.parametrize("calibration", ["searching", "watching", "done", None])
def test_a_refused_state_leaves_the_calibration_as_it_was(calibration: str | None) -> None:
    phases = calibrations()
    state = {**phases["done"], "controller": "spoiled", "calibration": None}
    if calibration is not None:
        state["calibration"] = phases[calibration]["calibration"]
    loop = Calibrating()
    before = loop.aees.state_dict()
    assert refusal(loop.aees, state) is not None
    assert loop.aees.state_dict() == before
