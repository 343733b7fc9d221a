"""The search for a learning rate, on movements that are computed instead of trained for."""

import json
import math
import random
from dataclasses import asdict, dataclass
from typing import Any

import pytest

from pulseopt_hf.aees.calibration import (
    MOST_TRIALS,
    NOT_FINITE,
    OUTPUT_RADIUS,
    PASSES_EXPONENT,
    TRUSTED,
    WEIGHT_RADIUS,
    Calibration,
    Outcome,
    Trial,
    finite_movement,
    outcome_from_json,
    trial_from_json,
)
from pulseopt_hf.aees.json_checks import StateError


@dataclass
class Model:
    """Outputs and weights that move in proportion to the LR, up to where the outputs saturate."""

    output_lr: float  # whose step moves the outputs by `OUTPUT_RADIUS`
    weight_lr: float = math.inf  # whose step moves the weights by `WEIGHT_RADIUS`
    scatter: float = 1.0  # by how much batches differ, as a factor
    repeatable: bool = True  # whether one gradient serves several trials

    def trial(self, lr: float, step: int) -> Trial:
        rng = random.Random(step)
        factor = self.scatter ** rng.uniform(-1.0, 1.0) * (2.0 if step == 0 else 1.0)
        movement = OUTPUT_RADIUS * min(lr / self.output_lr * factor, 30.0)
        return Trial(lr, movement, WEIGHT_RADIUS * lr / self.weight_lr, step == 0, step)


def run(model: Model, set_lr: float, **of_the_run: Any) -> Calibration:
    search = Calibration(set_lr, **of_the_run)
    for step in range(100):
        while not search.is_done:
            search.add(model.trial(search.next_lr, step))
            if search.batch_is_done or not model.repeatable:
                break
    return search


@pytest.mark.parametrize("wrong_by", [1e-4, 1 / 300, 1 / 30, 1 / 3, 1.0, 3.0, 30.0, 300.0, 1e4])
@pytest.mark.parametrize("limit", ["outputs", "weights"])
@pytest.mark.parametrize("repeatable", [True, False])
def test_a_wrong_lr_is_put_right(wrong_by: float, limit: str, repeatable: bool) -> None:
    model = Model(1e-3) if limit == "outputs" else Model(3e-3, weight_lr=1e-3)
    model.repeatable = repeatable
    search = run(model, 1e-3 * wrong_by)
    assert search.learning_rate == pytest.approx(1e-3, rel=0.05)
    assert search.limited_by == limit
    assert not search.failed
    assert len(search.trials) <= TRUSTED + 7


def test_what_is_found_does_not_depend_on_the_lr_that_was_set() -> None:
    found = [run(Model(1e-3, scatter=2.0), lr).learning_rate for lr in (1e-7, 1e-3, 1.0)]
    assert found == pytest.approx([found[0]] * 3, rel=0.01)


def test_the_first_batch_only_guides_and_the_others_decide_together() -> None:
    """The step always does well on its own batch, and batches differ."""
    search = run(Model(1e-3, scatter=1.5), 1e-4)
    trusted = [trial for trial in search.trials if not trial.own_batch and trial.is_near]
    assert len({trial.step for trial in trusted}) == TRUSTED
    slopes = [trial.movement / trial.learning_rate for trial in trusted]
    assert len(set(slopes)) == TRUSTED
    rms = math.sqrt(sum(slope**2 for slope in slopes) / TRUSTED)
    assert search.learning_rate == pytest.approx(OUTPUT_RADIUS / rms)


