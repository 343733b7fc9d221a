"""Spoiled states and recipes: each is read as a valid one or refused by the package's own error.

Hypothesis draws every choice, so what fails is shown in its smallest form and comes again from its
seed.
"""

import copy
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import torch
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy

from pulseopt_hf import AEES, newest_whole_checkpoint
from pulseopt_hf.aees import StateError
from pulseopt_hf.errors import UsageError
from pulseopt_hf.recipes import catalogue
from pulseopt_hf.recipes.parsing import keys_of, recipe_parser, resolve
from tests.conftest import ARMS, give_losses, take_step

LOADED, REFUSED = "loaded", "refused"
# A strategy, and what tries what it draws and returns which of the two it was.
Example = tuple[st.SearchStrategy[Any], Callable[[Any], str]]

SETTINGS: dict[str, Any] = {
    **{**ARMS, "episode_length": 3, "bandit": "discounted_ucb", "calibration": "off", "seed": 0},
    **{"context_mode": "trend", "structured_control_mode": "conditional"},
}


def throw(example: Example, count: int, seed: int) -> Counter[str]:
    """Try `count` examples and return how many were loaded and how many refused.

    Raises:
        Exception: what the smallest failing example raised, with the example in its notes.
    """
    seen: Counter[str] = Counter()
    strategy, attempt = example

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(strategy)
    def run(drawn: Any) -> None:
        seen[attempt(drawn)] += 1

    run()
    return seen


def played() -> AEES:
    """Return an AEES amid its fourth episode."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    return give_losses(AEES(optimizer, **SETTINGS), [2.0 - 0.1 * step for step in range(11)])


class Calibrating:
    """A loop with a calibration, which lasts for 26 steps."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self._inputs = torch.randn(40, 8, 4, generator=generator)
        self._model = torch.nn.Linear(4, 3)
        torch.nn.init.constant_(self._model.weight, 0.1)
        torch.nn.init.zeros_(self._model.bias)
        optimizer = torch.optim.SGD(self._model.parameters(), lr=0.1)
        settings = {**SETTINGS, "calibration": "trust_region", "nonfinite": "skip"}
        self.aees = AEES(optimizer, model=self._model, **settings)
        self._steps = 0

    def _loss(self) -> torch.Tensor:
        inputs = self._inputs[self._steps % 40]
        return cross_entropy(self._model(inputs), (inputs[:, 0] > 0).long())

    def go_on(self, steps: int) -> None:
        for _ in range(steps):
            take_step(self.aees, self._steps, self._loss)
            self._steps += 1


def calibrations() -> dict[str, Any]:
    """Return the state of a loop in each phase of its calibration."""
    loop, states = Calibrating(), {}
    for steps in (3, 10, 30):
        loop.go_on(steps - loop._steps)
        states[loop.aees.calibrator.phase] = loop.aees.state_dict()
    assert list(states) == ["searching", "watching", "done"]
    assert len(states["done"]["calibration"]["trials"]) > 5
    assert states["done"]["calibration"]["outcomes"][-1]["reason"] is None
    return states


def nested(value: Any, depth: int) -> Any:
    for level in range(depth):
        value = [value] if level % 2 else {"a": value}
    return value


WRONG: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 1, 2**31, 2**63, 2**64, -(2**64), 10**400]),
    st.sampled_from([float("nan"), float("inf"), -float("inf"), 1e308, -1e308, 5e-324]),
    st.sampled_from(["", "x", "\x00", "stable", "9" * 200, "\ud800"]),
    st.sampled_from([0, 1, 3, 624, 625, 626]).map(lambda count: [0.0] * count),
    st.builds(dict),
    st.just([10**30] * 625),
    st.just({"kind": "discounted_ucb"}),
    st.builds(nested, st.sampled_from([1, "x", None]), st.sampled_from([3, 40, 400])),
    st.binary(max_size=20),
    st.builds(object),
)


@st.composite
def spoiled(draw: st.DrawFn, valid: Any) -> Any:
    """A valid state that is spoiled in one to three places, or something else altogether."""
    if draw(st.integers(1, 20)) == 20:
        return draw(WRONG)
    state = copy.copy(valid)
    for _ in range(draw(st.integers(1, 3))):
        at, key = state, None
        for _ in range(draw(st.integers(1, 6))):
            inner = at if key is None else at[key]
            if not isinstance(inner, dict | list) or not inner:
                break
            if key is not None:  # only what is changed is copied, and what leads there
                at[key] = inner = copy.copy(inner)
            at = inner
            key = draw(keys(at))
        if key is not None:
            _spoil(draw, at, key)
    return state


def keys(at: Any) -> st.SearchStrategy[Any]:
    return st.sampled_from(list(at) if isinstance(at, dict) else range(len(at)))


