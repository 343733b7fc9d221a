"""Calibration under a real Trainer."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset
from transformers import Trainer

from pulseopt_hf import PulseOptCallback, PulseOptConfig, PulseOptTrainer
from pulseopt_hf.trainer.calibration import PROBE_PARTS, Probe
from tests.conftest import history, parameters_equal
from tests.engines.ranks import run_ranks
from tests.engines.trainers import Fp16PulseTrainer

CONFIG = PulseOptConfig(lr_candidates=[0.5, 1.0, 2.0], calibration="ladder", episode_length=5)


def make(
    tiny_model: Any, tiny_data: Any, arguments: Any, road: str = "subclass", **kwargs: Any
) -> Any:
    args = arguments(**{"max_steps": 150, "logging_steps": 1, **kwargs})
    if road == "subclass":
        return PulseOptTrainer(tiny_model(), args, train_dataset=tiny_data, pulse=CONFIG)
    trainer = Trainer(tiny_model(), args, train_dataset=tiny_data)
    PulseOptCallback(CONFIG).attach(trainer)
    return trainer


def test_both_roads_find_the_same_and_episodes_follow(
    tiny_model: Any, tiny_data: Any, arguments: Any
) -> None:
    trainers = []
    for road in ("subclass", "callback"):
        trainers.append(make(tiny_model, tiny_data, arguments, road))
        trainers[-1].train()
    one, other = trainers
    assert parameters_equal(one.model, other.model)
    logs = one.aees.get_logs()
    assert logs == other.aees.get_logs()
    last = logs["calibration_trials"][-1]["end_step"]
    assert logs["episode_start_steps"][0] >= last
    assert one.aees.optimizer_steps == 150
    entry = [entry for entry in one.state.log_history if "loss" in entry][-1]
    assert entry["pulse/lr_scale"] == one.aees.calibration.scale
    assert entry["pulse/learning_rate"] > 0


def test_a_resumed_run_ends_as_the_uninterrupted_one(
    tiny_model: Any, tiny_data: Any, arguments: Any
) -> None:
    """Steps amid rungs, between rungs, in every round of a duel, and amid an episode."""
    settings = {"save_strategy": "steps", "save_steps": 1}
    whole = make(tiny_model, tiny_data, arguments, **settings)
    whole.train()
    trials = whole.aees.get_logs()["calibration_trials"]
    duels = [trial for trial in trials if trial["phase"] == "duel"]
    assert duels, trials
    steps = {1, trials[2]["start_step"], duels[0]["start_step"] + 1, duels[1]["start_step"] + 2}
    steps |= {duels[-1]["end_step"], duels[-1]["end_step"] + 2}
    for road, step in [("subclass", step) for step in sorted(steps)] + [("callback", max(steps))]:
        resumed = make(tiny_model, tiny_data, arguments, road)
        folder = Path(whole.args.output_dir) / f"checkpoint-{step}"
        resumed.train(resume_from_checkpoint=str(folder))
        assert parameters_equal(resumed.model, whole.model), step
        assert resumed.aees.get_logs() == whole.aees.get_logs()
        assert history(resumed)[:-1] == history(whole)[:-1]


def test_warm_up_is_replaced_and_the_scheduler_sees_the_base_lr_only(
    tiny_model: Any, tiny_data: Any, arguments: Any
) -> None:
    used: list[float] = []

    class Spy(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            used.append(self.param_groups[0]["lr"])
            return super().step(closure)

    model = tiny_model()
    optimizer = Spy(model.parameters(), lr=1e-3)
    args = arguments(max_steps=150, warmup_steps=140, learning_rate=1e-3)
    trainer = PulseOptTrainer(
        model,
        args,
        train_dataset=tiny_data,
        optimizers=(optimizer, None),
        pulse=PulseOptConfig(lr_candidates=[1.0], calibration="ladder"),
    )
    trainer.train()
    # Hooks run before `step`'s body only from torch's wrapper, so the spy sees what is used.
    assert used[0] == pytest.approx(1e-3 / 300)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0)


def test_the_probe_leaves_no_trace(tiny_model: Any, tiny_data: Any, arguments: Any) -> None:
    trainer = make(tiny_model, tiny_data, arguments, dataloader_num_workers=0)
    trainer.model_wrapped = trainer.model.train()
    settings = dict(vars(trainer.args))
    torch.manual_seed(3)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    probe = Probe(trainer, 0)
    first = [loss.item() for loss in probe.losses()]
    assert [loss.item() for loss in probe.losses()] == first
    assert len(first) == PROBE_PARTS
    assert torch.get_rng_state().equal(before[0])
    assert random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all()
    assert trainer.model.training
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    assert dict(vars(trainer.args)) == settings


def test_ranks_agree(tiny_model: Any, tiny_data: Any, arguments: Any) -> None:
    def body(rank: int) -> Any:
        trainer = make(tiny_model, tiny_data, arguments)
        trainer.train()
        weights = [p.sum().item() for p in trainer.model.parameters()]
        return trainer.aees.get_logs()["calibration_trials"], weights

    one, other = run_ranks(2, body)
    assert one == other
    assert one[0]


def test_a_short_run_and_a_stream_say_why_not(
    tiny_model: Any, tiny_data: Any, arguments: Any, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make(tiny_model, tiny_data, arguments, max_steps=20)
    trainer.train()
    assert "20 steps are too few to calibrate" in caplog.text
    assert "calibration_trials" not in trainer.aees.get_logs()

    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter([tiny_data[0]] * 10)

    trainer = make(tiny_model, Stream(), arguments)
    with pytest.raises(ValueError, match="not a stream"):
        trainer.train()


@pytest.mark.parametrize("setting", ["bf16", "fp16", "accumulation"])
def test_with_mixed_precision_and_accumulation(
    tiny_model: Any, tiny_data: Any, arguments: Any, setting: str
) -> None:
    extra = {"bf16": setting == "bf16", "fp16": setting == "fp16"}
    if setting == "accumulation":
        extra = {"gradient_accumulation_steps": 2}
    cls: Any = Fp16PulseTrainer if setting == "fp16" else PulseOptTrainer
    args = arguments(max_steps=150, **extra)
    trainer = cls(tiny_model(), args, train_dataset=tiny_data, pulse=CONFIG)
    trainer.train()
    trials = trainer.aees.get_logs()["calibration_trials"]
    assert trials[-1]["phase"] == "duel"
    assert trials[-1]["probe_after"] < trials[0]["probe_before"]
    assert trainer.aees.optimizer_steps + trainer.aees.skipped_steps == 150
