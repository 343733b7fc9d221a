"""Calibration under a real Trainer."""

from __future__ import annotations

import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset
from transformers import Trainer

from pulseopt_hf import PulseOptCallback, PulseOptConfig, PulseOptTrainer
from pulseopt_hf.optim import AEES
from pulseopt_hf.trainer.calibration import PROBE_ROWS, Probe
from tests.conftest import history, parameters_equal
from tests.engines.ranks import run_ranks
from tests.engines.trainers import Fp16PulseTrainer

CONFIG = PulseOptConfig(lr_candidates=[0.5, 1.0, 2.0], calibration="trust_region", episode_length=5)


CONSTANT = PulseOptConfig(calibration="trust_region")


def make(
    tiny_model: Any, tiny_data: Any, arguments: Any, road: str = "subclass", **kwargs: Any
) -> Any:
    args = arguments(**{"max_steps": 60, "logging_steps": 1, **kwargs})
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
    assert logs["episode_start_steps"][0] == logs["calibration_trials"][-1]["step"] + 1
    assert one.aees.optimizer_steps == 60
    entry = [entry for entry in one.state.log_history if "loss" in entry][-1]
    assert entry["pulse/lr_scale"] == one.aees.calibration.scale
    assert entry["pulse/learning_rate"] > 0


def test_a_resumed_run_ends_as_the_uninterrupted_one(
    tiny_model: Any, tiny_data: Any, arguments: Any
) -> None:
    """Before every trial, after the last, and amid an episode."""
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 50}
    whole = make(tiny_model, tiny_data, arguments, **settings)
    whole.train()
    trials = len(whole.aees.get_logs()["calibration_trials"])
    assert trials >= 4
    steps = [*range(1, trials + 2), trials + 8]
    for road, step in [*(("subclass", step) for step in steps), ("callback", 2)]:
        resumed = make(tiny_model, tiny_data, arguments, road, max_steps=50)
        folder = Path(whole.args.output_dir) / f"checkpoint-{step}"
        assert (folder / "pulse_origin_0.safetensors").exists() == (step <= trials)
        resumed.train(resume_from_checkpoint=str(folder))
        assert parameters_equal(resumed.model, whole.model), step
        assert resumed.aees.get_logs() == whole.aees.get_logs()
        assert history(resumed)[:-1] == history(whole)[:-1]


def test_a_run_that_was_not_calibrated_is_not_when_it_is_resumed(
    tiny_model: Any, tiny_data: Any, arguments: Any
) -> None:
    short = make_default(tiny_model, tiny_data, arguments, max_steps=20, save_steps=10)
    short.train()
    longer = make_default(tiny_model, tiny_data, arguments, max_steps=60)
    folder = Path(short.args.output_dir) / "checkpoint-10"
    longer.train(resume_from_checkpoint=str(folder))
    assert longer.aees.calibration is None
    assert longer.aees.lr_scale == 1.0


def make_default(tiny_model: Any, tiny_data: Any, arguments: Any, **kwargs: Any) -> Any:
    args = arguments(**{"save_strategy": "steps", **kwargs})
    return PulseOptTrainer(tiny_model(), args, train_dataset=tiny_data)


@pytest.mark.parametrize("warmup", [0, 20])
def test_trials_run_at_shares_of_the_peak_and_the_lr_then_rises_to_what_was_found(
    tiny_model: Any, tiny_data: Any, arguments: Any, warmup: int
) -> None:
    """The schedule's warm-up where it has one, and else one of the calibration's own."""
    args = arguments(max_steps=100, warmup_steps=warmup, learning_rate=1e-3, logging_steps=1)
    trainer = PulseOptTrainer(tiny_model(), args, train_dataset=tiny_data, pulse=CONSTANT)
    trainer.train()
    search = trainer.aees.calibration
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    used = [entry["pulse/learning_rate"] for entry in logs]
    for trial in search.trials:
        assert used[trial.step] == pytest.approx(1e-3 * trial.scale)
    first = search.trials[-1].step + 1
    top = max(used[first:])
    assert used[first:].index(top) == pytest.approx(5 if warmup == 0 else 20 - first, abs=1)
    assert used[first] < 0.3 * top or warmup
    # Schedulers only ever see the base LR.
    assert max(entry["learning_rate"] for entry in logs) <= 1e-3
    assert top <= 1e-3 * search.scale * (1 + 1e-6)


