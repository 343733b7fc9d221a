"""The search for the LR's scale, on movements that are computed instead of trained for."""

from __future__ import annotations

import json
import math
import random

import pytest

from pulseopt_hf.aees.calibration import (
    LOSS_RADIUS,
    MOST_TRIALS,
    SHORTEST_RUN,
    TRUSTED,
    WEIGHT_RADIUS,
    Calibration,
    Movement,
)
from pulseopt_hf.aees.state import StateError

ROWS = [0.5 + 0.02 * row for row in range(16)]
MEAN = sum(ROWS) / len(ROWS)


class Model:
    """Losses and weights that move in proportion to the LR, up to where they saturate.

    Args:
        loss_lr: LR whose step moves the losses by `LOSS_RADIUS`.
        weight_lr: LR whose step moves the weights by `WEIGHT_RADIUS`.
        balanced: share of the batches that hardly move the losses.
    """

    def __init__(
        self, loss_lr: float, weight_lr: float = math.inf, balanced: float = 0.0, seed: int = 0
    ) -> None:
        self.loss_lr, self.weight_lr, self.balanced = loss_lr, weight_lr, balanced
        self.rng = random.Random(seed)

    def step(self, lr: float) -> Movement:
        movement = LOSS_RADIUS * lr / self.loss_lr
        if self.rng.random() < self.balanced:
            movement *= 0.1
        movement = min(movement, 0.3) * self.rng.uniform(0.9, 1.1)
        signs = [1.0 if row % 2 else -1.0 for row in range(len(ROWS))]
        losses = [x + sign * movement * MEAN for x, sign in zip(ROWS, signs, strict=True)]
        return Movement(losses, WEIGHT_RADIUS * lr / self.weight_lr)


def run(model: Model, base_lr: float, steps: int = 600) -> Calibration:
    search, moved = Calibration(steps), Movement(ROWS, 0.0)
    for step in range(steps):
        if search.is_due(step):
            if search.phase == "start":
                assert search.begin(step, ROWS).mark
            else:
                search.advance(step, moved)
        if not search.is_done:
            moved = model.step(base_lr * search.multiplier(step))
    return search


@pytest.mark.parametrize("wrong_by", [1e-4, 1 / 300, 1 / 30, 1 / 3, 1.0, 3.0, 30.0, 300.0, 1e4])
@pytest.mark.parametrize("limit", ["losses", "weights"])
def test_a_wrong_base_lr_is_put_right(wrong_by: float, limit: str) -> None:
    model = Model(1e-3) if limit == "losses" else Model(1.0, weight_lr=1e-3)
    search = run(model, base_lr=1e-3 * wrong_by)
    assert search.is_done
    assert 1e-3 * wrong_by * search.scale == pytest.approx(1e-3, rel=0.25)
    assert len(search.trials) <= TRUSTED + 5
    assert search.probes == len(search.trials) + 1


@pytest.mark.parametrize("seed", range(20))
def test_batches_that_hardly_move_the_losses_do_not_raise_the_lr(seed: int) -> None:
    """Half of a classifier's batches may hold as many rows of one class as of the other."""
    search = run(Model(1e-3, balanced=0.5, seed=seed), base_lr=1e-3)
    assert search.scale <= 1.2


@pytest.mark.parametrize("classes", [2, 6, 1000])
def test_the_number_of_classes_does_not_raise_the_lr(classes: int) -> None:
    """A step of the logits moves a cross-entropy as far, whatever its level is."""
    search, rows = Calibration(600), [math.log(classes)] * 16
    search.begin(0, rows, of_classes=True)
    for step in range(1, 600):
        moved = LOSS_RADIUS * math.log(2.0) * search.multiplier(step - 1)
        losses = [x + (moved if row % 2 else -moved) for row, x in enumerate(rows)]
        search.advance(step, Movement(losses, 0.0))
        if search.is_done:
            break
    assert search.scale == pytest.approx(1.0)


