"""FSDP2: parameters and gradients are DTensors, each rank holds a shard."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import Trainer

from pulseopt_hf import AEES, PulseOptConfig, PulseOptTrainer
from pulseopt_hf.optim import GradientNoise
from tests.engines.ranks import run_ranks
from tests.engines.trainers import Fp16PulseTrainer

CONFIG: dict[str, Any] = {
    "lr_candidates": [0.5, 1.0, 2.0],
    "noise_candidates": [0.0, 1e-3],
    "episode_length": 3,
}


def check_engine(trainer: Any) -> int:
    """Return the world size, after checking that FSDP2 is really on."""
    assert trainer.accelerator.is_fsdp2
    assert all(isinstance(p, DTensor) for p in trainer.model_wrapped.parameters())
    assert trainer.args.world_size == dist.get_world_size()
    return int(trainer.args.world_size)


def whole(model: Any) -> torch.Tensor:
    """Every parameter, gathered; all ranks take part."""
    return torch.cat([p.detach().full_tensor().reshape(-1) for p in model.parameters()])


@pytest.mark.parametrize(("world_size", "bf16"), [(2, False), (2, True), (4, False)])
def test_arms_agree_under_fsdp2(
    world_size: int,
    bf16: bool,
    tiny_model: Callable[[], Any],
    tiny_data: Any,
    arguments: Callable[..., Any],
    fsdp2_on_cpu: dict[str, Any],
) -> None:
    def body(rank: int) -> Any:
        trainer = PulseOptTrainer(
            tiny_model(),
            arguments(bf16=bf16, **fsdp2_on_cpu),
            train_dataset=tiny_data,
            pulse=PulseOptConfig(**CONFIG),
        )
        trainer.train()
        assert trainer.accelerator.mixed_precision == ("bf16" if bf16 else "no")
        assert trainer.aees is not None
        return check_engine(trainer), trainer.aees.get_logs(), whole(trainer.model_wrapped)

    results = run_ranks(world_size, body)
    assert [result[0] for result in results] == [world_size] * world_size
    logs = results[0][1]
    assert len(logs["episode_rewards"]) == 8
    assert len(set(logs["selected_lr_values"])) == 3
    assert logs["episode_end_losses"][-1] < logs["episode_start_losses"][0]
    for _, other_logs, other_parameters in results[1:]:
        assert other_logs == logs
        assert torch.equal(other_parameters, results[0][2])


def test_a_constant_multiplier_under_fsdp2_equals_the_same_learning_rate_bit_for_bit(
    tiny_model: Callable[[], Any],
    tiny_data: Any,
    arguments: Callable[..., Any],
    fsdp2_on_cpu: dict[str, Any],
) -> None:
    def body(rank: int, cls: Any, learning_rate: float, **extra: Any) -> Any:
        settings = arguments(learning_rate=learning_rate, **fsdp2_on_cpu)
        trainer = cls(tiny_model(), settings, train_dataset=tiny_data, **extra)
        trainer.train()
        check_engine(trainer)
        return whole(trainer.model_wrapped)

    config = PulseOptConfig(lr_candidates=[2.0], episode_length=4)
    ours = run_ranks(2, lambda rank: body(rank, PulseOptTrainer, 2e-3, pulse=config))
    plain = run_ranks(2, lambda rank: body(rank, Trainer, 4e-3))
    assert torch.equal(ours[0], plain[0])


def test_a_loss_that_is_nan_on_one_rank_skips_the_step_on_all_under_fsdp2(
    tiny_model: Callable[[], Any],
    tiny_data: Any,
    arguments: Callable[..., Any],
    fsdp2_on_cpu: dict[str, Any],
) -> None:
    class Bad(PulseOptTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            bad = self.state.global_step in (3, 9) and self.args.process_index == 1
            return loss * float("nan") if bad else loss

    def body(rank: int) -> Any:
        trainer = Bad(
            tiny_model(),
            arguments(**fsdp2_on_cpu),
            train_dataset=tiny_data,
            pulse=PulseOptConfig(**CONFIG),
        )
        trainer.train()
        parameters = whole(trainer.model_wrapped)
        assert bool(torch.isfinite(parameters).all())
        assert trainer.aees is not None
        return check_engine(trainer), trainer.aees.skipped_steps, trainer.aees.get_logs()

    first, second = run_ranks(2, body)
    assert first == second
    assert first[:2] == (2, 2)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_an_overflow_on_one_rank_skips_the_step_on_all_under_fsdp2_with_a_scaler(
    optim: str,
    tiny_model: Callable[[], Any],
    tiny_data: Any,
    arguments: Callable[..., Any],
    fsdp2_on_cpu: dict[str, Any],
) -> None:
    class Bad(Fp16PulseTrainer):
        init_scale = 2.0**8

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            bad = self.state.global_step in (3, 6) and self.args.process_index == 0
            return loss * float("inf") if bad else loss

    def body(rank: int) -> Any:
        settings = arguments(
            fp16=True, optim=optim, per_device_train_batch_size=1, max_steps=12, **fsdp2_on_cpu
        )
        config = PulseOptConfig(lr_candidates=[0.5, 2.0], episode_length=2)
        trainer = Bad(tiny_model(), settings, train_dataset=tiny_data, pulse=config)
        trainer.train()
        assert trainer.optimizer.scaler.is_enabled()
        assert trainer.accelerator.mixed_precision == "fp16"
        parameters = whole(trainer.model_wrapped)
        assert bool(torch.isfinite(parameters).all())
        assert trainer.aees is not None
        aees = trainer.aees
        return check_engine(trainer), aees.skipped_steps, aees.optimizer_steps, aees.get_logs()

    first, second = run_ranks(2, body)
    assert first == second
    assert first[:3] == (2, 2, 10)


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
        return aees.get_logs(), whole(model)

    first, second = run_ranks(2, body)
    assert first[0] == second[0]
    assert len(first[0]["episode_rewards"]) == 10
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize(
    "state_dict_type",
    [pytest.param("FULL_STATE_DICT", marks=pytest.mark.slow), "SHARDED_STATE_DICT"],
)
def test_a_resumed_fsdp2_run_equals_one_that_never_stopped(
    state_dict_type: str,
    tmp_path: Path,
    tiny_model: Callable[[], Any],
    tiny_data: Any,
    arguments: Callable[..., Any],
    fsdp2_on_cpu: dict[str, Any],
) -> None:
    engine = dict(fsdp2_on_cpu)
    engine["fsdp_config"] = {**engine["fsdp_config"], "state_dict_type": state_dict_type}

    def body(rank: int, checkpoint: str | None) -> Any:
        settings = arguments(
            output_dir=str(tmp_path / "run"), save_strategy="steps", save_steps=10, **engine
        )
        trainer = PulseOptTrainer(
            tiny_model(), settings, train_dataset=tiny_data, pulse=PulseOptConfig(**CONFIG)
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        assert trainer.aees is not None
        return check_engine(trainer), trainer.aees.get_logs(), whole(trainer.model_wrapped)

    straight = run_ranks(2, lambda rank: body(rank, None))
    # Step 10 is amid an episode of 3.
    resumed = run_ranks(2, lambda rank: body(rank, str(tmp_path / "run" / "checkpoint-10")))
    assert straight[0][0] == resumed[0][0] == 2
    assert resumed[0][1] == resumed[1][1] == straight[0][1]
    assert torch.equal(resumed[0][2], straight[0][2])


@pytest.mark.parametrize(("before", "after"), [(2, 4), pytest.param(4, 2, marks=pytest.mark.slow)])
def test_a_checkpoint_resumes_at_another_world_size(
    before: int,
    after: int,
    tmp_path: Path,
    tiny_model: Callable[[], Any],
    tiny_data: Any,
    arguments: Callable[..., Any],
    fsdp2_on_cpu: dict[str, Any],
) -> None:
    def body(rank: int, checkpoint: str | None, batch: int) -> Any:
        settings = arguments(
            output_dir=str(tmp_path / "run"),
            save_strategy="steps",
            save_steps=10,
            per_device_train_batch_size=batch,
            **fsdp2_on_cpu,
        )
        trainer = PulseOptTrainer(
            tiny_model(), settings, train_dataset=tiny_data, pulse=PulseOptConfig(**CONFIG)
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        assert trainer.aees is not None
        return check_engine(trainer), trainer.aees.get_logs()

    straight = run_ranks(before, lambda rank: body(rank, None, 8 // before))
    folder = str(tmp_path / "run" / "checkpoint-10")
    resumed = run_ranks(after, lambda rank: body(rank, folder, 8 // after))
    assert straight[0][0] == before
    logs, earlier = resumed[0][1], straight[0][1]
    for world_size, other in resumed:
        assert world_size == after
        assert other == logs
    # The three episodes closed before are carried over, and the one that was open goes on.
    for key in ("selected_combined_names", "episode_rewards", "episode_start_losses"):
        assert logs[key][:3] == earlier[key][:3]
    assert logs["selected_combined_names"][3] == earlier["selected_combined_names"][3]
    assert logs["episode_start_losses"][3] == earlier["episode_start_losses"][3]
    assert logs["episode_start_steps"] == earlier["episode_start_steps"]
