"""How far a step moves what a model computes, and what is the unit of that."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutput, QuestionAnsweringModelOutput

from pulseopt_hf.optim.movement import (
    DROPOUT,
    EMBEDDING_UNIT,
    MOST_VALUES,
    distance,
    loss_of,
    noise,
    read,
    unit,
)


def moved(before: Any, after: Any, arguments: Any = (), **kwargs: Any) -> float:
    """Return the squared distance of two outputs."""
    one, other = read(before, dict(arguments), **kwargs), read(after, dict(arguments), **kwargs)
    return sum(distance(a, b) for a, b in zip(one, other, strict=True))


def test_what_shifts_all_logits_alike_is_no_movement() -> None:
    logits = torch.randn(8, 3)
    assert moved(logits, logits + 5.0) == pytest.approx(0.0, abs=1e-8)
    # Labels are decisions of their own, so for them it is.
    assert moved(logits, logits + 5.0, multi_label=True) == pytest.approx(8 * 3 * 25.0)


@pytest.mark.parametrize("name", ["labels", "attention_mask"])
def test_positions_that_teach_nothing_are_left_out(name: str) -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 10, 5)
    after = logits.clone()
    after[:, 5:] += torch.randn(4, 5, 5)
    mask = torch.ones(4, 10, dtype=torch.long)
    mask[:, 5:] = -100 if name == "labels" else 0
    assert moved(logits, after, {name: mask}) == 0.0
    assert moved(logits, after) > 10.0
    other = {name: torch.zeros(4, 3, dtype=torch.long)}  # of another shape: not about these
    assert moved(logits, after, other) == moved(logits, after)


def test_only_so_many_values_are_kept() -> None:
    (reading,) = read(torch.zeros(1, 3000, 2000), {})
    assert 0.5 * MOST_VALUES <= reading.values.numel() <= MOST_VALUES


OUTPUTS = {
    "tensor": (torch.randn(4, 3), False),
    "tuple with a loss": ((torch.tensor(1.0), torch.randn(4, 3)), False),
    "mapping": ({"logits": torch.randn(4, 3), "loss": torch.tensor(1.0)}, False),
    "model output": (CausalLMOutput(logits=torch.randn(2, 4, 9)), False),
    "pixels": (torch.randn(2, 3, 4, 4), False),
    "regression": ({"logits": torch.randn(4, 1), "loss": torch.tensor(2.0)}, False),
    "fused head": ({"log_probs": torch.randn(2, 5), "loss": torch.tensor(1.0)}, False),
    "sentence": ({"sentence_embedding": torch.randn(4, 8)}, True),
    "tokens": ({"last_hidden_state": torch.randn(4, 5, 8)}, True),
    "loss alone": ({"loss": torch.tensor(1.0)}, False),
    "losses of replicas": ({"loss": torch.tensor([1.0, 2.0])}, False),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_every_output_is_read_and_answers(name: str) -> None:
    output, is_embedding = OUTPUTS[name]
    readings = read(output, {})
    assert {reading.is_embedding for reading in readings} == {is_embedding}
    assert all(distance(reading, reading) == 0.0 for reading in readings)

    def shifted(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: shifted(item) for key, item in value.items()}
        if isinstance(value, tuple):
            return tuple(map(shifted, value))
        generator = torch.Generator().manual_seed(0)
        return value + 0.01 * torch.randn(value.shape, generator=generator)

    assert moved(output, shifted(dict(output) if hasattr(output, "keys") else output)) > 0.0


def test_several_logits_count_together() -> None:
    output = QuestionAnsweringModelOutput(
        start_logits=torch.randn(4, 7), end_logits=torch.randn(4, 7)
    )
    assert [reading.values.shape for reading in read(output, {})] == [(4, 7), (4, 7)]


def test_the_unit_goes_with_the_scale_of_the_outputs() -> None:
    """The same step is as long whether a target is in metres or millimetres."""
    found = []
    for scale in (1.0, 1000.0):
        torch.manual_seed(0)
        model, x = nn.Linear(8, 1), torch.randn(64, 8)
        with torch.no_grad():
            (before,) = read(scale * model(x), {})
            with noise(model, 0):
                (noisy,) = read(scale * model(x), {})
            model.weight += 0.1
            (after,) = read(scale * model(x), {})
        found.append(distance(before, after) / unit(before, noisy))
    assert found[0] == pytest.approx(found[1])
    assert found[0] > 1.0


def test_noise_drops_a_tenth_of_what_layers_are_given_and_is_gone_after() -> None:
    model = nn.Sequential(nn.Embedding(9, 1000), nn.LayerNorm(1000), nn.Linear(1000, 1000))
    with torch.no_grad():
        nn.init.ones_(model[0].weight)
        model[1] = nn.Identity()
        nn.init.eye_(model[2].weight)
        nn.init.zeros_(model[2].bias)
        tokens = torch.zeros(5, dtype=torch.long)
        with noise(model, 0):
            noisy = model(tokens)
        assert model(tokens).unique().tolist() == [1.0]
    assert noisy.unique().tolist() == pytest.approx([0.0, 1.0 / (1.0 - DROPOUT)])
    assert (noisy == 0.0).float().mean() == pytest.approx(DROPOUT, abs=0.02)


def test_the_unit_of_embeddings_is_a_share_of_their_spread() -> None:
    (before,) = read({"sentence_embedding": torch.randn(50, 8)}, {})
    spread = (before.values - before.values.mean(0)).square().sum().item()
    assert unit(before, before) == pytest.approx(EMBEDDING_UNIT**2 * spread)


@pytest.mark.parametrize("output", [None, "text", {}, {"ids": torch.arange(3)}, ()])
def test_what_cannot_be_read_gives_nothing(output: Any) -> None:
    assert read(output, {}) == []
    assert loss_of(output) is None


def test_a_models_own_loss_is_found() -> None:
    assert loss_of({"loss": torch.tensor([1.0, 3.0]), "logits": torch.zeros(1)}) == 2.0
    assert loss_of((torch.tensor(1.0), torch.zeros(2, 2))) == 1.0
    assert loss_of(torch.zeros(2, 2)) is None
