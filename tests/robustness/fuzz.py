"""Spoiled states and recipes: each is read as a valid one or refused by the package's own error.

Hypothesis draws every choice, so what fails is shown in its smallest form and comes again from its
seed.
"""

from __future__ import annotations

import copy
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import torch
from safetensors.torch import save_file

from pulseopt_hf import AEES, newest_whole_checkpoint
from pulseopt_hf.aees import Controller, StateError
from pulseopt_hf.errors import UsageError
from pulseopt_hf.recipes import catalogue
from pulseopt_hf.recipes.parsing import keys_of, recipe_parser, resolve

LOADED, REFUSED = "loaded", "refused"
Example = Callable[[random.Random], str]  # tries one, and returns which of the two it was

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


def throw(example: Example, count: int, seed: int) -> Counter[str]:
    """Try `count` examples and return how many were loaded and how many refused.

    Raises:
        Exception: what the smallest failing example raised, with the example in its notes.
    """
    seen: Counter[str] = Counter()

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(st.randoms(use_true_random=False))
    def run(rng: random.Random) -> None:
        seen[example(rng)] += 1

    run()
    return seen


def played() -> AEES:
    """Return an AEES amid its fourth episode."""
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
        value = [value] if one_in(2, rng) else {"a": value}
    return value


def one_in(count: int, rng: random.Random) -> bool:
    # Not by `rng.random()`, of which Hypothesis prefers the ends.
    return rng.randrange(count) == 0


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
    if one_in(20, rng):
        return rng.choice(WRONG)(rng)
    state = copy.copy(state)
    for _ in range(rng.randint(1, 3)):
        at, key = state, None
        for _ in range(rng.randint(1, 6)):
            inner = at if key is None else at[key]
            if not isinstance(inner, dict | list) or not inner:
                break
            if key is not None:  # only what is changed is copied, and what leads there
                at[key] = inner = copy.copy(inner)
            at = inner
            key = rng.choice(list(at)) if isinstance(at, dict) else rng.randrange(len(at))
        if key is not None:
            _spoil(rng, at, key)
    return state


def _spoil(rng: random.Random, at: Any, key: Any) -> None:
    kind = rng.randrange(10)
    if kind < 2:
        del at[key]
    elif kind == 2 and isinstance(at, dict):
        at[rng.choice(["", "version", "extra"])] = at.pop(key)
    elif kind == 3 and isinstance(at[key], list):
        at[key] = at[key] * 2
    elif kind == 4 and isinstance(at[key], float):
        at[key] = at[key] * rng.choice([-1, 0, 1e-300, 1e300, 2])
    elif kind == 5:
        # A value of the right kind in the wrong place.
        at[key] = at[rng.choice(list(at))] if isinstance(at, dict) else rng.choice(at)
    else:
        at[key] = rng.choice(WRONG)(rng)


def refusal(target: Any, state: Any) -> str | None:
    """Load a state and return why it was refused, if it was; then the target must be as before."""
    before = target.state_dict()
    try:
        target.load_state_dict(state)
    except StateError as error:
        message = str(error)
    else:
        return None
    assert len(message) < 2000
    assert target.state_dict() == before
    return message


def all_examples(folder: Path) -> dict[str, Example]:
    """Return every kind of example, by name; files are written into the folder."""
    return {
        "controllers": controllers(),
        "states": whole_states(),
        "calibrations": calibration_states(),
        "files": state_files(folder),
        "recipes": recipes(folder),
    }


def controllers() -> Example:
    """States of the arms alone; what loads must also play on."""
    aees = played()
    valid = aees.controller.state_dict()

    def example(rng: random.Random) -> str:
        target = Controller(aees.config)
        if refusal(target, _noted(mutate(rng, valid))) is not None:
            return REFUSED
        json.dumps(target.state_dict(), allow_nan=False)
        if target.episode is None:
            target.open(target.choose(), 20)
        target.close([1.0, 0.5], 21)
        return LOADED

    return example


def whole_states() -> Example:
    """States of an AEES."""
    aees = played()
    valid = aees.state_dict()

    def example(rng: random.Random) -> str:
        if refusal(aees, _noted(mutate(rng, valid))) is not None:
            return REFUSED
        json.dumps(aees.state_dict(), allow_nan=False)
        aees.load_state_dict(valid)
        return LOADED

    return example