@pytest.mark.parametrize("base_lr", [1e-6, 1.0])
def test_what_is_found_does_not_hang_on_the_base_lr(
    tiny_model: Any, tiny_data: Any, arguments: Any, base_lr: float
) -> None:
    found = []
    for learning_rate in (1e-3, base_lr):
        args = arguments(max_steps=50, learning_rate=learning_rate)
        trainer = PulseOptTrainer(tiny_model(), args, train_dataset=tiny_data, pulse=CONSTANT)
        trainer.train()
        found.append(trainer.aees.calibration.scale * learning_rate)
    assert found[1] == pytest.approx(found[0], rel=0.5)


def test_the_probe_leaves_no_trace(tiny_model: Any, tiny_data: Any, arguments: Any) -> None:
    trainer = make(tiny_model, tiny_data, arguments, dataloader_num_workers=0)
    trainer.model_wrapped = trainer.model.train()
    settings = dict(vars(trainer.args))
    torch.manual_seed(3)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    aees = AEES(torch.optim.SGD(trainer.model.parameters(), lr=0.1))
    probe = Probe(trainer, 0)
    first = probe.losses(aees)
    assert probe.losses(aees) == first
    assert len(first) == PROBE_ROWS
    assert len(set(first)) > 1
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
    assert "20 steps are too few" in caplog.text
    assert "calibration_trials" not in trainer.aees.get_logs()

    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter([tiny_data[0]] * 10)

    trainer = make(tiny_model, Stream(), arguments)
    with pytest.raises(ValueError, match="a stream has no length"):
        trainer.train()
    caplog.clear()
    args = arguments(max_steps=60)
    trainer = PulseOptTrainer(tiny_model(), args, train_dataset=Stream(), pulse=PulseOptConfig())
    trainer.train()
    assert "not calibrated and the base LR taken as it is" in caplog.text
    assert trainer.aees.lr_scale == 1.0


@pytest.mark.parametrize("setting", ["bf16", "fp16", "accumulation"])
def test_with_mixed_precision_and_accumulation(
    tiny_model: Any, tiny_data: Any, arguments: Any, setting: str
) -> None:
    extra = {"bf16": setting == "bf16", "fp16": setting == "fp16"}
    if setting == "accumulation":
        extra = {"gradient_accumulation_steps": 2}
    cls: Any = Fp16PulseTrainer if setting == "fp16" else PulseOptTrainer
    args = arguments(max_steps=60, **extra)
    trainer = cls(tiny_model(), args, train_dataset=tiny_data, pulse=CONFIG)
    trainer.train()
    search = trainer.aees.calibration
    assert search.is_done
    # The scaler of `Fp16PulseTrainer` skips its first steps, and those trials are taken again.
    assert (search.trials[-1].step >= len(search.trials)) == (setting == "fp16")
    assert all(trial.loss_movement > 0 for trial in search.trials)
    assert trainer.aees.optimizer_steps + trainer.aees.skipped_steps == 60


