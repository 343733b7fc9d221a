"""fp16 with a real GradScaler, in one process and on two ranks."""

from typing import Any

import pytest
import torch
from transformers import Trainer

from pulseopt_hf import PulseOptTrainer
from tests.conftest import ARMS, Make, callback_trainer, flat, logged, on
from tests.engines.trainers import Watch, bad_loss, fp16
from tests.versions import needs

# Settings of Trainer and of the optimizer that make AdamW of each implementation.
OPTIMIZERS: dict[str, tuple[str, bool | None]] = {
    "plain": ("adamw_torch", False),
    "foreach": ("adamw_torch", True),
    "fused": ("adamw_torch_fused", None),
}
CONFIG: dict[str, Any] = {**ARMS, "episode_length": 2}


def settings_of(kind: str, base: type = PulseOptTrainer, **attributes: Any) -> dict[str, Any]:
    """Return what makes a Trainer in fp16 with AdamW in the given implementation."""
    optim, foreach = OPTIMIZERS[kind]
    return {
        "cls": fp16(base, foreach=foreach, **attributes),
        "fp16": True,
        "optim": optim,
        "per_device_train_batch_size": 1,  # a CPU multiplies float16 matrices slowly
        "max_steps": 16,
    }


def check_scaler(trainer: Any, kind: str) -> None:
    assert trainer.accelerator.mixed_precision == "fp16"
    assert isinstance(trainer.optimizer.scaler, torch.amp.GradScaler)
    assert trainer.optimizer.scaler.is_enabled()
    group = trainer.optimizer.param_groups[0]
    assert bool(group["fused"]) == (kind == "fused")
    assert group["foreach"] == OPTIMIZERS[kind][1]


def look(trainer: Any) -> dict[str, Any]:
    """Return what a skipped step must leave untouched."""
    return {
        "parameters": flat(trainer.model),
        "lr": trainer.optimizer.param_groups[0]["lr"],
        "scheduler": trainer.lr_scheduler.last_epoch,
        "steps": trainer.aees.optimizer_steps,
        "skipped": trainer.aees.skipped_steps,
        "episodes": len(trainer.aees.get_logs()["episode_rewards"]),
    }


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_step_that_the_scaler_skips_leaves_everything_untouched(
    kind: str, max_grad_norm: float, make_trainer: Make
) -> None:
    trainer = make_trainer(pulse=CONFIG, max_grad_norm=max_grad_norm, **settings_of(kind))
    watch = Watch(trainer, look)
    trainer.train()
    check_scaler(trainer, kind)

    skips = 0
    for before, after in zip(watch.seen[:-1], watch.seen[1:], strict=True):
        same = torch.equal(before.pop("parameters"), after["parameters"])
        if after["skipped"] > before["skipped"]:
            skips += 1
            assert same
            assert after["skipped"] == skips
            for key in ("scheduler", "steps", "episodes"):
                assert after[key] == before[key]
            if before["steps"]:  # warmed up by nothing, the first arm's LR comes with its step
                assert after["lr"] == before["lr"]
        else:
            assert not same
            assert after["steps"] == before["steps"] + 1
            assert after["scheduler"] == after["steps"]
            assert after["episodes"] == after["steps"] // 2
    assert 4 <= skips < 12
    assert len(watch.seen) == 17
    assert logged(trainer, "pulse/skipped_steps")[-1] == skips


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.01])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_noise_goes_into_unscaled_gradients_after_clipping(kind, max_grad_norm, make_trainer):
    level = 0.5
    settings = {**settings_of(kind, init_scale=2.0**10), "max_grad_norm": max_grad_norm}

    def gradients(noise: float) -> torch.Tensor:
        """What the update uses in the first step."""
        caught: list[torch.Tensor] = []
        knobs = {"lr_candidates": [1.0], "noise_candidates": [noise], "episode_length": 1}
        trainer = make_trainer(pulse={**knobs, "seed": 0}, **{**settings, "max_steps": 1})

        def catch(*_: Any) -> None:
            caught.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters()]))

        def begin(state: Any, optimizer: Any, **kwargs: Any) -> None:
            # Hooks run in the order of their registration: this one sees what ours left.
            optimizer.optimizer.register_step_pre_hook(catch)

        trainer.add_callback(on("on_train_begin", begin))
        trainer.train()
        check_scaler(trainer, kind)
        assert trainer.aees.optimizer_steps == len(caught) == 1
        assert trainer.optimizer.scaler.get_scale() == 2.0**10
        return caught[0]

    clean = gradients(0.0)
    difference = gradients(level) - clean
    if max_grad_norm:
        assert clean.norm() == pytest.approx(max_grad_norm, rel=1e-3)
    else:
        assert 0.1 < clean.norm() < 100.0  # unscaled: 2^10 would show
    assert difference.std() == pytest.approx(level, rel=0.02)
    assert abs(difference.mean()) < 5 * level / difference.numel() ** 0.5


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_neutral_run_under_a_scaler_that_skips_nothing_equals_the_plain_trainer(kind, train):
    neutral = {"lr_candidates": [1.0], "episode_length": 4}
    plain = train(**settings_of(kind, Trainer, init_scale=2.0**8))
    ours = train(pulse=neutral, **settings_of(kind, init_scale=2.0**8))
    check_scaler(plain, kind)
    check_scaler(ours, kind)
    assert torch.equal(flat(ours.model), flat(plain.model))


