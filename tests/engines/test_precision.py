"""bf16 autocast and fp16 with a real GradScaler, in one process and on two ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback

from pulseopt_hf import AEES, PulseOptCallback, PulseOptConfig, PulseOptTrainer
from tests.engines.ranks import run_ranks
from tests.engines.trainers import Fp16PulseTrainer, Fp16Trainer
from tests.versions import needs

OPTIMIZERS = {
    "plain": ("adamw_torch", {"foreach": False}),
    "foreach": ("adamw_torch", {"foreach": True}),
    "fused": ("adamw_torch_fused", {}),
}
CONFIG: dict[str, Any] = {
    "lr_candidates": [0.5, 1.0, 2.0],
    "noise_candidates": [0.0, 1e-3],
    "episode_length": 2,
}
# A CPU multiplies float16 matrices slowly.
FP16: dict[str, Any] = {"fp16": True, "per_device_train_batch_size": 1, "max_steps": 16}


class Watch(TrainerCallback):
    """Notes, after each step, what a skipped one must leave untouched."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.seen: list[dict[str, Any]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        aees = self.trainer.aees
        self.seen.append(
            {
                "parameters": flat(self.trainer.model),
                "lr": self.trainer.optimizer.param_groups[0]["lr"],
                "scheduler": self.trainer.lr_scheduler.last_epoch,
                "noise": aees.optimizer_steps,
                "skipped": aees.skipped_steps,
                "episodes": len(aees.get_logs()["episode_rewards"]),
            }
        )


def flat(model: Any) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1).clone() for p in model.parameters()])


def with_optimizer(cls: Any, kind: str, *args: Any, **kwargs: Any) -> Any:
    """Make a Trainer whose optimizer is AdamW in the given implementation."""
    trainer = cls(*args, **kwargs)
    plain = trainer.create_optimizer

    def create(*args: Any, **kwargs: Any) -> Any:
        optimizer = plain(*args, **kwargs)
        for group in optimizer.param_groups:
            group.update(OPTIMIZERS[kind][1])
        return optimizer

    trainer.create_optimizer = create
    return trainer


def check_scaler(trainer: Any, kind: str) -> None:
    assert trainer.accelerator.mixed_precision == "fp16"
    assert isinstance(trainer.optimizer.scaler, torch.amp.GradScaler)
    assert trainer.optimizer.scaler.is_enabled()
    group = trainer.optimizer.param_groups[0]
    assert bool(group["fused"]) == (kind == "fused")
    if kind != "fused":
        assert group["foreach"] == (kind == "foreach")


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_step_that_the_scaler_skips_leaves_everything_untouched(
    kind: str,
    max_grad_norm: float,
    tiny_model: Callable[[], Any],
    tiny_data: Any,
    arguments: Callable[..., Any],
) -> None:
    settings = arguments(**FP16, optim=OPTIMIZERS[kind][0], max_grad_norm=max_grad_norm)
    config = PulseOptConfig(**CONFIG)
    trainer = with_optimizer(
        Fp16PulseTrainer, kind, tiny_model(), settings, train_dataset=tiny_data, pulse=config
    )
    watch = Watch(trainer)
    trainer.add_callback(watch)
    trainer.train()
    check_scaler(trainer, kind)

    skips = 0
    previous: dict[str, Any] = {"skipped": 0}
    for seen in watch.seen:
        if seen["skipped"] > previous["skipped"]:
            skips += 1
            if "parameters" in previous:
                assert torch.equal(seen["parameters"], previous["parameters"])
                for key in ("lr", "scheduler", "noise", "episodes"):
                    assert seen[key] == previous[key]
            else:
                assert seen["noise"] == seen["scheduler"] == seen["episodes"] == 0
        else:
            assert seen["noise"] == previous.get("noise", 0) + 1
            assert seen["scheduler"] == seen["noise"]
            assert seen["episodes"] == seen["noise"] // 2
            if "parameters" in previous:
                assert not torch.equal(seen["parameters"], previous["parameters"])
        previous = seen
    assert 4 <= skips < 12
    assert len(watch.seen) == 16
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logged[-1]["pulse/skipped_steps"] == skips


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.01])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_noise_goes_into_unscaled_gradients_after_clipping(
    kind: str,
    max_grad_norm: float,
    tiny_model: Callable[[], Any],
    tiny_data: Any,
    arguments: Callable[..., Any],
) -> None:
    level = 0.5

    class Scaled(Fp16PulseTrainer):
        init_scale = 2.0**10

    one_step = {**FP16, "max_steps": 1}

    def gradients(noise: float) -> torch.Tensor:
        """What the update uses in the first step."""
        caught: list[torch.Tensor] = []
        config = PulseOptConfig(
            lr_candidates=[1.0], noise_candidates=[noise], episode_length=1, seed=0
        )
        settings = arguments(**one_step, optim=OPTIMIZERS[kind][0], max_grad_norm=max_grad_norm)
        trainer = with_optimizer(
            Scaled, kind, tiny_model(), settings, train_dataset=tiny_data, pulse=config
        )

        class Catch(TrainerCallback):
            def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
                optimizer = trainer.optimizer.optimizer
                # Hooks run in the order of their registration: this one sees what ours left.
                optimizer.register_step_pre_hook(
                    lambda *_: caught.append(
                        torch.cat([p.grad.reshape(-1).clone() for p in trainer.model.parameters()])
                    )
                )

        trainer.add_callback(Catch())
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
def test_a_neutral_run_under_a_scaler_that_skips_nothing_equals_the_plain_trainer(
    kind: str, tiny_model: Callable[[], Any], tiny_data: Any, arguments: Callable[..., Any]
) -> None:
    trained = []
    for cls, extra in (
        (Fp16Trainer, {}),
        (Fp16PulseTrainer, {"pulse": PulseOptConfig(lr_candidates=[1.0], episode_length=4)}),
    ):
        calm = type("Calm", (cls,), {"init_scale": 2.0**8})
        settings = arguments(**FP16, optim=OPTIMIZERS[kind][0])
        trainer = with_optimizer(
            calm, kind, tiny_model(), settings, train_dataset=tiny_data, **extra
        )
        trainer.train()
        check_scaler(trainer, kind)
        trained.append(flat(trainer.model))
    assert torch.equal(*trained)