def _spoil(draw: st.DrawFn, at: Any, key: Any) -> None:
    kind = draw(st.integers(0, 9))
    if kind < 2:
        del at[key]
    elif kind == 2 and isinstance(at, dict):
        at[draw(st.sampled_from(["", "version", "extra"]))] = at.pop(key)
    elif kind == 3 and isinstance(at[key], list):
        at[key] = at[key] * 2
    elif kind == 4 and isinstance(at[key], float):
        at[key] = at[key] * draw(st.sampled_from([-1, 0, 1e-300, 1e300, 2]))
    elif kind == 5:
        at[key] = at[draw(keys(at))]  # a value of the right kind in the wrong place
    else:
        at[key] = draw(WRONG)


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
        "states": whole_states(),
        "calibrations": calibration_states(),
        "files": state_files(folder),
        "recipes": recipes(folder),
    }


def whole_states() -> Example:
    """States of an AEES, or of its arms alone; what loads must also play on."""
    aees = played()
    valid = aees.state_dict()

    def attempt(state: Any) -> str:
        if refusal(aees, state) is not None:
            return REFUSED
        json.dumps(aees.state_dict(), allow_nan=False)
        if aees.controller.episode is None:
            aees.controller.open(aees.controller.choose(), 20)
        aees.controller.close([1.0, 0.5], 21)
        aees.load_state_dict(valid)
        return LOADED

    arms = spoiled(valid["controller"]).map(lambda state: {**valid, "controller": state})
    return st.one_of(spoiled(valid), arms), attempt


def calibration_states() -> Example:
    """States of a calibration in each of its phases; what loads must also go on."""
    loops = [Calibrating()]

    def spoiled_calibration(phase: Any) -> st.SearchStrategy[Any]:
        return spoiled(phase["calibration"]).map(lambda state: {**phase, "calibration": state})

    def attempt(state: Any) -> str:
        loop = loops[0]
        if refusal(loop.aees, state) is not None:
            return REFUSED
        loops[0] = Calibrating()
        loop.go_on(2)
        json.dumps(loop.aees.state_dict(), allow_nan=False)
        return LOADED

    return st.one_of(list(map(spoiled_calibration, calibrations().values()))), attempt


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

    fillings = [b"", b"\x00", b"\xff", b"[" * 5000, b"9" * 5000, b"NaN", b'"']
    garbled = st.tuples(
        st.integers(0, len(text) - 1),
        st.one_of(st.sampled_from([0, 1, len(text)]), st.integers(0, 49)),
        st.sampled_from(fillings),
    )

    def attempt(drawn: tuple[int, int, bytes]) -> str:
        start, length, filling = drawn
        content = text[:start].encode() + filling + text[start + length :].encode()
        file.write_bytes(content)
        found, _ = newest_whole_checkpoint(folder)
        if found is None or refusal(aees, json.loads(content).get("pulse")) is not None:
            return REFUSED
        aees.load_state_dict(valid)
        return LOADED

    return garbled, attempt


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

    def attempt(content: bytes) -> str:
        file.write_bytes(content)
        try:
            resolve(str(file), ["--use_cpu", "--output_dir", str(folder)])
        except UsageError as error:
            problems = error.problems
        else:
            return LOADED
        assert all(problem and "\n" not in problem for problem in problems)
        return REFUSED

    brackets = st.builds(
        lambda what, count: (what * count).encode(),
        st.sampled_from(["[", "{a: ", "- "]),
        st.sampled_from([5, 200, 3000]),
    )
    aliases = [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40)]
    bomb = "\n".join(["a0: &a0 [x, x]", *aliases]).encode()
    lines = st.sampled_from(texts).flatmap(spoiled_lines)
    return st.one_of(st.binary(max_size=200), brackets, st.just(bomb), *[lines] * 12), attempt


@st.composite
def spoiled_lines(draw: st.DrawFn, recipe: str) -> bytes:
    """A recipe that is changed in one to four places."""
    known = sorted(keys_of(recipe_parser()))
    text = recipe
    for _ in range(draw(st.integers(1, 4))):
        lines = text.splitlines()
        index = draw(st.integers(0, len(lines) - 1))
        what, value = draw(st.integers(0, 19)), draw(st.sampled_from(VALUES))
        if what < 6 and ":" in lines[index]:
            lines[index] = lines[index].split(":")[0] + ": " + value
        elif what < 14:
            lines.append(f"{draw(st.sampled_from(known))}: {value}")
        elif what < 15:
            lines[index] = lines[index] * 2
        elif what < 17:
            del lines[index]
        elif what < 18:
            lines.insert(index, f"{value}: {value}")
        else:
            cut = draw(st.integers(0, len(lines[index])))
            odd = draw(st.sampled_from("\x00\x07\t\x85\uffff"))
            lines[index] = lines[index][:cut] + odd + lines[index][cut:]
        text = "\n".join(lines) or "a: 1"
    return text.encode("utf-8", "replace")
