"""DeepSpeed: the real engine on CPU ranks, which steps inside `training_step`."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import Trainer

from pulseopt_hf import AEES, PulseOptCallback, PulseOptConfig, PulseOptTrainer
from tests.engines.ranks import run_ranks

pytest.importorskip("deepspeed", reason="install the extra `deepspeed` to run these")

CONFIG: dict[str, Any] = {
    "lr_candidates": [0.5, 1.0, 2.0],
    "noise_candidates": [0.0, 1e-3],
    "episode_length": 3,
}
SLOW = pytest.mark.slow


def engine(stage: int, **overrides: Any) -> dict[str, Any]:
    """Return a DeepSpeed config."""
    zero: dict[str, Any] = {"stage": stage, **overrides.pop("zero", {})}
    if stage == 3:
        # Small enough that the parameters of the tiny model make several sub-groups.
        zero.setdefault("sub_group_size", 10_000)
    return {
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": "auto",
        "train_batch_size": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **overrides,
    }


def check_engine(trainer: Any, stage: int) -> None:
    """Check that DeepSpeed is really on, at this stage, over more than one rank."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    wrapped = trainer.model_wrapped
    assert isinstance(wrapped, DeepSpeedEngine)
    assert wrapped.zero_optimization_stage() == stage
    assert trainer.args.world_size == dist.get_world_size() == 2


def whole(trainer: Any) -> torch.Tensor:
    """Every parameter, gathered; all ranks take part."""
    import deepspeed

    parameters = list(trainer.model.parameters())
    with deepspeed.zero.GatheredParameters(parameters):
        return torch.cat([p.detach().reshape(-1).float().clone() for p in parameters])


def train(
    cls: Any, model: Any, settings: Any, data: Any, stage: int, **extra: Any
) -> tuple[Any, torch.Tensor]:
    trainer = cls(model, settings, train_dataset=data, **extra)
    trainer.train()
    check_engine(trainer, stage)
    return trainer, whole(trainer)


VARIANTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "optimizer offload": {"zero": {"offload_optimizer": {"device": "cpu"}}},
    "scheduler of the config": {
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {
                "warmup_num_steps": "auto",
                "total_num_steps": "auto",
                "warmup_max_lr": "auto",
            },
        }
    },
    "accumulation": {},
    "bf16": {"bf16": {"enabled": True}},
}


@pytest.mark.parametrize(
    ("stage", "variant"),
    [
        pytest.param(stage, variant, marks=() if (stage, variant) in ordinary else SLOW)
        for ordinary in [{(2, "scheduler of the config"), (3, "as it is")}]
        for stage in (0, 1, 2, 3)
        for variant in VARIANTS
        if not (stage == 0 and variant == "optimizer offload")
    ],
)
def test_a_constant_multiplier_equals_the_same_learning_rate_bit_for_bit(
    stage: int,
    variant: str,
    tiny_model: Callable[[], Any],
    tiny_data: Any,
    arguments: Callable[..., Any],
) -> None:
    def body(rank: int, cls: Any, learning_rate: float, **extra: Any) -> Any:
        settings = arguments(
            learning_rate=learning_rate,
            gradient_accumulation_steps=3 if variant == "accumulation" else 1,
            bf16=variant == "bf16",
            max_steps=12,
            deepspeed=engine(stage, **VARIANTS[variant]),
        )
        trainer, parameters = train(cls, tiny_model(), settings, tiny_data, stage, **extra)
        lrs = [e["learning_rate"] for e in trainer.state.log_history if "learning_rate" in e]
        counted = trainer.aees.optimizer_steps if extra else None
        return parameters, lrs, counted

    config = PulseOptConfig(lr_candidates=[2.0], episode_length=4)
    ours = run_ranks(2, lambda rank: body(rank, PulseOptTrainer, 2e-3, pulse=config))[0]
    plain = run_ranks(2, lambda rank: body(rank, Trainer, 4e-3))[0]
    unscaled = run_ranks(2, lambda rank: body(rank, Trainer, 2e-3))[0]
    assert torch.equal(ours[0], plain[0])
    assert not torch.equal(ours[0], unscaled[0])
    # The scheduler only ever sees the base LR.
    assert ours[1] == unscaled[1]
    assert len(set(ours[1])) > 6
    assert ours[2] == 12


