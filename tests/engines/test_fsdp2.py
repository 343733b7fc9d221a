"""Plain `fully_shard`: noise in DTensors, of which each rank holds a shard, and a whole loop."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from pulseopt_hf import AEES
from pulseopt_hf.optim import GradientNoise
from tests.engines.ranks import run_ranks


def test_noise_differs_between_shards_and_is_right_over_the_whole_tensor() -> None:
    level, rows = 0.1, 400

    def body(rank: int) -> Any:
        dist.init_process_group("gloo")
        model = torch.nn.Linear(300, rows, bias=False)
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        weight = model.weight
        assert isinstance(weight, DTensor)
        weight.grad = torch.zeros_like(weight)
        GradientNoise(seed=7, mode="absolute").add([weight], level, step=5)
        return weight.grad.to_local(), weight.grad.full_tensor()  # type: ignore[attr-defined]

    results = run_ranks(4, body)
    shards = [local for local, _ in results]
    noise = results[0][1]
    assert noise.shape == (rows, 300)
    assert torch.equal(torch.cat(shards), noise)
    count = noise.numel()
    assert abs(noise.mean()) < 4 * level / math.sqrt(count)
    assert noise.std() == pytest.approx(level, rel=4 / math.sqrt(2 * count))
    kurtosis = (noise / level).pow(4).mean()
    assert kurtosis == pytest.approx(3.0, abs=4 * math.sqrt(96 / count))
    for one in range(4):
        for other in range(one):
            together = torch.corrcoef(torch.stack([shards[one].ravel(), shards[other].ravel()]))
            assert abs(together[0, 1]) < 4 / math.sqrt(count / 4)


def test_a_replicated_dimension_of_the_mesh_gets_the_same_noise() -> None:
    def body(rank: int) -> Any:
        dist.init_process_group("gloo")
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        model = torch.nn.Linear(30, 40, bias=False)
        fully_shard(model, mesh=mesh)
        model.weight.grad = torch.zeros_like(model.weight)
        GradientNoise(seed=7, mode="absolute").add([model.weight], 1.0, step=5)
        return mesh.get_coordinate(), model.weight.grad.to_local()  # type: ignore[attr-defined]

    by_place = {tuple(place): noise for place, noise in run_ranks(4, body)}
    assert torch.equal(by_place[0, 0], by_place[1, 0])
    assert torch.equal(by_place[0, 1], by_place[1, 1])
    assert not torch.equal(by_place[0, 0], by_place[0, 1])


def test_a_hand_written_loop_round_fully_shard_runs_the_same_arms_on_all_ranks() -> None:
    def body(rank: int) -> Any:
        dist.init_process_group("gloo")
        torch.manual_seed(0)
        model = torch.nn.Linear(16, 1)
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        assert isinstance(model.weight, DTensor)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        aees = AEES(
            optimizer,
            lr_candidates=[0.5, 1.0, 2.0],
            noise_candidates=[0.0, 0.01],
            episode_length=3,
            noise_mode="relative",
        )
        generator = torch.Generator().manual_seed(rank)
        for step in range(30):
            aees.step_start(step)
            optimizer.zero_grad()
            batch = torch.randn(8, 16, generator=generator)
            loss = (model(batch).squeeze(1) - batch.sum(1)).square().mean()
            loss.backward()
            aees.step_end(loss)
        aees.finalize()
        parameters = [p.detach().full_tensor().reshape(-1) for p in model.parameters()]  # type: ignore[attr-defined]
        return aees.get_logs(), torch.cat(parameters)

    first, second = run_ranks(2, body)
    assert first[0] == second[0]
    assert len(first[0]["episode_rewards"]) == 10
    assert torch.equal(first[1], second[1])