def test_the_arms_of_an_overflowing_run_do_not_depend_on_the_kind_of_optimizer(
    tiny_model: Callable[[], Any], tiny_data: Any, arguments: Callable[..., Any]
) -> None:
    names = {}
    for kind in OPTIMIZERS:
        trainer = with_optimizer(
            Fp16PulseTrainer,
            kind,
            tiny_model(),
            arguments(**FP16, optim=OPTIMIZERS[kind][0]),
            train_dataset=tiny_data,
            pulse=PulseOptConfig(**CONFIG),
        )
        trainer.train()
        check_scaler(trainer, kind)
        names[kind] = (
            trainer.aees.skipped_steps,
            trainer.aees.get_logs()["selected_combined_names"],
        )
    assert names["plain"] == names["foreach"] == names["fused"]
    assert names["plain"][0] > 0


def test_a_scaler_that_overflows_for_ever_ends_the_run_and_says_where(
    tiny_model: Callable[[], Any], tiny_data: Any, arguments: Callable[..., Any]
) -> None:
    class Hopeless(Fp16PulseTrainer):
        init_scale = 2.0**100

    config = PulseOptConfig(**CONFIG, max_consecutive_skips=6)
    trainer = Hopeless(tiny_model(), arguments(**FP16), train_dataset=tiny_data, pulse=config)
    with pytest.raises(RuntimeError, match=r"6 optimizer steps in a row .* global step 5"):
        trainer.train()


