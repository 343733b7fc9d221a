"""DDP on forked ranks over gloo."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import Trainer, TrainerCallback

from pulseopt_hf import PulseOptCallback, PulseOptConfig, PulseOptTrainer
from tests.engines.ranks import Failure, ranks_with_failures, run_ranks

LR_AND_NOISE: dict[str, Any] = {
    "lr_candidates": [0.5, 1.0, 2.0],
    "noise_candidates": [0.0, 1e-3],
    "episode_length": 3,
}


class Fingerprints(TrainerCallback):
    """Keeps a copy of the parameters at the end of every episode."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.taken: list[torch.Tensor] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            self.taken.append(flat(kwargs["model"]))


def flat(model: Any) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1).clone() for p in model.parameters()])


def world(trainer: Trainer) -> int:
    """The world size, after checking that DDP really wraps the model."""
    assert trainer.args.world_size == dist.get_world_size()
    assert isinstance(trainer.model_wrapped, torch.nn.parallel.DistributedDataParallel)
    return trainer.args.world_size


@pytest.mark.parametrize(("world_size", "bf16"), [(2, False), (2, True), (4, False)])
def test_all_ranks_run_the_same_arms_and_have_equal_parameters_at_every_episode(
    world_size: int,
    bf16: bool,
    tiny_model: Callable[[], Any],
    tiny_data: Any,
    arguments: Callable[..., Any],
) -> None:
    def body(rank: int) -> Any:
        config = PulseOptConfig(**LR_AND_NOISE)
        settings = arguments(bf16=bf16)
        trainer = PulseOptTrainer(tiny_model(), settings, train_dataset=tiny_data, pulse=config)
        assert trainer.accelerator.mixed_precision == ("bf16" if bf16 else "no")
        fingerprints = Fingerprints(every=3)
        trainer.add_callback(fingerprints)
        trainer.train()
        assert trainer.aees is not None
        return world(trainer), trainer.aees.get_logs(), fingerprints.taken

    worlds, logs, taken = zip(*run_ranks(world_size, body), strict=True)
    assert set(worlds) == {world_size}
    assert len(logs[0]["selected_combined_names"]) == 8
    assert len(set(logs[0]["selected_combined_names"])) > 3
    for rank in range(1, world_size):
        assert logs[rank] == logs[0]
        assert len(taken[rank]) == 8
        assert all(torch.equal(a, b) for a, b in zip(taken[rank], taken[0], strict=True))


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_equal_one_process_with_the_same_global_batch(
    world_size: int, tiny_model: Callable[[], Any], tiny_data: Any, arguments: Callable[..., Any]
) -> None:
    config = PulseOptConfig(**LR_AND_NOISE)

    def model() -> Any:
        made = tiny_model()
        for module in made.modules():
            if isinstance(module, torch.nn.Dropout):  # its masks follow the batch of a process
                module.p = 0.0
        return made

    # 64 rows: the global batches hold the same rows in every split.
    data = tiny_data[:64]

    def body(rank: int) -> Any:
        settings = arguments(per_device_train_batch_size=8 // world_size)
        trainer = PulseOptTrainer(model(), settings, train_dataset=data, pulse=config)
        trainer.train()
        assert trainer.aees is not None
        return world(trainer), trainer.aees.get_logs(), flat(trainer.model)

    _, logs, parameters = run_ranks(world_size, body)[0]
    alone = PulseOptTrainer(
        model(), arguments(per_device_train_batch_size=8), train_dataset=data, pulse=config
    )
    alone.train()
    assert alone.aees is not None
    expected = alone.aees.get_logs()
    assert logs["selected_combined_names"] == expected["selected_combined_names"]
    for key in ("episode_start_losses", "episode_end_losses", "episode_rewards"):
        assert logs[key] == pytest.approx(expected[key], abs=1e-4)
    assert torch.allclose(parameters, flat(alone.model), atol=1e-4)
    assert not torch.allclose(parameters, flat(model()), atol=1e-2)


@pytest.mark.parametrize("rows", [70, 67, 9])
def test_unequal_last_batches_and_uneven_data_keep_ranks_together(
    rows: int, tiny_model: Callable[[], Any], tiny_data: Any, arguments: Callable[..., Any]
) -> None:
    def body(rank: int) -> Any:
        config = PulseOptConfig(lr_candidates=[0.5, 2.0], episode_length=2)
        settings = arguments(max_steps=-1, num_train_epochs=6, gradient_accumulation_steps=2)
        trainer = PulseOptTrainer(
            tiny_model(), settings, train_dataset=tiny_data[:rows], pulse=config
        )
        trainer.train()
        assert trainer.aees is not None
        assert trainer.aees.optimizer_steps == trainer.state.max_steps
        return world(trainer), trainer.aees.get_logs(), flat(trainer.model)

    first, second = run_ranks(2, body)
    assert first[0] == second[0] == 2
    assert first[1] == second[1]
    assert torch.equal(first[2], second[2])


def test_a_whole_run_costs_one_broadcast_and_one_all_reduce_of_a_few_bytes_per_episode(
    tiny_model: Callable[[], Any],
    tiny_data: Any,
    arguments: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    episode_length, steps = 6, 24

    def body(rank: int, trainer_class: Any, config: PulseOptConfig | None) -> Any:
        sent: list[tuple[str, int]] = []

        def counted(name: str) -> None:
            plain = getattr(dist, name)

            def counting(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
                sent.append((name, tensor.numel() * tensor.element_size()))
                return plain(tensor, *args, **kwargs)

            monkeypatch.setattr(dist, name, counting)

        for name in ("all_reduce", "broadcast", "all_gather_into_tensor", "reduce_scatter_tensor"):
            counted(name)
        extra = {} if config is None else {"pulse": config}
        trainer = trainer_class(
            tiny_model(), arguments(max_steps=steps), train_dataset=tiny_data, **extra
        )
        trainer.train()
        world(trainer)
        return sent

    config = PulseOptConfig(lr_candidates=[0.5, 2.0], episode_length=episode_length)
    plain = run_ranks(2, lambda rank: body(rank, Trainer, None))[0]
    ours = run_ranks(2, lambda rank: body(rank, PulseOptTrainer, config))[0]
    for message in plain:
        ours.remove(message)
    episodes = steps // episode_length
    all_reduces = [size for name, size in ours if name == "all_reduce"]
    broadcasts = [size for name, size in ours if name == "broadcast"]
    assert all_reduces == [4 * episode_length] * episodes
    assert broadcasts == [3 * 8] * episodes
    assert len(ours) == 2 * episodes


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_a_loss_that_is_not_finite_on_one_rank_skips_the_step_on_all(
    max_grad_norm: float,
    tiny_model: Callable[[], Any],
    tiny_data: Any,
    arguments: Callable[..., Any],
) -> None:
    def body(rank: int) -> Any:
        trainer = BadLoss(
            tiny_model(),
            arguments(max_grad_norm=max_grad_norm),
            train_dataset=tiny_data,
            pulse=PulseOptConfig(**LR_AND_NOISE),
        )
        trainer.bad = {4: float("nan"), 7: float("inf")} if rank == 1 else {}
        trainer.train()
        aees = trainer.aees
        assert aees is not None
        scheduler: Any = trainer.lr_scheduler
        return (
            world(trainer),
            aees.skipped_steps,
            aees.get_logs(),
            flat(trainer.model),
            [entry["pulse/skipped_steps"] for entry in trainer.state.log_history[:24]],
            scheduler.last_epoch,
        )

    first, second = run_ranks(2, body)
    assert first[:3] == second[:3]
    assert first[0] == 2
    assert first[1] == 2
    assert first[4] == [0] * 4 + [1] * 3 + [2] * 17
    assert torch.equal(first[3], second[3])
    assert bool(torch.isfinite(first[3]).all())
    assert first[5] == second[5] == 22
    # 22 steps that happened make 7 episodes of 3 and one that was cut short.
    assert len(first[2]["episode_rewards"]) == 8


class BadLoss(PulseOptTrainer):
    """Returns a loss that is not finite at chosen global steps."""

    bad: dict[int, float] = {}  # noqa: RUF012

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        value = self.bad.get(self.state.global_step)
        return loss if value is None else loss * value


def test_nonfinite_raise_ends_the_run_on_all_ranks_alike(
    tiny_model: Callable[[], Any], tiny_data: Any, arguments: Callable[..., Any]
) -> None:
    def body(rank: int) -> Any:
        config = PulseOptConfig(**LR_AND_NOISE, nonfinite="raise")
        trainer = BadLoss(tiny_model(), arguments(), train_dataset=tiny_data, pulse=config)
        trainer.bad = {4: float("nan")} if rank == 1 else {}
        with pytest.raises(ValueError, match="not finite at global step 4"):
            trainer.train()
        return world(trainer)

    assert run_ranks(2, body) == [2, 2]


def test_too_many_skips_end_the_run_on_all_ranks_and_say_how_many_and_where(
    tiny_model: Callable[[], Any], tiny_data: Any, arguments: Callable[..., Any]
) -> None:
    def body(rank: int) -> Any:
        config = PulseOptConfig(**LR_AND_NOISE, max_consecutive_skips=5)
        trainer = BadLoss(tiny_model(), arguments(), train_dataset=tiny_data, pulse=config)
        trainer.bad = dict.fromkeys(range(2, 24), float("nan")) if rank == 0 else {}
        with pytest.raises(RuntimeError, match=r"5 optimizer steps in a row .* global step 6"):
            trainer.train()
        return world(trainer)

    assert run_ranks(2, body) == [2, 2]


def test_a_rank_that_raises_brings_down_the_others_instead_of_leaving_them_waiting(
    tiny_model: Callable[[], Any], tiny_data: Any, arguments: Callable[..., Any]
) -> None:
    class Raises(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 5:
                raise KeyError("a rank's own trouble")

    def body(rank: int) -> Any:
        trainer = PulseOptTrainer(
            tiny_model(),
            arguments(),
            train_dataset=tiny_data,
            pulse=PulseOptConfig(**LR_AND_NOISE),
        )
        if rank == 1:
            trainer.add_callback(Raises())
        trainer.train()

    first, second = ranks_with_failures(2, body, timeout=30)
    assert isinstance(second, Failure)
    assert "a rank's own trouble" in second.error
    assert isinstance(first, Failure), "rank 0 went on alone"
    assert first.seconds < 20


def test_the_callback_runs_the_same_arms_as_the_trainer(
    tiny_model: Callable[[], Any], tiny_data: Any, arguments: Callable[..., Any]
) -> None:
    config = PulseOptConfig(**LR_AND_NOISE)

    def body(rank: int) -> Any:
        ours = PulseOptTrainer(tiny_model(), arguments(), train_dataset=tiny_data, pulse=config)
        ours.train()
        plain: Any = Trainer(tiny_model(), arguments(), train_dataset=tiny_data)
        PulseOptCallback(config).attach(plain)
        plain.train()
        assert world(plain) == 2
        assert ours.aees is not None
        return ours.aees.get_logs(), plain.aees.get_logs(), flat(ours.model), flat(plain.model)

    ours_logs, plain_logs, ours_parameters, plain_parameters = run_ranks(2, body)[0]
    assert ours_logs == plain_logs
    assert torch.equal(ours_parameters, plain_parameters)


def test_a_neutral_run_on_two_ranks_equals_a_plain_trainer_bit_for_bit(
    tiny_model: Callable[[], Any], tiny_data: Any, arguments: Callable[..., Any]
) -> None:
    def body(rank: int, trainer_class: Any, **extra: Any) -> Any:
        trainer = trainer_class(tiny_model(), arguments(), train_dataset=tiny_data, **extra)
        trainer.train()
        world(trainer)
        return flat(trainer.model)

    neutral = PulseOptConfig(lr_candidates=[1.0], episode_length=5)
    plain = run_ranks(2, lambda rank: body(rank, Trainer))
    ours = run_ranks(2, lambda rank: body(rank, PulseOptTrainer, pulse=neutral))
    assert torch.equal(plain[0], ours[0])
    assert torch.equal(plain[1], ours[1])