def calibration_states() -> Example:
    """States of a calibration in each of its phases; what loads must also go on."""
    phases = list(calibrations().values())
    json.dumps(phases)
    loops = [Calibrating()]

    def example(rng: random.Random) -> str:
        phase = rng.choice(phases)
        state = {**phase, "calibration": _noted(mutate(rng, phase["calibration"]))}
        loop = loops[0]
        if refusal(loop.aees, state) is not None:
            return REFUSED
        loops[0] = Calibrating()
        loop.go_on(2)
        json.dumps(loop.aees.state_dict(), allow_nan=False)
        return LOADED

    return example


def state_files(folder: Path) -> Example:
    """Files that are cut short or garbled: passed over, or else the state in them is spoiled."""
    checkpoint = folder / "checkpoint-11"
    checkpoint.mkdir(parents=True)
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        if name.endswith(".safetensors"):
            save_file({"x": torch.zeros(1)}, checkpoint / name)
        else:
            torch.save({}, checkpoint / name)
    aees = played()
    valid = aees.state_dict()
    text = json.dumps({"global_step": 11, "pulse": valid})
    file = checkpoint / "trainer_state.json"

    def example(rng: random.Random) -> str:
        start = rng.randrange(len(text))
        end = rng.choice([start, start + 1, start + rng.randrange(50), len(text)])
        filling = rng.choice([b"", b"\x00", b"\xff", b"[" * 5000, b"9" * 5000, b"NaN", b'"'])
        content = text[:start].encode() + filling + text[end:].encode()
        hypothesis.note(f"{content[:start][-40:]!r} {filling[:10]!r} {text[end : end + 40]!r}")
        file.write_bytes(content)
        found, _ = newest_whole_checkpoint(folder)
        if found is None or refusal(aees, json.loads(content).get("pulse")) is not None:
            return REFUSED
        aees.load_state_dict(valid)
        return LOADED

    return example


def _noted(state: Any) -> Any:
    hypothesis.note(state)
    return state


VALUES = [
    *("[1, 2]", "{a: b}", ".nan", "-.inf", "1e999", "9" * 300, "null", "~", "yes", "''"),
    *("!!python/object/apply:os.system [true]", "!!binary x", "2026-11-24", "0x1F"),
    *("[[[[[[1]]]]]]", "\\x00", '"\\ud800"', "'", "- a", "%s", "{" * 60, "-1", "0", "1.5"),
    *("true", "false", "steps", "epoch", "[a, b]", "[]", "{}", "1", "auto", "x y", '"{}"', "'['"),
    *("{zero_optimization: 5}", '{"x": {"y": [1]}}', "{version: x}", "{version: 2, xla: 1}", "/"),
]


def recipes(folder: Path) -> Example:
    """Texts of recipes: spoiled lines, keys with values of another kind, and bytes."""
    texts = [catalogue.find(name).read_text() for name in ("glue/sst2", "quickstart/lm")]
    file = folder / "recipe.yaml"

    def example(rng: random.Random) -> str:
        content = yaml_text(rng, rng.choice(texts))
        hypothesis.note(f"the recipe was {content!r}")
        file.write_bytes(content)
        try:
            resolve(str(file), ["--use_cpu", "--output_dir", str(folder)])
        except UsageError as error:
            problems = error.problems
        else:
            return LOADED
        assert all(problem and "\n" not in problem for problem in problems)
        return REFUSED

    return example


def yaml_text(rng: random.Random, recipe: str) -> bytes:
    kind = rng.randrange(40)
    if kind < 4:
        return rng.randbytes(rng.randrange(200))
    if kind == 4:
        return (rng.choice(["[", "{a: ", "- "]) * rng.choice([5, 200, 3000])).encode()
    if kind == 5:
        lines = ["a0: &a0 [x, x]"]
        lines += [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40)]
        return "\n".join(lines).encode()
    text = recipe
    for _ in range(rng.randint(1, 4)):
        lines = text.splitlines()
        index = rng.randrange(len(lines))
        what = rng.randrange(20)
        value = rng.choice(VALUES)
        if what < 6 and ":" in lines[index]:
            lines[index] = lines[index].split(":")[0] + ": " + value
        elif what < 14:
            lines.append(f"{rng.choice(sorted(keys_of(recipe_parser())))}: {value}")
        elif what < 15:
            lines[index] = lines[index] * 2
        elif what < 17:
            del lines[index]
        elif what < 18:
            lines.insert(index, f"{value}: {value}")
        else:
            cut = rng.randrange(len(lines[index]) + 1)
            odd = chr(rng.choice([0, 7, 9, 0x85, 0xFFFF]))
            lines[index] = lines[index][:cut] + odd + lines[index][cut:]
        text = "\n".join(lines) or "a: 1"
    return text.encode("utf-8", "replace")