@pytest.mark.parametrize("stage", [pytest.param(1, marks=SLOW), 2, pytest.param(3, marks=SLOW)])
def test_arms_and_parameters_agree_with_a_run_under_ddp(
    stage: int, tiny_model: Callable[[], Any], tiny_data: Any, arguments: Callable[..., Any]
) -> None:
    config = PulseOptConfig(lr_candidates=[0.5, 1.0, 2.0], episode_length=3)

    def under_deepspeed(rank: int) -> Any:
        settings = arguments(deepspeed=engine(stage))
        trainer, parameters = train(
            PulseOptTrainer, tiny_model(), settings, tiny_data, stage, pulse=config
        )
        return trainer.aees.get_logs(), parameters

    def under_ddp(rank: int) -> Any:
        trainer = PulseOptTrainer(tiny_model(), arguments(), train_dataset=tiny_data, pulse=config)
        trainer.train()
        assert trainer.aees is not None
        parameters = [p.detach().reshape(-1) for p in trainer.model.parameters()]
        return trainer.aees.get_logs(), torch.cat(parameters)

    first, second = run_ranks(2, under_deepspeed)
    expected = run_ranks(2, under_ddp)[0]
    assert first[0] == second[0]
    assert torch.equal(first[1], second[1])
    names = "selected_combined_names"
    assert first[0][names] == expected[0][names]
    assert len(first[0][names]) == 8
    assert first[0]["episode_end_losses"] == pytest.approx(
        expected[0]["episode_end_losses"], abs=1e-3
    )
    assert torch.allclose(first[1], expected[1], atol=2e-3)


@pytest.mark.parametrize(
    ("stage", "offload"),
    [
        (2, False),
        (3, False),
        pytest.param(0, False, marks=SLOW),
        pytest.param(1, False, marks=SLOW),
        pytest.param(2, True, marks=SLOW),
        pytest.param(3, True, marks=SLOW),
    ],
)
def test_noise_reaches_the_update_differs_between_parts_and_has_the_right_size(
    stage: int,
    offload: bool,
    tiny_model: Callable[[], Any],
    tiny_data: Any,
    arguments: Callable[..., Any],
) -> None:
    """With SGD an update is the learning rate times the gradient, so the noise can be read off."""
    level, learning_rate = 0.1, 0.5

    class PlainSgd:
        def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=learning_rate)  # type: ignore[attr-defined]
            return self.optimizer

    class Ours(PlainSgd, PulseOptTrainer):
        pass

    zero = {"offload_optimizer": {"device": "cpu"}} if offload else {}

    def body(rank: int, noise: float) -> Any:
        settings = arguments(
            learning_rate=learning_rate,
            max_steps=1,
            lr_scheduler_type="constant",
            deepspeed=engine(stage, zero=zero),
        )
        config = PulseOptConfig(lr_candidates=[1.0], noise_candidates=[noise], episode_length=1)
        _, parameters = train(Ours, tiny_model(), settings, tiny_data, stage, pulse=config)
        return parameters

    clean = run_ranks(2, lambda rank: body(rank, 0.0))
    noisy = run_ranks(2, lambda rank: body(rank, level))
    assert torch.equal(noisy[0], noisy[1])
    noise = (clean[0] - noisy[0]) / learning_rate / level
    count = noise.numel()
    assert count > 25_000
    assert abs(noise.mean()) < 4 / math.sqrt(count)
    assert noise.std() == pytest.approx(1.0, rel=4 / math.sqrt(2 * count))
    # No value comes twice: not from another rank's part, not from another sub-group.
    assert len(set(noise.mul(1e4).round().tolist())) > 0.2 * count
    for offset in range(1, count, 97):
        shifted = torch.corrcoef(torch.stack([noise, noise.roll(offset)]))[0, 1]
        assert abs(shifted) < 6 / math.sqrt(count)


