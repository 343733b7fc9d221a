"""Calibration on every engine: trials leave nothing behind, and all find about the same LR."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from pulseopt_hf import PulseOptConfig, PulseOptTrainer
from pulseopt_hf.aees.calibration import TRUSTED
from tests.engines.ranks import run_ranks
from tests.engines.trainers import Fp16PulseTrainer

CONFIG = PulseOptConfig(calibration="trust_region")
TRIAL_STEPS = TRUSTED + 1  # one batch finds the order of magnitude


class Watch(TrainerCallback):
    """Keeps what the parameters are after each of the first steps."""

    def __init__(self, whole: Callable[[], torch.Tensor]) -> None:
        self.whole, self.seen = whole, []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self.seen = [self.whole()]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step <= 30:
            self.seen.append(self.whole())


def whole(trainer: Any) -> torch.Tensor:
    """Every parameter, gathered; all ranks take part."""
    parameters = list(trainer.model.parameters())
    if trainer.is_deepspeed_enabled:
        import deepspeed

        with deepspeed.zero.GatheredParameters(parameters):
            return torch.cat([p.detach().reshape(-1).float().clone() for p in parameters])
    full = [p.full_tensor() if isinstance(p, DTensor) else p for p in parameters]
    return torch.cat([p.detach().reshape(-1).float() for p in full])


def calibrated(model: Any, settings: Any, data: Any, cls: Any = PulseOptTrainer) -> dict[str, Any]:
    """Train, and return what came of the calibration."""
    trainer = cls(model, settings, train_dataset=data, pulse=CONFIG)
    watch = Watch(lambda: whole(trainer))
    trainer.add_callback(watch)
    trainer.train()
    search = trainer.aees.calibrator.search
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "world": dist.get_world_size() if dist.is_initialized() else 1,
        "wrapped": type(trainer.model_wrapped).__name__,
        "fsdp2": trainer.accelerator.is_fsdp2,
        "seen": watch.seen,
        "trials": [asdict(trial) for trial in search.trials],
        "layers": search.new_layers,
        "found": search.learning_rate,
        "used": max(trainer.lr_scheduler.base_lrs),
        "losses": losses,
    }


def check(result: dict[str, Any], *, kept_gradient: bool = True) -> None:
    """Check that trials were taken, put back, and followed by training at what they found."""
    assert result["found"] is not None, result["trials"]
    assert result["layers"] == 2  # the model is new, whatever part of it a rank has
    assert result["used"] == pytest.approx(result["found"], rel=1e-6)
    last = result["trials"][-1]["step"]  # whose batch is trained on where that is still possible
    seen = result["seen"]
    first = last + (1 if kept_gradient else 2)  # step that is for good; a scaler may skip some
    for parameters in seen[:first]:
        assert torch.equal(parameters, seen[0])
    assert not all(torch.equal(parameters, seen[0]) for parameters in seen[first : first + 3])
    assert sum(result["losses"][-5:]) < 0.9 * sum(result["losses"][:5])


@pytest.fixture
def single(tiny_model: Any, tiny_data: Any, arguments: Any) -> dict[str, Any]:
    """What a single process finds from the same batches."""
    return calibrated(tiny_model(), arguments(max_steps=60, learning_rate=1e-4), tiny_data)


def settings_of(arguments: Any, **extra: Any) -> Any:
    return arguments(**{"max_steps": 60, "learning_rate": 1e-4, **extra})


def test_in_a_single_process(single: dict[str, Any]) -> None:
    check(single)
    assert single["trials"][-1]["step"] == TRIAL_STEPS - 1


@pytest.mark.parametrize("variant", ["bf16", "accumulation", "checkpointing", "fused off"])
def test_with_what_a_trainer_can_do(
    variant: str, single: dict[str, Any], tiny_model: Any, tiny_data: Any, arguments: Any
) -> None:
    extra: dict[str, Any] = {
        "bf16": {"bf16": True},
        "accumulation": {"gradient_accumulation_steps": 3},
        "checkpointing": {"gradient_checkpointing": True},
        "fused off": {"optim": "adamw_torch"},
    }[variant]
    result = calibrated(tiny_model(), settings_of(arguments, **extra), tiny_data)
    check(result)
    assert result["found"] == pytest.approx(single["found"], rel=0.3)


def test_with_a_gradient_scaler_that_skips(
    single: dict[str, Any], tiny_model: Any, tiny_data: Any, arguments: Any
) -> None:
    settings = settings_of(arguments, fp16=True)
    result = calibrated(tiny_model(), settings, tiny_data, Fp16PulseTrainer)
    check(result, kept_gradient=False)
    # One trial for each gradient, since the scaler steps but once; skipped ones are taken again.
    steps = [trial["step"] for trial in result["trials"]]
    assert len(set(steps)) == len(steps)
    assert steps[-1] >= len(steps)
    assert result["found"] == pytest.approx(single["found"], rel=0.3)


def test_with_a_compiled_model(
    single: dict[str, Any], tiny_model: Any, tiny_data: Any, arguments: Any
) -> None:
    settings = settings_of(arguments, torch_compile=True, torch_compile_backend="aot_eager")
    result = calibrated(tiny_model(), settings, tiny_data[:64])
    assert result["wrapped"] == "OptimizedModule"
    check(result)
    assert result["found"] == pytest.approx(single["found"], rel=0.2)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "fsdp2 bf16"])
def test_ranks_agree(
    engine: str,
    single: dict[str, Any],
    tiny_model: Any,
    tiny_data: Any,
    arguments: Any,
    fsdp2_on_cpu: dict[str, Any],
) -> None:
    extra: dict[str, Any] = {} if engine == "ddp" else dict(fsdp2_on_cpu)
    extra["bf16"] = engine.endswith("bf16")

    def body(rank: int) -> Any:
        return calibrated(tiny_model(), settings_of(arguments, **extra), tiny_data)

    one, other = run_ranks(2, body)
    assert one["world"] == 2
    assert one["fsdp2"] == engine.startswith("fsdp2")
    check(one)
    assert one["trials"] == other["trials"]
    assert all(map(torch.equal, one["seen"], other["seen"]))
    assert one["found"] == pytest.approx(single["found"], rel=0.3)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("variant", ["as it is", "offload", "bf16"])
def test_under_deepspeed(
    stage: int,
    variant: str,
    single: dict[str, Any],
    tiny_model: Any,
    tiny_data: Any,
    arguments: Any,
) -> None:
    pytest.importorskip("deepspeed", reason="install the extra `deepspeed` to run this")
    from tests.engines.test_deepspeed import engine

    if variant == "offload" and stage == 0:
        pytest.skip("there is nothing to offload at stage 0")
    overrides: dict[str, Any] = {}
    if variant == "offload":
        overrides["zero"] = {"offload_optimizer": {"device": "cpu"}}
    if variant == "bf16":
        overrides["bf16"] = {"enabled": True}
    config = engine(stage, **overrides)

    def body(rank: int) -> Any:
        settings = settings_of(arguments, deepspeed=config, bf16=variant == "bf16")
        return calibrated(tiny_model(), settings, tiny_data)

    one, other = run_ranks(2, body)
    assert one["wrapped"] == "DeepSpeedEngine"
    assert one["world"] == 2
    check(one, kept_gradient=False)
    assert one["trials"] == other["trials"]
    assert all(map(torch.equal, one["seen"], other["seen"]))
    # With bf16 and no ZeRO, DeepSpeed counts a step with gradients of zero before the first one,
    # and Adam's first step is then as long as 1 / sqrt(1.81) of its own.
    factor = 1.81**0.5 if (stage, variant) == (0, "bf16") else 1.0
    assert one["found"] == pytest.approx(factor * single["found"], rel=0.3)


def lora(model: Any) -> Any:
    peft = pytest.importorskip("peft", reason="install the extra `peft` to run this")
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=4, target_modules=["c_attn"], task_type="CAUSAL_LM")
    return peft.get_peft_model(model, settings)


def test_with_an_adapter_only_what_is_trained_is_copied(
    tiny_model: Any, tiny_data: Any, arguments: Any
) -> None:
    model = lora(tiny_model())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained < 0.1 * sum(p.numel() for p in model.parameters())
    settings = settings_of(arguments, learning_rate=1e-6)
    trainer = PulseOptTrainer(model, settings, train_dataset=tiny_data, pulse=CONFIG)
    copied = []

    class Memory(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            copied.append(trainer.aees.calibrator._origin.nbytes)

    trainer.add_callback(Memory())
    trainer.train()
    assert trainer.aees is not None
    assert trainer.aees.calibrator is not None
    assert trainer.aees.calibrator.search.learning_rate is not None
    # One copy of the trained parameters, in float32; none when the net is gone.
    assert set(copied[: TRIAL_STEPS + 10]) == {4 * trained}
    assert copied[-1] == 0


ENGINES = ["ddp", "fsdp2", pytest.param("zero2", marks=pytest.mark.slow)]


@pytest.mark.parametrize("engine", ENGINES)
def test_ranks_resume_amid_the_trials_and_the_watch(
    engine: str,
    tiny_model: Any,
    tiny_data: Any,
    arguments: Any,
    fsdp2_on_cpu: dict[str, Any],
    tmp_path: Path,
) -> None:
    extra: dict[str, Any] = {"save_strategy": "steps", "save_steps": 4}
    if engine == "fsdp2":
        extra |= fsdp2_on_cpu
        extra["fsdp_config"] = {**extra["fsdp_config"], "state_dict_type": "SHARDED_STATE_DICT"}
    if engine == "zero2":
        pytest.importorskip("deepspeed", reason="install the extra `deepspeed` to run this")
        from tests.engines.test_deepspeed import engine as config

        extra["deepspeed"] = config(2)

    def body(rank: int, step: int | None) -> Any:
        settings = settings_of(arguments, output_dir=str(tmp_path / f"run{step}"), **extra)
        trainer = PulseOptTrainer(tiny_model(), settings, train_dataset=tiny_data, pulse=CONFIG)
        folder = None if step is None else str(tmp_path / f"runNone/checkpoint-{step}")
        trainer.train(resume_from_checkpoint=folder)
        assert trainer.args.world_size == 2
        assert trainer.accelerator.is_fsdp2 == (engine == "fsdp2")
        assert trainer.aees is not None
        assert trainer.aees.calibrator is not None
        return whole(trainer), trainer.aees.calibrator.search.trials

    straight = run_ranks(2, lambda rank: body(rank, None))
    for step in (4, 16):
        for rank, (parameters, trials) in enumerate(run_ranks(2, lambda r, s=step: body(r, s))):
            assert trials == straight[rank][1]
            assert torch.equal(parameters, straight[rank][0]), (step, rank)
