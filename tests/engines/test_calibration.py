"""Calibration on every engine: trials leave nothing behind, and all find about the same LR."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from pulseopt_hf import PulseOptCallback, PulseOptTrainer
from tests.conftest import (
    NAMED,
    SHORT,
    TRIAL_STEPS,
    Make,
    logged,
    make_arguments,
    make_rows,
    on,
)
from tests.engines.engine import VARIANTS, slow, whole
from tests.engines.trainers import Watch, fp16


def aees_of(trainer: Any) -> Any:
    """Return what plays the arms, also where the Trainer does not know it."""
    callbacks = trainer.callback_handler.callbacks
    return next(one for one in callbacks if isinstance(one, PulseOptCallback)).aees


def found_by(trainer: Any) -> dict[str, Any]:
    """Return what came of a Trainer's calibration."""
    search = trainer.aees.calibrator.search
    return {
        "wrapped": type(trainer.model_wrapped).__name__,
        "trials": [asdict(trial) for trial in search.trials],
        "layers": search.new_layers,
        "found": search.learning_rate,
        "used": max(trainer.lr_scheduler.base_lrs),
        "losses": logged(trainer),
    }


def calibrated(trainer: Any) -> dict[str, Any]:
    """Train, and return what came of the calibration."""
    watch = Watch(trainer, whole)
    trainer.train()
    return {**found_by(trainer), "seen": watch.seen}


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


@pytest.fixture(scope="module")
def single(
    tiny_model: Any, tiny_data: Any, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What a single process finds from the same batches."""
    settings = make_arguments(tmp_path_factory.mktemp("single"), **SHORT)
    trainer = PulseOptTrainer(tiny_model(), settings, train_dataset=tiny_data, pulse=NAMED)
    return calibrated(trainer)


def test_in_a_single_process(single: dict[str, Any]) -> None:
    check(single)
    assert single["trials"][-1]["step"] == TRIAL_STEPS - 1


COMPILED = {"torch_compile": True, "torch_compile_backend": "aot_eager"}


@pytest.mark.parametrize(
    "extra",
    [
        {"bf16": True},
        {"gradient_accumulation_steps": 3},
        {"gradient_checkpointing": True},
        {"optim": "adamw_torch"},
        {"train_dataset": make_rows()[:64], **COMPILED},
    ],
    ids=["bf16", "accumulation", "checkpointing", "fused off", "compiled"],
)
def test_with_what_a_trainer_can_do(
    extra: dict[str, Any], single: dict[str, Any], make_trainer: Make
) -> None:
    result = calibrated(make_trainer(pulse=NAMED, **SHORT, **extra))
    is_compiled = "torch_compile" in extra
    assert (result["wrapped"] == "OptimizedModule") == is_compiled
    check(result)
    assert result["found"] == pytest.approx(single["found"], rel=0.2 if is_compiled else 0.3)


def test_with_a_gradient_scaler_that_skips(single: dict[str, Any], make_trainer: Make) -> None:
    result = calibrated(make_trainer(fp16(), NAMED, fp16=True, **SHORT))
    check(result, kept_gradient=False)
    # One trial for each gradient, since the scaler steps but once; skipped ones are taken again.
    steps = [trial["step"] for trial in result["trials"]]
    assert len(set(steps)) == len(steps)
    assert steps[-1] >= len(steps)
    assert result["found"] == pytest.approx(single["found"], rel=0.3)


OFFLOAD = VARIANTS["optimizer offload"]
BF16 = VARIANTS["bf16"]


@pytest.mark.parametrize(
    ("engine", "settings"),
    [
        *(("ddp", {}), ("fsdp2", {}), ("fsdp2", {"bf16": True})),
        *(("zero0", BF16), ("zero2", {}), ("zero3", OFFLOAD)),
        *(slow("zero0", {}), slow("zero1", {}), slow("zero3", {})),
        *(slow(f"zero{stage}", OFFLOAD) for stage in (1, 2)),
        *(slow(f"zero{stage}", BF16) for stage in (1, 2, 3)),
    ],
)
def test_ranks_agree(
    engine: str, settings: dict[str, Any], single: dict[str, Any], on_ranks: Make
) -> None:
    def look(trainer: Any) -> tuple[torch.Tensor, Any]:
        is_over = trainer.state.global_step == trainer.state.max_steps
        return whole(trainer), found_by(trainer) if is_over else None

    results = []
    for end in on_ranks(engine, pulse=NAMED, look=look, **SHORT, **settings):
        assert end.world == 2
        seen, found = zip(*end.seen, strict=True)
        results.append({**found[-1], "seen": seen})
    one, other = results
    check(one, kept_gradient=not engine.startswith("zero"))
    assert one["trials"] == other["trials"]
    assert all(map(torch.equal, one["seen"], other["seen"]))
    # With bf16 and no ZeRO, DeepSpeed counts a step with gradients of zero before the first one,
    # and Adam's first step is then as long as 1 / sqrt(1.81) of its own.
    factor = 1.81**0.5 if (engine, settings) == ("zero0", BF16) else 1.0
    assert one["found"] == pytest.approx(factor * single["found"], rel=0.3)


@pytest.mark.slow
def test_what_zero_3_pads_its_parts_with_counts_nowhere(
    single: dict[str, Any], on_ranks: Make
) -> None:
    # Of sixteen gains, three ranks have six, six and four. With this setting torch fills what is
    # left uninitialised with NaN.
    settings = {"full_determinism": True, "per_device_train_batch_size": 2, **SHORT}
    found = [
        end.seen[-1] for end in on_ranks("zero3", pulse=NAMED, ranks=3, look=found_by, **settings)
    ]
    assert found[0]["layers"] == 2
    assert found[0]["found"] == pytest.approx(single["found"], rel=0.3)


@pytest.mark.parametrize(
    ("engine", "road", "config"),
    [
        ("ddp", "subclass", {}),
        ("ddp", "events", {}),
        slow("fsdp2", "subclass", {"state_dict_type": "SHARDED_STATE_DICT"}),
        slow("zero2", "subclass", {}),
    ],
)
def test_ranks_resume_amid_the_trials_and_the_watch(
    engine: str, road: str, config: dict[str, Any], on_ranks: Make, tmp_path: Path
) -> None:
    def run(step: int | None) -> Any:
        resume = None if step is None else str(tmp_path / f"runNone/checkpoint-{step}")
        folder = tmp_path / ("runNone" if road == "events" else f"run{step}")
        return on_ranks(
            *(engine, road, NAMED),
            **{"config": config, "resume": resume, "output_dir": str(folder)},
            **{"save_strategy": "steps", "save_steps": 4, **SHORT},
            look=lambda trainer: [asdict(one) for one in aees_of(trainer).calibrator.search.trials],
        )

    straight = run(None)
    for step in (4, 16):
        for rank, end in enumerate(run(step)):
            assert end.seen[-1] == straight[rank].seen[-1] != []
            assert torch.equal(end.parameters, straight[rank].parameters), (step, rank)


def test_a_checkpoint_that_no_event_announced_keeps_no_rank_waiting(
    on_ranks: Make, tmp_path: Path
) -> None:
    def ask(state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = state.global_step in (3, 12)

    settings = {"callbacks": [on("on_log", ask)], "output_dir": str(tmp_path), **SHORT}
    ends = on_ranks("ddp", "events", NAMED, **settings)
    assert len(list(tmp_path.glob("checkpoint-*/pulse_*_1.safetensors"))) == 2
    for end, other in zip(ends, on_ranks("ddp", "subclass", NAMED, **SHORT), strict=True):
        assert torch.equal(end.parameters, other.parameters)
