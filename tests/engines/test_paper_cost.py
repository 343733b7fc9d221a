"""What an episode costs: in a run, and simulated for 1,024 ranks and 70 billion parameters."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pulseopt_hf import AEES
from pulseopt_hf.optim.noise import CPU_CHUNK
from tests.conftest import Make
from tests.engines.ranks import note_collectives, run_ranks

EPISODE_LENGTH = 100


class Idle(torch.optim.Optimizer):
    """Updates nothing, so that every tensor made in a step is the controller's."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})

    def step(self, closure: Any = None) -> None:
        pass


class Allocations(TorchDispatchMode):
    """Counts the bytes of storage that operators make in this thread, the only one of tests."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {
            leaf.untyped_storage()._cdata
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, torch.Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in given:
                self.bytes += leaf.untyped_storage().nbytes()
        return result


def memory_of_an_episode(parameter: torch.nn.Parameter, noise: float) -> int:
    """Return the bytes that the second of three episodes allocates."""
    arms: dict[str, Any] = {"lr_candidates": [0.5, 2.0], "noise_candidates": [noise]}
    aees = AEES(Idle([parameter]), episode_length=EPISODE_LENGTH, seed=0, **arms)
    counted = 0
    for step in range(3 * EPISODE_LENGTH):
        loss = torch.tensor(1.0)
        with Allocations() as allocations:
            aees.step_start(step)
            aees.step_end(loss)
        if EPISODE_LENGTH <= step < 2 * EPISODE_LENGTH:
            counted += allocations.bytes
    return counted


def test_memory_does_not_grow_with_the_model() -> None:
    with_noise = []
    for elements in (2 * CPU_CHUNK, 8 * CPU_CHUNK):
        parameter = torch.nn.Parameter(torch.zeros(elements))
        parameter.grad = torch.zeros(elements)
        with_noise.append(memory_of_an_episode(parameter, noise=0.1))
    assert 0 < with_noise[0] == with_noise[1]

    bare = []
    for elements in (10_000, 70_000_000_000):
        parameter = torch.nn.Parameter(torch.empty(elements, device="meta"))
        bare.append(memory_of_an_episode(parameter, noise=0.0))
    assert bare[0] == bare[1]
    # A copy of each loss on the way in, and one read out: nothing like a model's 280 GB.
    assert 4 * EPISODE_LENGTH <= bare[0] <= 32 * EPISODE_LENGTH


@pytest.mark.parametrize(
    ("world_size", "elements"), [(2, 10_000), (1024, 10_000), (1024, 70_000_000_000)]
)
def test_what_an_episode_sends_depends_neither_on_the_model_nor_on_the_number_of_ranks(
    world_size: int, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a group that is torch's own fake one, which carries nothing and is of any size."""
    sent = note_collectives(monkeypatch)

    def body(_: int) -> list[tuple[str, int]]:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
        assert dist.get_world_size() == world_size
        parameter = torch.nn.Parameter(torch.empty(elements, device="meta"))
        # Losses on the host and parameters on `meta`, whose values nobody can send.
        aees = AEES(Idle([parameter]), lr_candidates=[0.5, 2.0], episode_length=EPISODE_LENGTH)
        aees._agreement._parameter_device = torch.device("cpu")
        for step in range(EPISODE_LENGTH):
            aees.step_start(step)
            aees.step_end(torch.tensor(1.0))
        return sent

    assert run_ranks(1, body) == [[("broadcast", 24), ("all_reduce", 4 * EPISODE_LENGTH)]]


def test_a_whole_run_costs_one_broadcast_and_one_all_reduce_of_a_few_bytes_per_episode(
    on_ranks: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    episode_length, steps = 6, 24
    sent = note_collectives(monkeypatch)

    def messages(cls: Any, pulse: Any = None) -> list[tuple[str, int]]:
        ends = on_ranks("ddp", cls, pulse, max_steps=steps, look=lambda _: list(sent))
        return ends[0].seen[-1]

    arms = {"lr_candidates": [0.5, 2.0], "episode_length": episode_length}
    plain, ours = messages("stock"), messages("subclass", arms)
    for message in plain:
        ours.remove(message)
    of_an_episode = [("broadcast", 3 * 8), ("all_reduce", 4 * episode_length)]
    assert sorted(ours) == sorted(of_an_episode * (steps // episode_length))
