"""The search for the LR's scale, on losses that are computed instead of trained for."""

from __future__ import annotations

import json
import math
import random

import pytest

from pulseopt_hf.aees.calibration import SHORTEST_RUN, Calibration, Order
from pulseopt_hf.aees.state import StateError

PARTS = 8


class Valley:
    """A loss that falls by LR times slope a step up to a best LR, and rises from three times it.

    It obeys orders as a trainer does, and measures with a little noise that parts do not share.
    """

    def __init__(self, best: float, seed: int = 0) -> None:
        self.best = best
        self.loss = 4.0
        self.start = self.kept = 4.0
        self.rng = random.Random(seed)
        self.noise = [self.rng.gauss(0, 0.3) for _ in range(PARTS)]

    def step(self, lr: float) -> None:
        x = lr / self.best
        self.loss -= 0.01 * (self.loss - 1.0) * x * (2.0 - min(x, 6.0))

    def measure(self) -> list[float]:
        return [self.loss + n + self.rng.gauss(0, 1e-5) for n in self.noise]

    def obey(self, order: Order) -> None:
        if order.keep:
            self.kept = self.loss
        if order.restore:
            self.loss = self.start if order.restore == "start" else self.kept
        if order.mark:
            self.start = self.loss


def run(base_lr: float, best: float, steps: int = 600) -> tuple[Calibration, Valley]:
    search, valley = Calibration(steps), Valley(best)
    for step in range(steps):
        while search.is_due(step):
            valley.obey(search.advance(step, valley.measure()))
        valley.step(base_lr * search.multiplier(step))
    return search, valley


@pytest.mark.parametrize("wrong_by", [1e-3, 1 / 30, 1 / 3, 1.0, 3.0, 30.0, 1e3])
def test_a_wrong_base_lr_is_found_out(wrong_by: float) -> None:
    search, valley = run(base_lr=1e-3 * wrong_by, best=1e-3)
    assert search.is_done
    assert 0.25e-3 <= 1e-3 * wrong_by * search.scale <= 2e-3
    assert valley.loss < 1.1  # a static run at a thirtieth ends at 2.9


@pytest.mark.parametrize("steps", [SHORTEST_RUN, 300, 449, 450, 600, 5000])
def test_the_search_ends_early_in_the_run(steps: int) -> None:
    search, _ = run(base_lr=1e-2, best=1e-3, steps=steps)
    last = search.trials[-1].end_step
    assert last <= steps * (0.3 if steps >= 600 else 0.45 if steps >= 300 else 0.75)
    duels = {trial.probe_before for trial in search.trials if trial.phase == "duel"}
    assert len(duels) == (2 if steps >= 450 else 1)


def test_what_does_harm_is_undone() -> None:
    search, valley = Calibration(600), Valley(1e-3)
    order = search.advance(0, valley.measure())
    assert order == Order(mark=True)
    scale = search.scale
    order = search.advance(4, [loss + 1.0 for loss in valley.measure()])
    assert order.restore == "start"
    assert search.scale < scale
    assert not search.trials[-1].kept


def test_a_loss_that_is_not_finite_counts_as_harm() -> None:
    search, valley = Calibration(600), Valley(1e-3)
    search.advance(0, valley.measure())
    assert search.advance(4, [math.nan, math.inf] * 4).restore == "start"


def test_noise_alone_moves_nothing_in_a_duel() -> None:
    rng = random.Random(1)
    moved = 0
    for _ in range(40):
        search = Calibration(600)
        search.phase, search.scale, search._start, search._end = "hold", 1.0, 50, 60
        search._before = [0.7] * PARTS
        step = 60
        while not search.is_done:
            noise = [0.7 + rng.gauss(0, 0.02) for _ in range(PARTS)]
            search.advance(step, noise)
            step = max(search._end, step)
        moved += search.scale != 1.0
    assert moved <= 4


def test_the_state_is_json_and_continues_exactly_from_every_step() -> None:
    whole, _ = run(base_lr=1e-2, best=1e-3, steps=300)
    for stop in range(0, 120, 7):
        search, valley = Calibration(300), Valley(1e-3)
        for step in range(300):
            if step == stop:
                state = json.loads(json.dumps(search.state_dict()))
                search = Calibration(SHORTEST_RUN)
                search.load_state_dict(state)
            while search.is_due(step):
                valley.obey(search.advance(step, valley.measure()))
            valley.step(1e-2 * search.multiplier(step))
        assert search.state_dict() == whole.state_dict()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("phase", "lost"),
        ("scale", 0.0),
        ("scale", math.nan),
        ("before", [1.0]),
        ("before", "x"),
        ("duels", 7),
        ("trials", [{"phase": "duel"}]),
        ("end", 0),
        ("good", -1.0),
    ],
)
def test_a_damaged_state_is_refused(key: str, value: object) -> None:
    search, valley = Calibration(600), Valley(1e-3)
    search.advance(0, valley.measure())
    before = search.state_dict()
    with pytest.raises(StateError):
        search.load_state_dict({**before, key: value})
    assert search.state_dict() == before


def test_a_run_that_is_too_short_is_refused() -> None:
    with pytest.raises(ValueError, match="needs 150 optimizer steps, got 149"):
        Calibration(149)
