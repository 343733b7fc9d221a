"""A run that goes over its data several times is calibrated for that."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification

from pulseopt_hf import AEES, find_learning_rate
from pulseopt_hf.embedded import minilm_folder
from pulseopt_hf.optim import calibrator
from pulseopt_hf.optim.newness import Newness
from tests.trainer.test_calibration import NAMED, calibrator_of

ROWS, BATCH = 64, 8


@pytest.fixture(autouse=True)
def as_if_pretrained(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the tiny models, which are new, for pretrained ones with a new head."""
    if "real" not in request.node.name:
        new_head = Newness(has_new_head=True)
        monkeypatch.setattr(calibrator, "newness_of", lambda *args: new_head)


def test_a_real_pretrained_model_is_divided_for_passes_and_a_real_new_one_is_not(
    trainer_of: Any, tiny_model: Any, tiny_data: Any
) -> None:
    pretrained = AutoModelForSequenceClassification.from_pretrained(
        minilm_folder(), num_hidden_layers=1
    )
    rows = [
        {"input_ids": row["input_ids"], "labels": index % 2}
        for index, row in enumerate(tiny_data[:ROWS])
    ]
    found = {
        name: trainer_of(
            model=model,
            train_dataset=data,
            per_device_train_batch_size=BATCH,
            max_steps=-1,
            num_train_epochs=7,
        ).find_learning_rate()
        for name, model, data in (
            ("pretrained", pretrained, rows),
            ("new", tiny_model(), tiny_data[:ROWS]),
        )
    }
    assert found["pretrained"].reason is None
    assert found["pretrained"].divisor == pytest.approx(7 ** (2 / 3))
    assert found["new"].reason is None
    assert found["new"].divisor == 1.0


@pytest.mark.parametrize("road", ["subclass", "attached", "events"])
@pytest.mark.parametrize(
    ("settings", "passes"),
    [
        ({"max_steps": -1, "num_train_epochs": 7}, 7.0),
        ({"max_steps": -1, "num_train_epochs": 7.5}, 7.5),
        ({"max_steps": 60}, 60 * BATCH / ROWS),
        ({"max_steps": 60, "gradient_accumulation_steps": 2}, 60 * 2 * BATCH / ROWS),
    ],
)
def test_the_arguments_say_how_often(
    trainer_of: Any, road: str, settings: Any, passes: float, tiny_data: Any
) -> None:
    trainer = trainer_of(
        NAMED, road, train_dataset=tiny_data[:ROWS], per_device_train_batch_size=BATCH, **settings
    )
    trainer.train()
    search = calibrator_of(trainer).search
    assert search.learning_rate is not None
    assert search.passes == passes
    assert search.divisor == pytest.approx(passes ** (2 / 3))
    assert calibrator_of(trainer).outcome.divisor == search.divisor


def test_data_without_a_length_counts_as_one_pass(trainer_of: Any, tiny_data: Any) -> None:
    rows = tiny_data[:ROWS]

    class Stream(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(list(rows) * 10)

    trainer = trainer_of(NAMED, train_dataset=Stream(), max_steps=60)
    trainer.train()
    assert calibrator_of(trainer).search.passes == 1.0


@pytest.mark.parametrize(("epochs", "batch"), [(1, 1), (7, BATCH)])
def test_what_is_asked_for_is_what_training_finds(
    trainer_of: Any, epochs: int, batch: int, tiny_data: Any
) -> None:
    trainer = trainer_of(
        NAMED,
        train_dataset=tiny_data[:ROWS],
        per_device_train_batch_size=batch,
        max_steps=-1,
        num_train_epochs=epochs,
    )
    asked = trainer.find_learning_rate().learning_rate
    trainer.train()
    assert calibrator_of(trainer).search.passes == epochs
    assert calibrator_of(trainer).outcome.learning_rate == asked


def test_a_loop_of_ones_own_says_it(tiny_model: Any, tiny_data: Any) -> None:
    found = []
    loader: Any = DataLoader(tiny_data[:ROWS], batch_size=BATCH)
    for passes in (1.0, 8.0):
        model = tiny_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        suggestion = find_learning_rate(
            model=model,
            optimizer=optimizer,
            batches=loader,
            loss=lambda model, batch: model(**batch).loss,
            passes=passes,
        )
        aees = AEES(optimizer, model=model, calibration="auto", passes=passes)
        assert aees.calibrator is not None
        assert aees.calibrator.search.passes == passes
        found.append(suggestion.learning_rate)
    assert found[0] / found[1] == pytest.approx(4.0)