@pytest.mark.parametrize(
    ("stage", "bf16", "scheduler"),
    [
        pytest.param(
            stage,
            bf16,
            scheduler,
            marks=() if (stage, bf16, scheduler) in ordinary else SLOW,
        )
        for ordinary in [{(2, False, True), (3, False, False)}]
        for stage in (0, 1, 2, 3)
        for bf16 in (False, True)
        for scheduler in (False, True)
        if not (stage == 0 and bf16)
    ],
)
def test_a_loss_that_is_nan_on_one_rank_skips_the_step_on_all(
    stage: int,
    bf16: bool,
    scheduler: bool,
    tiny_model: Callable[[], Any],
    tiny_data: Any,
    arguments: Callable[..., Any],
) -> None:
    class Bad(PulseOptTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            bad = self.state.global_step in (3, 7) and self.args.process_index == 1
            return loss * float("nan") if bad else loss

    extra = dict(VARIANTS["scheduler of the config"]) if scheduler else {}
    if bf16:
        # DeepSpeed then looks for no overflow itself, and would train on NaN.
        extra["bf16"] = {"enabled": True, "check_grad_overflow": False}

    def body(rank: int) -> Any:
        settings = arguments(max_steps=14, bf16=bf16, deepspeed=engine(stage, **extra))
        config = PulseOptConfig(lr_candidates=[0.5, 2.0], episode_length=3)
        trainer, parameters = train(Bad, tiny_model(), settings, tiny_data, stage, pulse=config)
        assert bool(torch.isfinite(parameters).all())
        assert trainer.aees is not None
        lrs = [e["learning_rate"] for e in trainer.state.log_history if "learning_rate" in e]
        return (
            trainer.aees.skipped_steps,
            trainer.aees.optimizer_steps,
            trainer.aees.get_logs(),
            parameters,
            len(set(lrs)),
        )

    first, second = run_ranks(2, body)
    assert first[:3] == second[:3]
    assert torch.equal(first[3], second[3])
    assert first[:2] == (2, 12)
    assert first[4] <= 13, "the scheduler advanced over skipped steps"


@pytest.mark.parametrize("stage", [2, pytest.param(1, marks=SLOW), pytest.param(3, marks=SLOW)])
def test_a_resumed_run_equals_one_that_never_stopped(
    stage: int,
    tmp_path: Path,
    tiny_model: Callable[[], Any],
    tiny_data: Any,
    arguments: Callable[..., Any],
) -> None:
    def body(rank: int, checkpoint: str | None) -> Any:
        settings = arguments(
            output_dir=str(tmp_path / "run"),
            max_steps=18,
            save_strategy="steps",
            save_steps=10,
            deepspeed=engine(stage),
        )
        trainer = PulseOptTrainer(
            tiny_model(), settings, train_dataset=tiny_data, pulse=PulseOptConfig(**CONFIG)
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        check_engine(trainer, stage)
        assert trainer.aees is not None
        return trainer.aees.get_logs(), whole(trainer)

    straight = run_ranks(2, lambda rank: body(rank, None))[0]
    resumed = run_ranks(2, lambda rank: body(rank, str(tmp_path / "run" / "checkpoint-10")))[0]
    assert straight[0] == resumed[0]
    assert torch.equal(straight[1], resumed[1])


def test_a_neutral_run_equals_a_plain_trainer_bit_for_bit_and_so_does_the_callback(
    tiny_model: Callable[[], Any], tiny_data: Any, arguments: Callable[..., Any]
) -> None:
    neutral = PulseOptConfig(lr_candidates=[1.0], episode_length=4)

    class Called(Trainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            PulseOptCallback(neutral).attach(self)

    def body(rank: int, cls: Any, **extra: Any) -> Any:
        settings = arguments(max_steps=8, deepspeed=engine(2))
        return train(cls, tiny_model(), settings, tiny_data, 2, **extra)[1]

    plain = run_ranks(2, lambda rank: body(rank, Trainer))[0]
    assert torch.equal(
        plain, run_ranks(2, lambda rank: body(rank, PulseOptTrainer, pulse=neutral))[0]
    )
    assert torch.equal(plain, run_ranks(2, lambda rank: body(rank, Called))[0])


def test_a_genuine_fp16_overflow_skips_the_step(
    tiny_model: Callable[[], Any],
    tiny_data: Any,
    arguments: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)
    monkeypatch.setattr(
        get_accelerator(), "supported_dtypes", lambda: [torch.float, torch.half, torch.bfloat16]
    )

    def body(rank: int) -> Any:
        fp16 = {"enabled": True, "initial_scale_power": 22, "hysteresis": 1}
        settings = arguments(
            per_device_train_batch_size=1, max_steps=12, fp16=True, deepspeed=engine(2, fp16=fp16)
        )
        config = PulseOptConfig(lr_candidates=[0.5, 2.0], episode_length=2, nonfinite="raise")
        trainer, parameters = train(
            PulseOptTrainer, tiny_model(), settings, tiny_data, 2, pulse=config
        )
        assert trainer.model_wrapped.fp16_enabled()
        assert trainer.aees.skipped_steps == trainer.model_wrapped.skipped_steps
        return trainer.aees.skipped_steps, trainer.aees.optimizer_steps, parameters

    first, second = run_ranks(2, body)
    assert first[:2] == second[:2]
    assert torch.equal(first[2], second[2])
    assert 0 < first[0] < 12
    assert first[0] + first[1] == 12


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a ratio of offload": (
        {"zero": {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
        r"offload_optimizer\.ratio` must be 1, got 0\.5",
    ),
    "super offload": (
        {"zero": {"offload_optimizer": {"device": "cpu", "super_offload": True}}},
        "super_offload` to false",
    ),
    "MiCS": ({"zero": {"mics_shard_size": 2}}, "mics_shard_size` must be unset, got 2"),
    "zenflow": ({"zero": {"zenflow": {"topk_ratio": 0.1}}}, r"Remove `zero_optimization\.zenflow"),
    "tensor parallelism": ({"tensor_parallel": {"autotp_size": 2}}, "autotp_size` must be at most"),
    "1-bit Adam": (
        {"optimizer": {"type": "OneBitAdam", "params": {}}},
        "Choose an optimizer such as `AdamW`",
    ),
}


@pytest.mark.parametrize("setting", REFUSED)
def test_what_an_arm_would_not_reach_is_refused_with_what_to_write(setting: str) -> None:
    from pulseopt_hf.trainer.deepspeed import check_settings

    overrides, message = REFUSED[setting]
    check_settings(engine(3))
    with pytest.raises(ValueError, match=message):
        check_settings(engine(3, **overrides))


def test_refusals_come_before_training(
    tiny_model: Callable[[], Any], tiny_data: Any, arguments: Callable[..., Any]
) -> None:
    def body(rank: int) -> None:
        zero = {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}
        settings = arguments(deepspeed=engine(3, zero=zero))
        with pytest.raises(ValueError, match=r"must be 1, got 0\.5"):
            PulseOptTrainer(tiny_model(), settings, train_dataset=tiny_data)
        for knobs, message in (
            ({"noise_candidates": [0.1], "noise_mode": "relative"}, "must be 'absolute'"),
            ({"log_update_norm": True}, "`log_update_norm` to False"),
            ({"divergence": "rollback"}, "`divergence` must be 'off' or 'cut'"),
        ):
            config = PulseOptConfig(episode_length=2, **knobs)
            settings = arguments(deepspeed=engine(2))
            trainer = PulseOptTrainer(tiny_model(), settings, train_dataset=tiny_data, pulse=config)
            with pytest.raises(ValueError, match=message):
                trainer.train()
            assert trainer.state.global_step == 0

    run_ranks(2, body)


def test_a_hand_written_loop_is_refused_and_told_what_to_use(
    tiny_model: Callable[[], Any], tiny_data: Any, arguments: Callable[..., Any]
) -> None:
    def body(rank: int) -> None:
        settings = arguments(max_steps=1, deepspeed=engine(2))
        trainer, _ = train(Trainer, tiny_model(), settings, tiny_data, 2)
        with pytest.raises(ValueError, match="Train with PulseOptTrainer"):
            AEES(trainer.optimizer)

    run_ranks(2, body)
