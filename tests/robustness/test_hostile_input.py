"""Saved states and recipes from hostile files: a valid object, or the package's own error."""

from __future__ import annotations

import ast
import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import pulseopt_hf
from pulseopt_hf import AEES, PulseOptConfig
from pulseopt_hf.aees import Controller, StateError
from pulseopt_hf.errors import UsageError
from pulseopt_hf.recipes import catalogue
from pulseopt_hf.recipes.parsing import resolve

FEW, MANY = 1_200, 110_000
SETTINGS: dict[str, Any] = {
    "lr_candidates": [0.5, 1.0, 2.0],
    "noise_candidates": [0.0, 0.1],
    "episode_length": 3,
    "context_mode": "trend",
    "structured_control_mode": "conditional",
    "bandit": "discounted_ucb",
    "calibration": "off",
    "seed": 0,
}


def played() -> AEES:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    aees = AEES(optimizer, **SETTINGS)
    for step in range(11):
        aees.step_start(step)
        aees.step_end(2.0 - 0.1 * step)
    return aees


class Calibrating:
    """A loop with a calibration, which lasts for 26 steps."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self._inputs = torch.randn(40, 8, 4, generator=generator)
        self._model = torch.nn.Linear(4, 3)
        torch.nn.init.constant_(self._model.weight, 0.1)
        torch.nn.init.zeros_(self._model.bias)
        self._optimizer = torch.optim.SGD(self._model.parameters(), lr=0.1)
        settings = {**SETTINGS, "calibration": "trust_region", "nonfinite": "skip"}
        self.aees = AEES(self._optimizer, model=self._model, **settings)
        self._steps = 0

    def go_on(self, steps: int) -> None:
        for _ in range(steps):
            inputs = self._inputs[self._steps % 40]
            labels = (inputs[:, 0] > 0).long()
            self._optimizer.zero_grad()
            self.aees.step_start(self._steps)
            loss = torch.nn.functional.cross_entropy(self._model(inputs), labels)
            loss.backward()
            self.aees.step_end(loss)
            self._steps += 1


def calibrations() -> dict[str, Any]:
    """Return the state of a loop in each phase of its calibration."""
    loop, states = Calibrating(), {}
    for steps in (3, 10, 30):
        loop.go_on(steps - loop._steps)
        assert loop.aees.calibrator is not None
        states[loop.aees.calibrator.phase] = loop.aees.state_dict()
    assert list(states) == ["searching", "watching", "done"]
    assert len(states["done"]["calibration"]["trials"]) > 5
    assert states["done"]["calibration"]["outcomes"][-1]["reason"] is None
    return states


def nested(rng: random.Random) -> Any:
    value: Any = rng.choice([1, "x", None])
    for _ in range(rng.choice([3, 40, 400])):
        value = [value] if rng.random() < 0.5 else {"a": value}
    return value


WRONG: list[Callable[[random.Random], Any]] = [
    lambda rng: None,
    lambda rng: rng.choice([True, False]),
    lambda rng: rng.choice([0, -1, 1, 2**31, 2**63, 2**64, -(2**64), 10**400]),
    lambda rng: rng.choice([float("nan"), float("inf"), -float("inf"), 1e308, -1e308, 5e-324]),
    lambda rng: rng.choice(["", "x", "\x00", "stable", "9" * 200, "\ud800"]),
    lambda rng: [],
    lambda rng: {},
    lambda rng: [0.0] * rng.choice([1, 3, 624, 625, 626]),
    lambda rng: [10**30] * 625,
    lambda rng: {"kind": "discounted_ucb"},
    nested,
    lambda rng: rng.randbytes(rng.randrange(20)),
    lambda rng: object(),
]


def mutate(rng: random.Random, state: Any) -> Any:
    """Spoil one to three places of a valid state, or hand over something else altogether."""
    if rng.random() < 0.05:
        return rng.choice(WRONG)(rng)
    state = copy.deepcopy(state)
    for _ in range(rng.randint(1, 3)):
        at, key = state, None
        for _ in range(rng.randint(1, 6)):
            inner = at[key] if key is not None else at
            if not isinstance(inner, dict | list) or not inner:
                break
            at, key = (
                inner,
                rng.choice(list(inner) if isinstance(inner, dict) else range(len(inner))),
            )
        if key is None:
            continue
        kind = rng.random()
        if kind < 0.2:
            del at[key]
        elif kind < 0.3 and isinstance(at, dict):
            at[rng.choice(["", "version", "extra"])] = at.pop(key)
        elif kind < 0.4 and isinstance(at[key], list):
            at[key] = at[key] * 2
        elif kind < 0.5 and isinstance(at[key], float):
            at[key] = at[key] * rng.choice([-1, 0, 1e-300, 1e300, 2])
        else:
            at[key] = rng.choice(WRONG)(rng)
    return state


def refusal(target: Any, state: Any) -> str | None:
    try:
        target.load_state_dict(state)
    except StateError as error:
        return str(error)
    return None


def throw_states(count: int, seed: int) -> dict[str, int]:
    """Load spoiled states; what loads must also go on, and say the same state again."""
    rng = random.Random(seed)
    aees, phases = played(), list(calibrations().values())
    valid = aees.state_dict()
    json.dumps(valid), json.dumps(phases)
    seen = {"loaded": 0, "refused": 0}
    for index in range(count):
        kind = index % 3
        target: Any
        if kind == 0:
            target, state = Controller(aees.config), mutate(rng, valid["controller"])
        elif kind == 1:
            target, state = aees, mutate(rng, valid)
        else:
            loop, state = Calibrating(), copy.deepcopy(rng.choice(phases))
            target, state["calibration"] = loop.aees, mutate(rng, state["calibration"])
        before = None if kind == 0 else target.state_dict()
        message = refusal(target, state)
        if message is not None:
            assert len(message) < 2000
            assert before is None or target.state_dict() == before
            seen["refused"] += 1
            continue
        seen["loaded"] += 1
        json.dumps(target.state_dict(), allow_nan=False)
        if kind == 0:
            if target.episode is None:
                target.open(target.choose(), 20)
            target.close([1.0, 0.5], 21)
        elif kind == 1:
            target.load_state_dict(valid)
        else:
            loop.go_on(2)
            json.dumps(target.state_dict(), allow_nan=False)
    return seen


VALUES = [
    *("[1, 2]", "{a: b}", ".nan", "-.inf", "1e999", "9" * 300, "null", "~", "yes", "''"),
    *("!!python/object/apply:os.system [true]", "!!binary x", "2026-11-24", "0x1F"),
    *("[[[[[[1]]]]]]", "\\x00", '"\\ud800"', "'", "- a", "%s", "{" * 60, "-1", "0", "1.5"),
]


def yaml_text(rng: random.Random, recipe: str) -> bytes:
    kind = rng.random()
    if kind < 0.2:
        return rng.randbytes(rng.randrange(200))
    if kind < 0.3:
        return (rng.choice(["[", "{a: ", "- "]) * rng.choice([5, 200, 3000])).encode()
    if kind < 0.35:
        lines = ["a0: &a0 [x, x]"]
        lines += [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40)]
        return "\n".join(lines).encode()
    text = recipe
    for _ in range(rng.randint(1, 4)):
        lines = text.splitlines()
        index = rng.randrange(len(lines))
        what = rng.random()
        value = rng.choice(VALUES)
        if what < 0.6 and ":" in lines[index]:
            lines[index] = lines[index].split(":")[0] + ": " + value
        elif what < 0.7:
            lines[index] = lines[index] * 2
        elif what < 0.8:
            del lines[index]
        elif what < 0.9:
            lines.insert(index, f"{value}: {value}")
        else:
            cut = rng.randrange(len(lines[index]) + 1)
            odd = chr(rng.choice([0, 7, 9, 0x85, 0xFFFF]))
            lines[index] = lines[index][:cut] + odd + lines[index][cut:]
        text = "\n".join(lines) or "a: 1"
    return text.encode("utf-8", "replace")


def throw_recipes(count: int, seed: int, folder: Path) -> dict[str, int]:
    rng = random.Random(seed)
    recipes = [catalogue.find(name).read_text() for name in ("glue/sst2", "quickstart/lm")]
    file = folder / "recipe.yaml"
    seen = {"loaded": 0, "refused": 0}
    for _ in range(count):
        file.write_bytes(yaml_text(rng, rng.choice(recipes)))
        try:
            resolve(str(file), ["--use_cpu", "--output_dir", str(folder)])
        except UsageError:
            seen["refused"] += 1
        else:
            seen["loaded"] += 1
    return seen


def test_spoiled_states() -> None:
    seen = throw_states(FEW, seed=0)
    assert seen["loaded"] > 20
    assert seen["refused"] > 100


@pytest.mark.filterwarnings("ignore")
def test_spoiled_recipes(tmp_path: Path) -> None:
    seen = throw_recipes(150, seed=0, folder=tmp_path)
    assert seen["refused"] > 50


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_hundred_thousand_spoiled_states() -> None:
    throw_states(MANY, seed=1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_ten_thousand_spoiled_recipes(tmp_path: Path) -> None:
    throw_recipes(10_000, seed=1, folder=tmp_path)


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
        ("noise_candidates", [0.0], "[0.0, 0.1]"),
        ("episode_length", 4, "3"),
        ("context_mode", "none", "'trend'"),
        ("structured_control_mode", "independent", "'conditional'"),
        ("control_mode", "random", "'adaptive'"),
        ("calibration", "trust_region", "'off'"),
        ("bandit", "scaled_ucb", "'discounted_ucb'"),
        ("seed", 7, "0"),
    ):
        controller = Controller(PulseOptConfig(**{**SETTINGS, knob: value}))
        with pytest.raises(StateError) as error:
            controller.load_state_dict(state)
        assert f"`{knob}` was {old} and is now {value!r}" in str(error.value)
        assert "Set them back to resume it, or start a new run" in str(error.value)


def test_a_newer_version_names_itself_and_what_to_do() -> None:
    state = played().controller.state_dict()
    with pytest.raises(StateError, match=r"has version 99.*Resume with the release that wrote it"):
        Controller(PulseOptConfig(**SETTINGS)).load_state_dict({**state, "version": 99})


def test_a_state_of_the_first_version_still_loads() -> None:
    """Written by the release before calibration and the divergence guard."""
    file = Path(__file__).parent / "state_version_1.json"
    state = json.loads(file.read_text())
    assert "calibration" not in state["controller"]["settings"]
    assert "outcome" not in state["controller"]["records"]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    aees = AEES(optimizer, lr_candidates=[0.5, 1.0, 2.0], episode_length=3, seed=0)
    aees.load_state_dict(state)
    assert aees.get_logs()["episode_rewards"] == state["controller"]["records"]["reward"]


@pytest.mark.parametrize("phase", ["trials", "done"])
def test_a_calibration_of_an_earlier_kind_is_refused(phase: str) -> None:
    """One that measured losses, and whose trials were steps of the run; as it was saved."""
    trial = {"scale": 0.0033, "loss_movement": 0.0001, "weight_movement": 0.0006}
    trial |= {"probe_before": 3.8788, "probe_after": 3.8781, "step": 0, "kept": False}
    saved = {"phase": phase, "ramp": True, "scale": 0.8868, "unit": 3.8788, "trials": [trial]}
    saved |= {"max_steps": 60, "origin": [3.8483, 3.869], "probes": 3, "step": 2, "steps_before": 2}
    loop, state = Calibrating(), calibrations()["searching"]
    before = loop.aees.state_dict()
    message = refusal(loop.aees, {**state, "calibration": saved})
    assert message is not None
    assert "is of an earlier release of pulseopt_hf" in message
    assert loop.aees.state_dict() == before
    assert refusal(loop.aees, state) is None
    assert len(loop.aees.get_logs()["calibration_trials"]) > 3


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