def test_every_trial_begins_where_training_began_and_only_the_last_may_stay() -> None:
    search = Calibration(600)
    model = Model(1e-3)
    orders = [search.begin(0, ROWS)]
    step = 0
    while not search.is_done:
        step += 1
        orders.append(search.advance(step, model.step(1e-3 * search.multiplier(step))))
    assert orders[0].mark
    assert all(order.restore and not order.finished for order in orders[1:-1])
    assert orders[-1].finished
    assert not orders[-1].restore
    assert [trial.kept for trial in search.trials] == [False] * (len(search.trials) - 1) + [True]


@pytest.mark.parametrize("loss", [math.nan, 0.9])
def test_movements_that_do_not_depend_on_the_lr_leave_the_base_lr(loss: float) -> None:
    search = Calibration(600)
    search.begin(0, ROWS)
    for step in range(1, MOST_TRIALS):
        assert search.advance(step, Movement([loss] * len(ROWS), 0.0)).restore
    assert not search.is_done
    order = search.advance(MOST_TRIALS, Movement([loss] * len(ROWS), 0.0))
    assert order.restore
    assert order.finished
    assert search.is_done
    assert search.failed
    assert search.scale == search.multiplier(MOST_TRIALS) == 1.0
    assert not any(trial.kept for trial in search.trials)


def test_where_no_step_moves_anything_the_base_lr_stands() -> None:
    search = run(Model(math.inf), base_lr=1e-3)
    assert search.is_done
    assert len(search.trials) == MOST_TRIALS
    assert search.failed
    assert search.scale == 1.0


def test_a_skipped_step_is_tried_again() -> None:
    search = Calibration(600)
    search.begin(0, ROWS)
    scale = search.scale
    assert search.is_due(1)
    search.postpone(1)
    assert not search.is_due(1)
    assert search.is_due(2)
    assert search.scale == scale
    assert not search.trials


def test_the_lr_rises_after_the_search_unless_the_schedule_does_it() -> None:
    search = run(Model(1e-3), base_lr=1e-3)
    first = search.trials[-1].step + 1
    rising = [search.multiplier(first + k) / search.scale for k in (0, 14, 29, 30, 500)]
    assert rising == pytest.approx([1 / 30, 0.5, 1.0, 1.0, 1.0])
    search.ramp = False
    assert search.multiplier(first) == search.scale


def test_the_state_is_json_and_continues_exactly_from_every_step() -> None:
    whole = run(Model(1e-3), base_lr=1e-2)
    for stop in range(13):
        search, model, moved = Calibration(600), Model(1e-3), Movement(ROWS, 0.0)
        for step in range(15):
            if step == stop:
                state = json.loads(json.dumps(search.state_dict()))
                search = Calibration(SHORTEST_RUN, ramp=False)
                search.load_state_dict(state)
            if search.is_due(step):
                if search.phase == "start":
                    search.begin(step, ROWS)
                else:
                    search.advance(step, moved)
            if not search.is_done:
                moved = model.step(1e-2 * search.multiplier(step))
        assert search.state_dict() == whole.state_dict()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("phase", "lost"),
        ("scale", 0.0),
        ("scale", math.nan),
        ("origin", []),
        ("origin", "x"),
        ("unit", 0.0),
        ("ramp", 1),
        ("trials", [{"scale": 1.0}]),
        ("probes", -1),
        ("step", "one"),
    ],
)
def test_a_damaged_state_is_refused(key: str, value: object) -> None:
    search = Calibration(600)
    search.begin(0, ROWS)
    before = search.state_dict()
    with pytest.raises(StateError):
        search.load_state_dict({**before, key: value})
    assert search.state_dict() == before


def test_a_run_that_is_too_short_is_refused() -> None:
    with pytest.raises(ValueError, match="needs 50 optimizer steps, got 49"):
        Calibration(49)
