"""`torch.compile` and gradient checkpointing: the same arms, and no compilation for a new one."""

import warnings
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from pulseopt_hf import AEES
from tests.conftest import ARMS, Make, flat, take_step, without_dropout

CONFIG: dict[str, Any] = {**ARMS, "episode_length": 3}


def trained(train: Make, **settings: Any) -> Any:
    """Train with nothing compiled before, so that all that is compiled is counted."""
    torch._dynamo.reset()
    counters.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own about its backends
        return train(**settings)


def compiled(train: Make, pulse: Any, model: Any, data: Any, **settings: Any) -> tuple[Any, int]:
    """Train a compiled model, and return the Trainer and how many graphs were compiled."""
    # No smaller last batch, which would be compiled for itself.
    common = {"pulse": pulse, "model": without_dropout(model), "train_dataset": data[:64]}
    trainer = trained(train, **common, **settings)
    assert hasattr(trainer.model_wrapped, "_orig_mod")
    return trainer, counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_model_runs_the_arms_of_the_eager_one_and_compiles_no_more_for_them(
    backend: str, train: Make, tiny_model: Any, tiny_data: Any
) -> None:
    constant = {"lr_candidates": [1.0], "episode_length": 3}
    settings = {"torch_compile": True, "torch_compile_backend": backend}
    _, expected = compiled(train, constant, tiny_model(), tiny_data, **settings)
    trainer, graphs = compiled(train, CONFIG, tiny_model(), tiny_data, **settings)
    assert graphs == expected >= 1
    common = {"model": without_dropout(tiny_model()), "train_dataset": tiny_data[:64]}
    eager = trained(train, pulse=CONFIG, **common)
    assert counters["stats"]["unique_graphs"] == 0
    names = trainer.aees.get_logs()["selected_combined_names"]
    assert len(set(names)) > 3
    assert names == eager.aees.get_logs()["selected_combined_names"]
    assert torch.allclose(flat(trainer.model), flat(eager.model), atol=1e-4)


def test_gradient_checkpointing_runs_the_same_arms_to_the_same_parameters(train: Make) -> None:
    plain = train(pulse=CONFIG)
    kwargs = {"use_reentrant": False}
    trainer = train(pulse=CONFIG, gradient_checkpointing=True, gradient_checkpointing_kwargs=kwargs)
    assert trainer.model.is_gradient_checkpointing
    assert not plain.model.is_gradient_checkpointing
    assert trainer.aees.get_logs() == plain.aees.get_logs()
    assert torch.equal(flat(trainer.model), flat(plain.model))


def test_a_compiled_optimizer_with_a_tensor_lr_is_not_compiled_again_for_an_arm() -> None:
    torch._dynamo.reset()
    counters.clear()
    graphs: list[int] = []
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.01), foreach=False)
    optimizer.step = torch.compile(optimizer.step, backend="eager")  # type: ignore[method-assign]
    aees = AEES(optimizer, lr_candidates=[0.5, 1.0, 2.0], episode_length=2, seed=0)
    rows = torch.randn(16, 8)
    for step in range(24):
        take_step(aees, step, lambda: (model(rows).squeeze(1) - rows.sum(1)).square().mean())
        graphs.append(counters["stats"]["unique_graphs"])
    aees.finalize()
    assert len(set(aees.get_logs()["selected_lr_values"])) == 3
    assert graphs[0] >= 1
    assert graphs[-1] == graphs[3], f"compiled again: {graphs}"
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.01)