@needs("torch", "2.8", "is not what Trainer chooses a fused optimizer on by itself")
def test_the_arms_of_an_overflowing_run_depend_neither_on_the_optimizer_nor_on_the_callback(train):
    ends = []
    for kind in OPTIMIZERS:
        trainer = train(pulse=CONFIG, **settings_of(kind))
        check_scaler(trainer, kind)
        aees = trainer.aees
        assert aees.skipped_steps > 0
        ends.append((aees.skipped_steps, aees.get_logs()["selected_combined_names"]))
    assert ends == [ends[0]] * 3

    settings = settings_of("fused", Trainer)
    cls = settings.pop("cls")
    attached = train(lambda **own: callback_trainer(base=cls, **own), CONFIG, **settings)
    check_scaler(attached, "fused")
    assert attached.aees.skipped_steps == trainer.aees.skipped_steps
    assert attached.aees.get_logs() == trainer.aees.get_logs()
    assert torch.equal(flat(attached.model), flat(trainer.model))


def test_a_scaler_that_overflows_for_ever_ends_the_run_and_says_where(train: Make) -> None:
    config = {**CONFIG, "max_consecutive_skips": 6}
    with pytest.raises(RuntimeError, match=r"6 optimizer steps in a row .* global step 5"):
        train(pulse=config, **settings_of("fused", init_scale=2.0**100))


@pytest.mark.parametrize("kind", ["plain", "fused"])
def test_nonfinite_raise_bears_overflows_and_ends_on_a_loss_that_is_nan_on_one_rank(kind, agreed):
    end = agreed(
        "ddp",
        pulse={**CONFIG, "nonfinite": "raise"},
        look=lambda trainer: check_scaler(trainer, kind),
        expect=pytest.raises(ValueError, match="not finite at global step 14"),
        **settings_of(kind, bad_loss(14, rank=1)),
    )
    assert end.skipped >= 4


@pytest.mark.parametrize(
    ("engine", "kind"),
    [*(("ddp", kind) for kind in OPTIMIZERS), ("fsdp2", "foreach"), ("fsdp2", "fused")],
)
def test_an_overflow_on_one_rank_skips_the_step_on_all(engine, kind, agreed):
    base = bad_loss(3, 9, value=float("inf"))
    end = agreed(
        engine,
        pulse=CONFIG,
        look=lambda trainer: check_scaler(trainer, kind),
        **settings_of(kind, base, init_scale=2.0**8),
    )
    assert end.precision == "fp16"
    assert (end.skipped, end.steps, end.scheduled) == (2, 14, 14)
    assert len(end.logs["episode_rewards"]) == 7
