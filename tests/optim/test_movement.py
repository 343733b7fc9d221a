"""How far a step moves what a model computes, against the divergence that it stands for."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from transformers.modeling_outputs import CausalLMOutput, QuestionAnsweringModelOutput

from pulseopt_hf.optim.movement import MOST_VALUES, POSITIONS, loss_of, movement, read


def rms(before: Any, after: Any, arguments: Any = (), **kwargs: Any) -> float:
    total = count = 0.0
    one, other = read(before, dict(arguments), **kwargs), read(after, dict(arguments), **kwargs)
    assert [reading.kind for reading in one] == [reading.kind for reading in other]
    for a, b in zip(one, other, strict=True):
        moved, positions = movement(a, b)
        total, count = total + moved, count + positions
    return (total / count) ** 0.5


@pytest.mark.parametrize("classes", [2, 6, 300])
def test_classes_move_by_the_root_of_twice_the_divergence(classes: int) -> None:
    torch.manual_seed(0)
    logits = torch.randn(64, classes)
    moved = logits + 0.01 * torch.randn(64, classes)
    p, q = logits.log_softmax(-1), moved.log_softmax(-1)
    divergence = (p.exp() * (p - q)).sum(-1).mean()
    assert rms(logits, moved) == pytest.approx((2 * divergence).sqrt().item(), rel=0.02)


def test_what_shifts_all_logits_alike_is_no_movement() -> None:
    logits = torch.randn(8, 3)
    assert rms(logits, logits + 5.0) == pytest.approx(0.0, abs=1e-5)


def test_a_row_of_many_positions_may_move_further() -> None:
    torch.manual_seed(0)
    for length in (2, 16, 200):
        logits = torch.randn(4, length, 5)
        moved = logits + 0.01 * torch.randn(4, length, 5)
        flat = rms(logits.reshape(-1, 5), moved.reshape(-1, 5))
        assert rms(logits, moved) == pytest.approx(flat / POSITIONS**0.5)


@pytest.mark.parametrize("name", ["labels", "attention_mask"])
def test_positions_that_teach_nothing_are_left_out(name: str) -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 10, 5)
    moved = logits.clone()
    moved[:, 5:] += torch.randn(4, 5, 5)
    mask = torch.ones(4, 10, dtype=torch.long)
    mask[:, 5:] = -100 if name == "labels" else 0
    assert rms(logits, moved, {name: mask}) == 0.0
    assert rms(logits, moved) > 0.02
    other = {name: torch.zeros(4, 3, dtype=torch.long)}  # of another shape: not about these
    assert rms(logits, moved, other) == rms(logits, moved)


def test_only_so_many_values_are_kept() -> None:
    logits = torch.zeros(1, 3000, 2000)
    (reading,) = read(logits, {})
    assert 0.5 * MOST_VALUES <= reading.values.numel() <= MOST_VALUES
    assert reading.row_length == POSITIONS


OUTPUTS = {
    "tensor": (torch.randn(4, 3), "classes"),
    "tuple with a loss": ((torch.tensor(1.0), torch.randn(4, 3)), "classes"),
    "mapping": ({"logits": torch.randn(4, 3), "loss": torch.tensor(1.0)}, "classes"),
    "ordered": (OrderedDict(logits=torch.randn(4, 3)), "classes"),
    "model output": (CausalLMOutput(logits=torch.randn(2, 4, 9)), "classes"),
    "pixels": (torch.randn(2, 3, 4, 4), "classes"),
    "regression": ({"logits": torch.randn(4, 1), "loss": torch.tensor(2.0)}, "numbers"),
    "a bare score": ({"logits": torch.randn(4, 1)}, "numbers"),
    "fused head": ({"log_probs": torch.randn(2, 5), "loss": torch.tensor(1.0)}, "numbers"),
    "sentence": ({"sentence_embedding": torch.randn(4, 8)}, "embeddings"),
    "tokens": ({"last_hidden_state": torch.randn(4, 5, 8)}, "embeddings"),
    "loss alone": ({"loss": torch.tensor(1.0)}, "loss"),
    "losses of replicas": ({"loss": torch.tensor([1.0, 2.0])}, "loss"),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_every_output_is_read_and_answers(name: str) -> None:
    output, kind = OUTPUTS[name]
    readings = read(output, {})
    assert {reading.kind for reading in readings} == {kind}
    for reading in readings:
        assert movement(reading, reading)[0] == 0.0

    def moved(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: moved(item) for key, item in value.items()}
        if isinstance(value, tuple):
            return tuple(map(moved, value))
        generator = torch.Generator().manual_seed(0)
        return value + 0.01 * torch.randn(value.shape, generator=generator)

    assert 0.0 < rms(output, moved(dict(output) if hasattr(output, "keys") else output)) < 0.1


def test_several_logits_count_together() -> None:
    output = QuestionAnsweringModelOutput(
        start_logits=torch.randn(4, 7), end_logits=torch.randn(4, 7)
    )
    assert [reading.values.shape for reading in read(output, {})] == [(4, 7), (4, 7)]


def test_a_number_has_the_unit_of_its_error() -> None:
    """The same step is as long whether a target is in metres or millimetres."""
    steps = []
    for unit in (1.0, 1000.0):
        logits = torch.tensor([[1.0], [2.0]]) * unit
        loss = torch.tensor(0.25) * unit**2
        before = {"logits": logits, "loss": loss}
        steps.append(rms(before, {"logits": logits + 0.05 * unit, "loss": loss}))
    assert steps == pytest.approx([0.1, 0.1])


def test_labels_are_decisions_of_their_own() -> None:
    logits = torch.zeros(4, 3)
    moved = logits + 0.01
    assert rms(logits, moved, multi_label=True) == pytest.approx((3 * 0.25) ** 0.5 * 0.01)
    assert rms(logits, moved) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("output", [None, "text", {}, {"ids": torch.arange(3)}, ()])
def test_what_cannot_be_read_gives_nothing(output: Any) -> None:
    assert read(output, {}) == []
    assert loss_of(output) is None


def test_a_models_own_loss_is_found() -> None:
    assert loss_of({"loss": torch.tensor([1.0, 3.0]), "logits": torch.zeros(1)}) == 2.0
    assert loss_of((torch.tensor(1.0), torch.zeros(2, 2))) == 1.0
    assert loss_of(torch.zeros(2, 2)) is None