@pytest.mark.parametrize("movement", [0.0, 0.9 * OUTPUT_RADIUS, 20.0, NOT_FINITE])
@pytest.mark.parametrize("weights", [0.0, "in proportion"])
def test_a_measure_that_does_not_answer_to_the_lr_decides_nothing(movement, weights):
    """A pretrained model's weights are not moved by a quarter because its outputs said nothing."""
    search = Calibration(1e-5)
    step = 0
    while not search.is_done:
        lr = search.next_lr
        moved = 0.0 if weights == 0.0 else min(WEIGHT_RADIUS * lr / 1e-2, NOT_FINITE)
        search.add(Trial(lr, movement, moved, step == 0, step))
        step += search.batch_is_done
    assert search.failed
    assert search.learning_rate is None
    assert search.limited_by is None
    assert search.levels_off == (weights != 0.0 and movement == 0.9 * OUTPUT_RADIUS)
    assert search.levels_off or len(search.trials) == MOST_TRIALS


@pytest.mark.parametrize("jump", [0.4, 0.9])
def test_outputs_that_jump_and_then_level_off_say_nothing(jump: float) -> None:
    """As those of a token of zeros, which a norm scales to its full length in the smallest step."""
    search = Calibration(5e-5)
    while not search.is_done:
        lr = search.next_lr
        moved = OUTPUT_RADIUS * (jump * min(1.0, lr / 1e-7) + lr / 1e-2)
        search.add(Trial(lr, moved, WEIGHT_RADIUS * lr / 1e-2, True, 0))
    assert search.levels_off
    assert search.failed
    assert len(search.trials) <= 4


@pytest.mark.parametrize("repeatable", [True, False])
def test_outputs_that_move_much_and_go_on_moving_are_believed(repeatable: bool) -> None:
    search = run(Model(1e-7, weight_lr=1e-2, repeatable=repeatable), 5e-5)
    assert search.learning_rate == pytest.approx(1e-7, rel=0.01)
    assert max(trial.learning_rate for trial in search.trials) > 4e-7  # it looked ahead


@pytest.mark.parametrize("set_lr", [1e-6, 1e-2, 10.0])
def test_the_weights_decide_where_the_outputs_move_a_twentieth_as_far_and_not_below(set_lr):
    search = run(Model(1e-2 / 0.07, weight_lr=1e-2), set_lr)
    assert search.learning_rate == pytest.approx(1e-2, rel=0.01)
    assert search.limited_by == "weights"
    assert run(Model(1e-2 / 0.03, weight_lr=1e-2), set_lr).failed


@pytest.mark.parametrize("movement", [math.nan, math.inf, 1e12, NOT_FINITE])
def test_a_movement_that_is_not_finite_counts_as_the_largest(movement: float) -> None:
    assert finite_movement(movement) == NOT_FINITE


def test_after_a_step_that_was_not_finite_the_search_retreats() -> None:
    search = Calibration(1.0)
    search.add(Trial(search.next_lr, NOT_FINITE, 0.1, True, 0))
    assert search.next_lr == pytest.approx(1.0 / 300.0 / 30.0)


def test_the_state_is_json_and_continues_exactly_from_every_trial() -> None:
    model = Model(1e-3, scatter=1.5)
    whole = run(model, 1e-2)
    for stop in range(len(whole.trials) + 1):
        search = Calibration(1e-2)
        for trial in whole.trials[:stop]:
            search.add(trial)
        restored = Calibration(1.0, passes=5.0, steps=70, new_layers=3)
        restored.load_state_dict(json.loads(json.dumps(search.state_dict())))
        assert restored.next_lr == search.next_lr
        assert restored.batch_is_done == search.batch_is_done
        assert restored.learning_rate == search.learning_rate
        assert restored.state_dict() == search.state_dict()
    assert restored.is_done


TRIAL = Trial(1e-3, 0.0, 0.0, True, 0)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        *(("set_lr", value, "`set_lr`") for value in (0.0, math.nan, "high")),
        *(("passes", value, "`passes`") for value in (0.5, math.nan)),
        *(("steps", value, "`steps`") for value in (0, 1.5)),
        ("trials", [{"learning_rate": 1.0}], "`movement`"),
        ("trials", "x", "`trials`"),
        ("trials", [{"learning_rate": 1.0, "movement": -1.0}], "`movement`"),
        ("trials", [asdict(TRIAL)] * 19, "at most 18"),
    ],
)
def test_a_damaged_state_is_refused(key: str, value: object, message: str) -> None:
    search = Calibration(1e-3)
    before = search.state_dict()
    with pytest.raises(StateError, match=message):
        search.load_state_dict({**before, key: value})
    assert search.state_dict() == before
    assert trial_from_json(asdict(TRIAL), "trial") == TRIAL


