"""A pretrained model under a new head is calibrated by what happens to its body."""

import dataclasses
from typing import Any

import pytest
import torch
from schedulefree import AdamWScheduleFree
from transformers import AutoModelForSequenceClassification

from pulseopt_hf import find_learning_rate
from pulseopt_hf.aees.calibration import TRUSTED
from pulseopt_hf.embedded import minilm_folder
from pulseopt_hf.optim import calibrator
from pulseopt_hf.optim.newness import newness_of

BATCH = 8


def minilm(layers: int) -> Any:
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(
        minilm_folder(), num_hidden_layers=layers
    )


def batches() -> list[dict[str, torch.Tensor]]:
    """Return rows of numbers spelled out, half of them in reverse."""
    rows = []
    for index in range(10 * BATCH):
        words = [1000 + ord(letter) % 97 for letter in f"{index} " * 12][:24]
        rows.append(words[:: 1 if index % 2 else -1])
    labels = torch.arange(len(rows)) % 2
    return [
        {"input_ids": torch.tensor(rows[i : i + BATCH]), "labels": labels[i : i + BATCH]}
        for i in range(0, len(rows), BATCH)
    ]


def found(layers: int, bf16: bool = False, **optimizer: Any) -> float:
    model = minilm(layers)
    made = optimizer.pop("make", torch.optim.AdamW)(model.parameters(), lr=5e-5, **optimizer)
    if isinstance(made, AdamWScheduleFree):
        made.train()

    def loss(model: Any, batch: Any) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return model(**batch).loss

    suggestion = find_learning_rate(model=model, optimizer=made, batches=batches(), loss=loss)
    assert suggestion.reason is None, suggestion.reason
    assert len({trial.step for trial in suggestion.trials}) >= TRUSTED + 1
    return suggestion.learning_rate


def test_the_deeper_the_model_the_lower_the_lr(monkeypatch: pytest.MonkeyPatch) -> None:
    shallow, deep = found(1), found(6)
    assert deep < 0.5 * shallow
    # It is the body that says so: through the head alone they differ less.
    monkeypatch.setattr(
        calibrator, "newness_of", lambda *args: dataclasses.replace(newness_of(*args), body=None)
    )
    assert found(6) > 1.5 * deep


def test_bf16_finds_the_same() -> None:
    """Rounding moves the body's outputs by a tenth of the radius, however small the step is."""
    assert found(2, bf16=True) == pytest.approx(found(2), rel=0.15)


def test_an_optimizers_own_warm_up_makes_no_difference() -> None:
    plain, warm = (found(2, make=AdamWScheduleFree, warmup_steps=n) for n in (0, 30))
    assert warm == pytest.approx(plain, rel=0.01)
