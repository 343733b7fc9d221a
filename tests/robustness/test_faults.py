"""Faults of the data, of user code and of the surroundings: no wrong LR, no lost state, no hang."""

import math
import random
import signal
import time
from typing import Any

import pytest
import torch

from pulseopt_hf import PulseOptConfig, PulseOptTrainer, newest_whole_checkpoint
from tests.conftest import Make, checkpoint, history, on, parameters_equal, raise_at
from tests.engines.ranks import Failure, ranks_with_failures, run_ranks

CONFIG = PulseOptConfig(
    lr_candidates=[0.5, 1.0, 2.0], noise_candidates=[0.01], episode_length=5, calibration="off"
)
FAULTS = [(kind, value) for kind in ("loss", "gradient") for value in (math.nan, math.inf)]


class FaultyTrainer(PulseOptTrainer):
    """Spoils a loss or a gradient in 5 % of the micro-batches, drawn by a seed of each rank."""

    kinds = FAULTS
    faults = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._rng = random.Random(100 + self.args.process_index)
        self.applied: list[float] = []

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        is_spoiled = self._rng.random() < 0.05
        self._spoiled, self._value = self._rng.choice(self.kinds) if is_spoiled else (None, 0.0)
        self.faults += is_spoiled
        loss = super().training_step(*args, **kwargs)
        if self._spoiled == "gradient":
            gradients = (p.grad for p in self.model.parameters() if p.grad is not None)
            next(gradients).view(-1)[0] = self._value
        return loss

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        return loss * self._value if self._spoiled == "loss" else loss

    def optimizer_step(self) -> None:
        super().optimizer_step()
        self.applied.append(self.optimizer.param_groups[0]["lr"])


def test_five_percent_of_spoiled_steps(train: Make) -> None:
    trainer = train(FaultyTrainer, CONFIG, max_steps=100)
    assert trainer.faults > 0
    assert trainer.aees.skipped_steps > 0
    assert trainer.state.global_step == 100
    assert trainer.aees.optimizer_steps + trainer.aees.skipped_steps == 100
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    logs = trainer.aees.get_logs()
    assert all(map(math.isfinite, logs["episode_start_losses"] + logs["episode_end_losses"]))
    # After every step, happened or not, the scheduler's own LR stands in the optimizer.
    assert max(trainer.applied) <= trainer.args.learning_rate
    assert len(trainer.applied) == 100
    assert trainer.applied == sorted(trainer.applied, reverse=True)


def test_five_percent_of_spoiled_steps_on_random_ranks(train: Make) -> None:
    class Losses(FaultyTrainer):
        """A gradient that is spoiled after DDP has averaged it would be one rank's alone."""

        kinds = FAULTS[:2]

    def body(rank: int) -> Any:
        trainer = train(Losses, CONFIG, max_steps=60)
        weights = [p.detach().sum().item() for p in trainer.model.parameters()]
        return trainer.aees.get_logs(), trainer.aees.skipped_steps, weights, trainer.faults

    one, other = run_ranks(2, body)
    assert one[:3] == other[:3]
    assert one[1] > 0
    assert one[3] != 0 or other[3] != 0
    assert all(map(math.isfinite, one[2]))


FAULT = ZeroDivisionError("a user's fault")


class Broken(list[Any]):
    """Raises at its 40th read, in the process that reads it."""

    reads = 0

    def __getitem__(self, index: Any) -> Any:
        self.reads += 1
        if self.reads == 40:
            raise FAULT
        return super().__getitem__(index)


def spoil(*_: Any) -> Any:
    raise FAULT


@pytest.mark.parametrize(
    "place", ["on_step_begin", "on_step_end", "on_save", "metric", "worker", "optimizer"]
)
def test_what_raises_is_raised_and_the_run_can_be_resumed(train, make_trainer, tiny_data, place):
    options: dict[str, Any] = {"save_steps": 2, "max_steps": 17}
    options |= {
        "metric": {"compute_metrics": spoil, "eval_strategy": "steps", "eval_steps": 8},
        "worker": {"train_dataset": Broken(tiny_data), "dataloader_num_workers": 1},
        "optimizer": {},
    }.get(place, {"callbacks": [raise_at(10, FAULT, place)]})
    trainer = make_trainer(pulse=CONFIG, **options)
    if place == "optimizer":
        trainer.create_optimizer()
        step = trainer.optimizer.step
        trainer.optimizer.step = lambda *inner, **kwargs: (
            spoil() if trainer.state.global_step == 9 else step(*inner, **kwargs)
        )
    with pytest.raises(ZeroDivisionError, match="a user's fault"):
        trainer.train()
    assert trainer.optimizer.param_groups[0]["lr"] <= trainer.args.learning_rate
    assert trainer.optimizer.param_groups[0]["lr"] == trainer.lr_scheduler.get_last_lr()[0]
    found, _ = newest_whole_checkpoint(trainer.args.output_dir)
    assert found is not None
    whole = train(pulse=CONFIG, max_steps=17)
    resumed = train(pulse=CONFIG, max_steps=17, resume=str(found))
    assert parameters_equal(resumed.model, whole.model)
    assert resumed.aees.get_logs() == whole.aees.get_logs()


def test_one_rank_that_raises_leaves_no_other_hanging(train: Make) -> None:
    """The others fail at their next collective, once the broken rank's connection is closed."""

    def body(rank: int) -> Any:
        train(pulse=CONFIG, max_steps=20, callbacks=[raise_at(7, FAULT)] if rank == 1 else [])

    results = ranks_with_failures(2, body, timeout=60)
    assert all(isinstance(result, Failure) for result in results)
    assert "a user's fault" in results[1].error
    assert results[0].seconds < 40


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_a_script_of_ones_own(train: Make, make_trainer: Make, number: int) -> None:
    """Python turns Ctrl-C, and a handler as most launchers set it SIGTERM, into an exception."""

    def send(state: Any, **kwargs: Any) -> None:
        if state.global_step == 9:
            signal.raise_signal(number)

    options = {"pulse": CONFIG, "max_steps": 16, "gradient_accumulation_steps": 2}
    trainer = make_trainer(**options, save_steps=2, callbacks=[on("on_substep_end", send)])
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert trainer.optimizer.param_groups[0]["lr"] == trainer.lr_scheduler.get_last_lr()[0]
    resumed = train(resume=checkpoint(trainer, 8), **options)
    assert parameters_equal(resumed.model, train(**options).model)


def test_a_clock_that_jumps_changes_nothing(train: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    steady = train(pulse=CONFIG)
    rng = random.Random(0)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + rng.uniform(-1e9, 1e9))
    jumping = train(pulse=CONFIG)
    assert parameters_equal(jumping.model, steady.model)
    assert jumping.aees.get_logs() == steady.aees.get_logs()
    assert history(jumping)[:-1] == history(steady)[:-1]
