"""On a GPU everything is as on a CPU: invisible when neutral, the same arms, the same rewards."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from pulseopt_hf import AEES, PulseOptConfig, PulseOptTrainer
from tests.conftest import ARMS, Make, history, logged, parameters_equal, run_python
from tests.engines.test_compile import CONFIG, compiled
from tests.engines.trainers import bad_loss
from tests.invariant.test_cost import play

pytestmark = pytest.mark.gpu

NEUTRAL = PulseOptConfig(lr_candidates=[1.0], noise_candidates=[0.0], calibration="off")
TWO_ARMS = {"lr_candidates": [0.5, 2.0], "episode_length": 4, "calibration": "off"}
PRECISIONS = {"fp32": {}, "bf16": {"bf16": True}, "fp16": {"fp16": True}}


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("accumulation", [1, 3])
def test_neutral_arms_are_invisible(optim, precision, accumulation, train, tiny_model, on_gpu):
    settings = {"optim": optim, "gradient_accumulation_steps": accumulation, "max_steps": 12}
    settings |= PRECISIONS[precision]
    vanilla = train(Trainer, args=on_gpu(**settings))
    pulse = train(pulse=NEUTRAL, args=on_gpu(**settings))
    assert next(pulse.model.parameters()).is_cuda
    assert (pulse.accelerator.scaler is not None) == (precision == "fp16")
    assert parameters_equal(pulse.model, vanilla.model)
    assert history(pulse) == history(vanilla)
    assert not parameters_equal(pulse.model.cpu(), tiny_model())  # it trained


@pytest.mark.parametrize("settings", [PulseOptConfig.published, PulseOptConfig])
def test_arms_and_rewards_are_the_cpus_for_the_same_losses(settings: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    losses = torch.rand(90, generator=generator).add(1.0).mul(torch.linspace(2.0, 1.0, 90))
    logs = []
    for device in ("cpu", "cuda"):
        parameter = torch.nn.Parameter(torch.ones(10, device=device))
        optimizer = torch.optim.AdamW([parameter], lr=0.1)
        config = settings(**ARMS, episode_length=4, calibration="off", seed=0)
        aees = AEES.from_config(optimizer, config)
        for step, loss in enumerate(losses.to(device)):
            play(aees, step, loss)
        aees.finalize()
        logs.append(aees.get_logs())
    assert len(set(logs[0]["selected_combined_names"])) > 3
    assert logs[0] == logs[1]


class Overflowing(PulseOptTrainer):
    """Its loss is so large that the first scales of fp16 overflow."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        found = super().compute_loss(*args, **kwargs)
        return found * 1000.0 if isinstance(found, torch.Tensor) else found


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_steps_that_overflow_under_a_real_scaler_are_no_steps(optim, train, on_gpu):
    trainer = train(Overflowing, TWO_ARMS, args=on_gpu(fp16=True, optim=optim, max_steps=30))
    skipped = trainer.aees.skipped_steps
    assert 1 <= skipped < 15
    scaler = trainer.accelerator.scaler
    assert scaler.get_scale() == 2.0**16 / 2**skipped
    ends = trainer.aees.get_logs()["episode_end_steps"]
    assert len(ends) == -(-(30 - skipped) // 4)
    assert trainer.lr_scheduler.last_epoch == 30 - skipped
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    losses = logged(trainer)
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_the_guard_skips_a_loss_that_is_not_finite(poison, train, on_gpu):
    settings = on_gpu(bf16=True, optim="adamw_torch_fused")
    trainer = train(bad_loss(5, value=poison), TWO_ARMS, args=settings)
    assert trainer.aees.skipped_steps == 1
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_a_model_compiled_by_inductor_is_not_compiled_again_for_an_arm(
    train: Make, tiny_model: Any, tiny_data: Any, on_gpu: Make
) -> None:
    def run(pulse: Any) -> Any:
        settings = on_gpu(torch_compile=True, torch_compile_backend="inductor")
        return compiled(train, pulse, tiny_model(), tiny_data, args=settings)

    _, expected = run({"lr_candidates": [1.0], "episode_length": 3, "calibration": "off"})
    trainer, graphs = run({**CONFIG, "calibration": "off"})
    assert graphs == expected >= 1
    assert len(set(trainer.aees.get_logs()["selected_combined_names"])) > 3


@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_agree_over_nccl(ranks: int, tmp_path: Path) -> None:
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"there are no {ranks} GPUs")
    program = [Path(__file__).with_name("nccl_rank.py"), tmp_path]
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    run_python(*launcher, *program, env={**os.environ, "PYTHONPATH": path}, timeout=240)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(ranks)]
    assert all(one["backend"] == "nccl" and one["world"] == ranks for one in found)
    if ranks > 1:
        assert all(one["wrapped"] == "DistributedDataParallel" for one in found)
    assert all(one["logs"] == found[0]["logs"] for one in found)
    assert all(one["found"] == found[0]["found"] is not None for one in found)
    assert len(set(found[0]["logs"]["selected_combined_names"])) > 2