class Normalised(torch.nn.Module):
    """A classifier whose batch norm keeps running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(4, 16),
            torch.nn.BatchNorm1d(16),
            torch.nn.ReLU(),
            torch.nn.Linear(16, 2),
        )

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.layers(x)
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_running_statistics_are_no_movement(arguments: Any) -> None:
    """They move with every batch, however small the LR."""
    torch.manual_seed(0)
    rows = [{"x": 3.0 + torch.randn(4), "labels": i % 2} for i in range(64)]
    args = arguments(max_steps=50)
    trainer = PulseOptTrainer(Normalised(), args, train_dataset=rows, pulse=CONSTANT)
    trainer.train()
    assert trainer.aees is not None
    search = trainer.aees.calibration
    assert search is not None
    assert not search.failed
    assert search.trials[0].loss_movement < 0.001
    assert 0.02 < max(trial.loss_movement for trial in search.trials[-6:]) < 0.15


@pytest.mark.parametrize(
    ("label", "labels", "of_classes"),
    [
        (torch.tensor(1), 2, True),
        (torch.tensor(1.5), 1, False),
        (torch.tensor(1), 1, False),  # a whole number to be hit
        (torch.tensor([1.0, 0.0]), 2, False),  # several classes a row
        (torch.tensor([1, 0, 1]), 2, False),  # a class for every token
        ({"boxes": torch.ones(1, 4)}, 2, False),  # as an object detector is given it
    ],
    ids=["class", "number", "whole number", "classes", "tokens", "boxes"],
)
def test_a_probe_knows_rows_of_one_class(
    arguments: Any, label: Any, labels: int, of_classes: bool
) -> None:
    model = Normalised()
    model.config = SimpleNamespace(num_labels=labels)  # type: ignore[assignment]
    rows = [{"x": torch.randn(4), "labels": label} for _ in range(8)]
    kwargs: Any = {}
    if isinstance(label, dict):
        kwargs["data_collator"] = lambda batch: {"labels": [row["labels"] for row in batch]}
    trainer = PulseOptTrainer(model, arguments(), train_dataset=rows, **kwargs)
    assert Probe(trainer, 0).is_of_classes == of_classes


@pytest.mark.parametrize("classes", [2, 50])
def test_many_classes_do_not_raise_the_lr(arguments: Any, classes: int) -> None:
    """With shares of the mean loss, fifty classes would be trained at five times the LR."""

    class Headed(Normalised):
        def __init__(self) -> None:
            super().__init__()
            self.layers[3] = torch.nn.Linear(16, classes)

    torch.manual_seed(0)
    rows = [{"x": torch.randn(4), "labels": i % classes} for i in range(200)]
    args = arguments(max_steps=50, per_device_train_batch_size=8, learning_rate=1e-3)
    trainer = PulseOptTrainer(Headed(), args, train_dataset=rows, pulse=CONSTANT)
    trainer.train()
    assert trainer.aees is not None
    search = trainer.aees.calibration
    assert search is not None
    moved = search.trials[-1].loss_movement
    assert search.trials[-1].probe_before > 0.9 * math.log(classes)
    change = moved * math.log(2.0)  # nats, root mean square over rows
    assert change < 0.06


def test_a_model_that_nothing_moves_is_trained_at_the_base_lr(
    arguments: Any, caplog: pytest.LogCaptureFixture
) -> None:
    class Idle(Normalised):
        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            loss = 0.0 * super().forward(x, labels)["loss"] + 1.0
            return {"loss": loss}

    rows = [{"x": torch.ones(4) * i, "labels": i % 2} for i in range(64)]
    args = arguments(max_steps=50, optim="sgd")
    trainer = PulseOptTrainer(Idle(), args, train_dataset=rows, pulse=CONSTANT)
    trainer.train()
    assert trainer.aees is not None
    assert trainer.aees.lr_scale == 1.0
    assert "could not be calibrated" in caplog.text


class Targeted(Normalised):
    """Calls its labels otherwise, so that Trainer does not find them outside of training."""

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:  # type: ignore[override]
        return super().forward(x, target)


def test_where_no_loss_can_be_measured_the_default_takes_the_base_lr(
    arguments: Any, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"x": torch.randn(4), "target": i % 2} for i in range(64)]

    def train(pulse: PulseOptConfig, **kwargs: Any) -> PulseOptTrainer:
        args = arguments(max_steps=50, **kwargs)
        trainer = PulseOptTrainer(Targeted(), args, train_dataset=rows, pulse=pulse)
        trainer.train()
        return trainer

    trainer = train(PulseOptConfig(), logging_steps=1)
    assert trainer.aees is not None
    assert trainer.aees.optimizer_steps == 50
    first = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert first["pulse/learning_rate"] == trainer.args.learning_rate  # with no rise of its own
    assert "returns none" in caplog.text
    with pytest.raises(ValueError, match="`label_names`"):
        train(CONSTANT)
    named = train(CONSTANT, label_names=["target"])
    assert named.aees is not None
    assert named.aees.calibration is not None
    assert not named.aees.calibration.failed
