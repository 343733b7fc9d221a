"""DeepSpeed: the real engine on CPU ranks, which steps inside `training_step`."""

import math
from typing import Any

import pytest
import torch
from transformers import Trainer

from pulseopt_hf import AEES, PulseOptTrainer
from tests.conftest import Make
from tests.engines.engine import VARIANTS, check_engine, deepspeed_config, slow
from tests.engines.ranks import run_ranks
from tests.engines.trainers import Sgd
from tests.optim.noise_reference import assert_right_in_distribution

pytest.importorskip("deepspeed", reason="install the extra `deepspeed` to run these")


@pytest.mark.parametrize(
    ("engine", "variant"),
    [
        *(("zero2", "as it is"), ("zero3", "as it is")),
        *(slow("zero0", "as it is"), slow("zero1", "as it is")),
        *(slow("zero2", "optimizer offload"), slow("zero3", "optimizer offload")),
    ],
)
def test_noise_reaches_the_update_differs_between_parts_and_has_the_right_size(
    engine: str, variant: str, agreed: Make
) -> None:
    level, learning_rate = 0.1, 0.5
    constant = {"learning_rate": learning_rate, "lr_scheduler_type": "constant", "max_steps": 1}

    def parameters(noise: float) -> torch.Tensor:
        knobs = {"lr_candidates": [1.0], "noise_candidates": [noise], "episode_length": 1}
        return agreed(engine, Sgd, knobs, **constant, **VARIANTS[variant]).parameters

    noise = (parameters(0.0) - parameters(level)) / learning_rate / level
    count = noise.numel()
    assert count > 25_000
    assert_right_in_distribution(noise, 1.0)
    # No value comes twice: not from another rank's part, not from another sub-group.
    assert len(set(noise.mul(1e4).round().tolist())) > 0.2 * count
    for offset in range(1, count, 97):
        shifted = torch.corrcoef(torch.stack([noise, noise.roll(offset)]))[0, 1]
        assert abs(shifted) < 6 / math.sqrt(count)


def test_a_genuine_fp16_overflow_skips_the_step(agreed, monkeypatch):
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)
    monkeypatch.setattr(
        get_accelerator(), "supported_dtypes", lambda: [torch.float, torch.half, torch.bfloat16]
    )

    def skipped(trainer: Any) -> int:
        assert trainer.model_wrapped.fp16_enabled()
        return trainer.model_wrapped.skipped_steps

    end = agreed(
        "zero2",
        pulse={"lr_candidates": [0.5, 2.0], "episode_length": 2, "nonfinite": "raise"},
        config={"fp16": {"enabled": True, "initial_scale_power": 22, "hysteresis": 1}},
        **{"per_device_train_batch_size": 1, "max_steps": 12, "fp16": True, "look": skipped},
    )
    assert 0 < end.skipped == end.seen[-1] < 12
    assert end.skipped + end.steps == 12


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
    check_settings(deepspeed_config(3))
    with pytest.raises(ValueError, match=message):
        check_settings(deepspeed_config(3, **overrides))


def test_refusals_come_before_training(make_trainer: Make) -> None:
    def body(rank: int) -> None:
        zero = {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}
        with pytest.raises(ValueError, match=r"must be 1, got 0\.5"):
            make_trainer(deepspeed=deepspeed_config(3, zero=zero))
        for knobs, message in (
            ({"noise_candidates": [0.1], "noise_mode": "relative"}, "must be 'absolute'"),
            ({"log_update_norm": True}, "`log_update_norm` to False"),
            ({"divergence": "rollback"}, "`divergence` must be 'off' or 'cut'"),
        ):
            knobs = {"episode_length": 2, **knobs}
            trainer = make_trainer(PulseOptTrainer, knobs, deepspeed=deepspeed_config(2))
            with pytest.raises(ValueError, match=message):
                trainer.train()
            assert trainer.state.global_step == 0

    run_ranks(2, body)


def test_a_callback_that_was_never_attached_says_how(make_trainer: Make) -> None:
    def body(rank: int) -> None:
        trainer = make_trainer("events", max_steps=1, deepspeed=deepspeed_config(2))
        with pytest.raises(RuntimeError, match=r"PulseOptCallback\(config\).attach\(trainer\)"):
            trainer.train()

    run_ranks(1, body)


def test_a_hand_written_loop_is_refused_and_told_what_to_use(train: Make) -> None:
    def body(rank: int) -> None:
        trainer = train(Trainer, max_steps=1, deepspeed=deepspeed_config(2))
        check_engine(trainer, "zero2")
        with pytest.raises(ValueError, match="Train with PulseOptTrainer"):
            AEES(trainer.optimizer)

    run_ranks(2, body)