@pytest.mark.parametrize("passes", [0.3, 1.0, 3.0, 10.0])
def test_passes_over_the_data_divide_the_lr_of_a_pretrained_model(passes: float) -> None:
    search = run(Model(1e-3, weight_lr=1e3), 1e-5, passes=passes)
    divisor = max(1.0, passes) ** PASSES_EXPONENT
    assert search.learning_rate == pytest.approx(1e-3 / divisor, rel=0.01)
    assert search.limited_by == "outputs"
    assert search.factor == pytest.approx(1.0 / divisor)
    assert search.factor_for == ("the length of the run" if passes > 1.0 else None)


@pytest.mark.parametrize(("steps", "factor"), [(54, 10 / 3), (150, 2.0), (600, 1.0), (9999, 1.0)])
def test_a_short_run_takes_a_higher_lr_and_a_long_one_no_lower(steps: int, factor: float) -> None:
    search = run(Model(1e-3, weight_lr=1e3), 1e-5, steps=steps)
    assert search.learning_rate == pytest.approx(factor * 1e-3, rel=0.01)
    assert search.factor == pytest.approx(factor)
    assert search.factor_for == ("the length of the run" if factor > 1.0 else None)
    several = run(Model(1e-3, weight_lr=1e3), 1e-5, passes=32.0, steps=steps)
    assert several.factor == pytest.approx(factor / 16.0)


def test_the_outputs_of_a_new_model_may_move_further_the_more_layers_it_has() -> None:
    for layers, factor in ((0, 1.0), (2, 1.0), (8, 4.0), (12, 6.0)):
        search = run(Model(1e-3, weight_lr=1e3), 1e-5, new_layers=layers)
        assert search.learning_rate == pytest.approx(factor * 1e-3, rel=0.01)
        assert search.limited_by == "outputs"
        assert search.factor == pytest.approx(factor)
        assert search.factor_for == ("the layers of a new model" if factor > 1.0 else None)
    # The weights' radius stays.
    search = run(Model(1e-3, weight_lr=2e-3), 1e-5, new_layers=12)
    assert search.learning_rate == pytest.approx(2e-3, rel=0.01)
    assert search.limited_by == "weights"


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_a_length_and_an_lr_that_are_none_are_refused(value: Any) -> None:
    for name in ("set_lr", "passes", "steps"):
        with pytest.raises(ValueError, match=f"`{name}` must be a number > 0"):
            Calibration(**{"set_lr": 1e-3, name: value})


def test_an_outcome_is_one_line_with_both_lrs_and_how_to_keep_the_old_one() -> None:
    found = str(Outcome(2e-5, 2.6e-4, "outputs", None, 5))
    assert "\n" not in found
    for part in ("2e-05 was set", "0.00026 is used", "(13 times)", "calibration='off'"):
        assert part in found
    deep = str(Outcome(2e-5, 2.6e-4, "outputs", None, 5, 4.0, "the layers of a new model"))
    assert "too far, times 4 for the layers of a new model. To keep" in deep
    kept = str(Outcome(2e-5, 2e-5, None, "it is zero", 5))
    assert kept == (
        "The learning rate is not calibrated: it is zero. The one that was set is used."
    )


def test_an_outcome_can_be_read_back() -> None:
    outcome = Outcome(2e-5, 2.6e-4, "weights", None, 5)
    content = json.loads(json.dumps(outcome.__dict__))
    assert outcome_from_json(content, "outcome") == outcome
    with pytest.raises(StateError):
        outcome_from_json({**content, "learning_rate": -1.0}, "outcome")
