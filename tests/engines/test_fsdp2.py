"""Plain `fully_shard`: noise in DTensors, of which each rank holds a shard, and a whole loop."""

import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from pulseopt_hf import AEES
from pulseopt_hf.optim import GradientNoise
from tests.conftest import ARMS, take_step
from tests.engines.ranks import run_ranks
from tests.optim.noise_reference import assert_right_in_distribution


def noise_on(mesh: tuple[int, ...], level: float) -> Any:
    """Return noise, as a rank has it, on the last dimension of a mesh; the others replicate it."""
    dist.init_process_group("gloo")
    names = ("replicate", "shard")[-len(mesh) :]
    model = torch.nn.Linear(300, 400, bias=False)
    fully_shard(model, mesh=init_device_mesh("cpu", mesh, mesh_dim_names=names))
    assert isinstance(model.weight, DTensor)
    model.weight.grad = torch.zeros_like(model.weight)
    GradientNoise(seed=7, mode="absolute").add([model.weight], level, step=5)
    return model.weight.grad


def test_noise_differs_between_shards_and_is_right_over_the_whole_tensor() -> None:
    level = 0.1

    def body(rank: int) -> Any:
        noise = noise_on((4,), level)
        return noise.to_local(), noise.full_tensor()

    results = run_ranks(4, body)
    shards = [local for local, _ in results]
    noise = results[0][1]
    assert noise.shape == (400, 300)
    assert torch.equal(torch.cat(shards), noise)
    count = noise.numel()
    assert_right_in_distribution(noise, level)
    kurtosis = (noise / level).pow(4).mean()
    assert kurtosis == pytest.approx(3.0, abs=4 * math.sqrt(96 / count))
    for one in range(4):
        for other in range(one):
            together = torch.corrcoef(torch.stack([shards[one].ravel(), shards[other].ravel()]))
            assert abs(together[0, 1]) < 4 / math.sqrt(count / 4)


def test_a_replicated_dimension_of_the_mesh_gets_the_same_noise() -> None:
    def body(rank: int) -> Any:
        noise = noise_on((2, 2), 1.0)
        return noise.device_mesh.get_coordinate(), noise.to_local()

    by_place = {tuple(place): noise for place, noise in run_ranks(4, body)}
    assert torch.equal(by_place[0, 0], by_place[1, 0])
    assert torch.equal(by_place[0, 1], by_place[1, 1])
    assert not torch.equal(by_place[0, 0], by_place[0, 1])


def loss_of(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return (model(batch).squeeze(1) - batch.sum(1)).square().mean()


def test_a_hand_written_loop_round_fully_shard_runs_the_same_arms_on_all_ranks() -> None:
    def body(rank: int) -> Any:
        dist.init_process_group("gloo")
        torch.manual_seed(0)
        model = torch.nn.Linear(16, 1)
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        assert isinstance(model.weight, DTensor)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        aees = AEES(optimizer, episode_length=3, noise_mode="relative", **ARMS)
        generator = torch.Generator().manual_seed(rank)
        for step in range(30):
            batch = torch.randn(8, 16, generator=generator)
            take_step(aees, step, partial(loss_of, model, batch))
        aees.finalize()
        parameters = [p.detach().full_tensor().reshape(-1) for p in model.parameters()]  # type: ignore[attr-defined]
        return aees.get_logs(), torch.cat(parameters)

    first, second = run_ranks(2, body)
    assert first[0] == second[0]
    assert len(first[0]["episode_rewards"]) == 10
    assert torch.equal(first[1], second[1])