@pytest.mark.parametrize("kind", ["plain", "fused"])
def test_nonfinite_raise_bears_overflows_and_ends_on_a_loss_that_is_nan_on_one_rank(
    kind: str, tiny_model: Callable[[], Any], tiny_data: Any, arguments: Callable[..., Any]
) -> None:
    class Bad(Fp16PulseTrainer):
        bad_rank = -1

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            bad = self.state.global_step == 14 and self.args.process_index == self.bad_rank
            return loss * float("nan") if bad else loss

    def body(rank: int) -> Any:
        config = PulseOptConfig(**CONFIG, nonfinite="raise")
        trainer = with_optimizer(
            Bad,
            kind,
            tiny_model(),
            arguments(**FP16, optim=OPTIMIZERS[kind][0]),
            train_dataset=tiny_data,
            pulse=config,
        )
        trainer.bad_rank = 1
        with pytest.raises(ValueError, match="not finite at global step 14"):
            trainer.train()
        check_scaler(trainer, kind)
        return trainer.args.world_size, trainer.aees.skipped_steps

    (world, skips), second = run_ranks(2, body)
    assert (world, skips) == second
    assert world == 2
    assert skips >= 4


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_two_ranks_skip_alike_under_a_scaler(
    kind: str, tiny_model: Callable[[], Any], tiny_data: Any, arguments: Callable[..., Any]
) -> None:
    class Bad(Fp16PulseTrainer):
        init_scale = 2.0**8

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            bad = self.state.global_step in (3, 9) and self.args.process_index == 0
            return loss * float("inf") if bad else loss

    def body(rank: int) -> Any:
        trainer = with_optimizer(
            Bad,
            kind,
            tiny_model(),
            arguments(**FP16, optim=OPTIMIZERS[kind][0]),
            train_dataset=tiny_data,
            pulse=PulseOptConfig(**CONFIG),
        )
        trainer.train()
        check_scaler(trainer, kind)
        aees = trainer.aees
        parameters = flat(trainer.model)
        assert bool(torch.isfinite(parameters).all())
        assert trainer.lr_scheduler.last_epoch == 14
        return trainer.args.world_size, aees.skipped_steps, aees.get_logs(), parameters

    first, second = run_ranks(2, body)
    assert first[:2] == second[:2] == (2, 2)
    assert first[2] == second[2]
    assert torch.equal(first[3], second[3])


def test_bf16_runs_the_arms_of_a_hand_written_loop_under_autocast(
    tiny_model: Callable[[], Any], tiny_data: Any, arguments: Callable[..., Any]
) -> None:
    config = PulseOptConfig(**CONFIG, seed=3)
    settings = arguments(bf16=True, lr_scheduler_type="constant")
    trainer = PulseOptTrainer(tiny_model(), settings, train_dataset=tiny_data, pulse=config)
    batches: list[torch.Tensor] = []
    plain_step = trainer.training_step

    def training_step(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        batches.append(inputs["input_ids"])
        return plain_step(model, inputs, *args, **kwargs)

    trainer.training_step = training_step  # type: ignore[method-assign]
    set_dropout(trainer.model, 0.0)
    trainer.train()
    assert trainer.accelerator.mixed_precision == "bf16"
    assert trainer.aees is not None

    model = tiny_model()
    set_dropout(model, 0.0)
    model.train()
    fused = trainer.optimizer.defaults["fused"]  # by default from torch 2.8 on
    optimizer = torch.optim.AdamW(groups(trainer, model), lr=settings.learning_rate, fused=fused)
    aees = AEES.from_config(optimizer, config)
    for step, batch in enumerate(batches):
        aees.step_start(step)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            # As Trainer reduces it: a sum, divided by the number of labels.
            labels = torch.tensor(batch.numel())
            loss = model(input_ids=batch, labels=batch, num_items_in_batch=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        aees.step_end(loss)
    aees.finalize()
    assert aees.get_logs() == trainer.aees.get_logs()
    assert torch.equal(flat(model), flat(trainer.model))
    assert len(set(aees.get_logs()["selected_combined_names"])) == 6
    assert aees.get_logs()["episode_start_losses"][0] == pytest.approx(4.1, abs=1.0)


def set_dropout(model: Any, value: float) -> None:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = value


def groups(trainer: Trainer, model: Any) -> list[dict[str, Any]]:
    """The two parameter groups that Trainer makes."""
    decayed = trainer.get_decay_parameter_names(model)
    named = list(model.named_parameters())
    return [
        {"params": [p for n, p in named if n in decayed], "weight_decay": 0.0},
        {"params": [p for n, p in named if n not in decayed], "weight_decay": 0.0},
    ]


@needs("torch", "2.8", "is not what Trainer chooses a fused optimizer on by itself")
def test_the_callback_under_a_scaler_runs_the_same_arms_as_the_trainer(
    tiny_model: Callable[[], Any], tiny_data: Any, arguments: Callable[..., Any]
) -> None:
    config = PulseOptConfig(**CONFIG)
    ours = Fp16PulseTrainer(tiny_model(), arguments(**FP16), train_dataset=tiny_data, pulse=config)
    ours.train()
    plain: Any = Fp16Trainer(tiny_model(), arguments(**FP16), train_dataset=tiny_data)
    PulseOptCallback(config).attach(plain)
    plain.train()
    check_scaler(plain, "fused")
    assert ours.aees is not None
    assert ours.aees.skipped_steps == plain.aees.skipped_steps > 0
    assert ours.aees.get_logs() == plain.aees.get_logs()
    assert torch.equal(flat(ours.model), flat(plain.model))
