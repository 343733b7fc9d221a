"""A run that is short, or goes over its data several times, is calibrated for that."""

from typing import Any

import pytest
from transformers import AutoModelForSequenceClassification

from pulseopt_hf import AEES, find_learning_rate
from pulseopt_hf.aees.calibration import PASSES_EXPONENT, SHORT_RUN
from pulseopt_hf.embedded import minilm_folder
from pulseopt_hf.optim import calibrator
from pulseopt_hf.optim.newness import Newness
from tests.conftest import NAMED, Make, make_rows
from tests.trainer.test_calibration import OURS, Stream, calibrator_of
from tests.trainer.test_find_learning_rate import Loop

ROWS, BATCH = 64, 8


@pytest.fixture(autouse=True)
def as_if_pretrained(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the tiny models, which are new, for pretrained ones with a new head."""
    if "real" not in request.node.name:
        new_head = Newness(has_new_head=True)
        monkeypatch.setattr(calibrator, "newness_of", lambda *args: new_head)


def factor_of(steps: int, passes: float) -> float:
    """Return the factor on the LR, for fewer steps than `SHORT_RUN`."""
    return float((SHORT_RUN / steps) ** 0.5 * passes**-PASSES_EXPONENT)


def test_the_length_counts_for_a_real_pretrained_model_and_not_for_a_real_new_one(
    make_trainer: Make, tiny_model: Any, tiny_data: Any
) -> None:
    pretrained = AutoModelForSequenceClassification.from_pretrained(
        minilm_folder(), num_hidden_layers=1
    )
    rows = [
        {"input_ids": row["input_ids"], "labels": index % 2}
        for index, row in enumerate(tiny_data[:ROWS])
    ]
    settings = {"max_steps": -1, "num_train_epochs": 7, "per_device_train_batch_size": BATCH}
    for model, data, factor in (
        (pretrained, rows, factor_of(7 * ROWS // BATCH, 7)),
        (tiny_model(), tiny_data[:ROWS], 1.0),
    ):
        found = make_trainer(model=model, train_dataset=data, **settings).find_learning_rate()
        assert found.reason is None
        assert found.factor == pytest.approx(factor)


@pytest.mark.parametrize("road", OURS)
@pytest.mark.parametrize(
    ("settings", "steps", "passes"),
    [
        ({"max_steps": -1, "num_train_epochs": 1, "per_device_train_batch_size": 1}, ROWS, 1.0),
        ({"max_steps": -1, "num_train_epochs": 7}, 56, 7.0),
        ({"max_steps": -1, "num_train_epochs": 7.5}, 60, 7.5),
        ({"max_steps": -1, "num_train_epochs": 15, "gradient_accumulation_steps": 2}, 60, 15.0),
        ({"max_steps": 60}, 60, 60 * BATCH / ROWS),
        ({"max_steps": 60, "gradient_accumulation_steps": 2}, 60, 60 * 2 * BATCH / ROWS),
        # Its steps shrink, so the LR hangs on how many there are.
        ({"max_steps": 90, "optim": "adagrad"}, 90, 90 * BATCH / ROWS),
        # Data without a length counts as one pass.
        ({"max_steps": 60, "train_dataset": Stream(make_rows()[:ROWS] * 10)}, 60, 1.0),
    ],
)
def test_the_arguments_say_how_often_and_what_is_asked_for_is_what_training_finds(
    make_trainer: Make, road: str, settings: Any, steps: int, passes: float, tiny_data: Any
) -> None:
    data = {"train_dataset": tiny_data[:ROWS], "per_device_train_batch_size": BATCH}
    trainer = make_trainer(road, NAMED, **{**data, **settings})
    asked = find_learning_rate(trainer)
    trainer.train()
    search = calibrator_of(trainer).search
    assert search.learning_rate == asked.learning_rate is not None
    assert (search.steps, search.passes) == (steps, passes)
    assert search.factor == pytest.approx(factor_of(steps, passes))
    assert calibrator_of(trainer).outcome.factor == search.factor
    assert calibrator_of(trainer).outcome.factor_for == "the length of the run"


def test_a_loop_of_ones_own_says_it(tiny_model: Any, tiny_data: Any) -> None:
    found = []
    for length in ({}, {"passes": 32.0}, {"max_steps": 150}):
        loop = Loop(tiny_model(), tiny_data[:ROWS])
        found.append(loop.ask(**length).learning_rate)
        aees = AEES(loop.optimizer, model=loop.model, calibration="auto", **length)
        assert aees.calibrator.search.passes == length.get("passes", 1.0)
        assert aees.calibrator.search.steps == length.get("max_steps", SHORT_RUN)
    assert [lr / found[0] for lr in found] == pytest.approx([1.0, 1 / 16, 2.0], rel=1e-3)
    with pytest.raises(ValueError, match="`max_steps` must be at least 1, got 0"):
        AEES(loop.optimizer, model=loop.model, calibration="auto", max_steps=0)
