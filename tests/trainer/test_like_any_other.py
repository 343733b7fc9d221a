"""Our Trainers are Trainers: pickled, copied, deleted, and fed with losses of any sign."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import GradientState
from transformers import Trainer, TrainerCallback, set_seed

from pulseopt_hf import PulseOptCallback, PulseOptConfig, PulseOptTrainer, with_pulseopt
from tests.conftest import history, parameters_equal

ARMS = PulseOptConfig(lr_candidates=[0.5, 2.0], episode_length=4)


class Named(Trainer):
    """A Trainer class of somebody else's."""


def of_kind(trainer_of: Any, kind: str, pulse: Any = ARMS, **given: Any) -> Any:
    if kind == "made":
        return trainer_of(pulse, cls=with_pulseopt(Named), **given)
    return trainer_of(None if kind == "events" else pulse, kind, **given)


KINDS = ["stock", "subclass", "made", "attached", "events"]


@pytest.fixture
def fresh_state() -> None:
    """Accelerate's state is shared by all Trainers, and after a training no pickle can hold it."""
    GradientState._reset_state()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["pickle", "deepcopy"])
@pytest.mark.usefixtures("fresh_state")
def test_a_copy_trains_itself_and_not_the_original(
    trainer_of: Any, kind: str, way: str, tiny_model: Any
) -> None:
    original = of_kind(trainer_of, kind, max_steps=60)
    copied: Any = (
        pickle.loads(pickle.dumps(original)) if way == "pickle" else copy.deepcopy(original)
    )
    assert type(copied) is type(original)
    set_seed(0)
    copied.train()
    assert parameters_equal(original.model, tiny_model())
    assert not parameters_equal(copied.model, tiny_model())
    if kind == "stock":
        return
    (ours,) = (c for c in copied.callback_handler.callbacks if isinstance(c, PulseOptCallback))
    assert ours.aees.optimizer is copied.optimizer
    (theirs,) = (c for c in original.callback_handler.callbacks if isinstance(c, PulseOptCallback))
    assert theirs.aees is None
    if kind != "events":
        assert copied.aees is ours.aees
        assert len(copied.aees.get_logs()["episode_rewards"]) > 5
    set_seed(0)
    original.train()
    assert parameters_equal(original.model, copied.model)


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trained", [False, True])
def test_deleting_a_trainer_frees_the_model_at_once(
    trainer_of: Any, kind: str, trained: bool, tiny_model: Any, no_collector: None
) -> None:
    model = tiny_model()
    alive = weakref.ref(model)
    trainer = of_kind(trainer_of, kind, model=model, max_steps=60)
    if trained:
        trainer.train()
        if kind == "stock":
            del model, trainer
            if alive() is not None:
                pytest.skip("the stock Trainer is kept alive after training, too")
            return
    del model, trainer
    assert alive() is None


class Shifted(PulseOptTrainer):
    """A Trainer whose loss is no loss in the usual sense."""

    shift = 0.0

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs) + self.shift


@pytest.mark.parametrize("shift", [-10.0, -2.5, 0.0])
@pytest.mark.parametrize(
    "pulse",
    [
        PulseOptConfig(),
        PulseOptConfig(calibration="off", episode_length=3),
        PulseOptConfig(lr_candidates=[0.5, 1.0, 2.0], episode_length=3),
        PulseOptConfig.published(lr_candidates=[0.5, 1.0, 2.0], episode_length=3),
        PulseOptConfig(lr_candidates=[0.5, 1.0], episode_length=3, divergence="rollback"),
    ],
    ids=["default", "one arm", "arms", "published", "rollback"],
)
def test_a_loss_of_any_sign_trains(trainer_of: Any, shift: float, pulse: PulseOptConfig) -> None:
    trainer = trainer_of(pulse, cls=Shifted, max_steps=60)
    trainer.shift = shift
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 60
    assert losses[-1] < losses[0] < 10.0 + shift
    assert trainer.aees is not None
    logs = trainer.aees.get_logs()
    assert len(logs["episode_rewards"]) > 4
    assert "cut" not in logs.get("episode_outcomes", [])
    assert "rolled back" not in logs.get("episode_outcomes", [])


@pytest.mark.parametrize(
    "pulse", [PulseOptConfig(calibration="off"), ARMS], ids=["one arm", "arms"]
)
def test_events_come_in_trainers_own_order_where_no_arms_ask_for_another(
    trainer_of: Any, pulse: PulseOptConfig, tiny_data: Any, arguments: Any
) -> None:
    class Order(TrainerCallback):
        def __init__(self) -> None:
            self.events: list[str] = []

        def on_save(self, *args: Any, **kwargs: Any) -> None:
            self.events.append("save")

        def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
            self.events.append("evaluate")

    orders = []
    for kind in ("stock", "subclass"):
        args = arguments(max_steps=36, save_strategy="steps", save_steps=6)
        trainer = of_kind(trainer_of, kind, pulse, args=args)
        trainer.eval_dataset = tiny_data[:4]
        args.eval_strategy = "epoch"
        trainer.add_callback(order := Order())
        trainer.train()
        orders.append(order.events)
    assert orders[0].count("evaluate") == 2
    assert (orders[0] == orders[1]) == (pulse is not ARMS)


def test_a_knob_that_means_nothing_alone_is_named(
    trainer_of: Any, caplog: pytest.LogCaptureFixture
) -> None:
    for knobs in (
        {"control_mode": "random"},
        {"context_mode": "trend"},
        {"bandit": "discounted_ucb"},
        {"structured_control_mode": "conditional"},
    ):
        caplog.clear()
        config = PulseOptConfig(calibration="off", **knobs)  # type: ignore[arg-type]
        trainer_of(config).train()
        (record,) = [r for r in caplog.records if r.name == "pulseopt_hf"]
        assert f"`{next(iter(knobs))}` has no effect with one arm" in record.getMessage()
    caplog.clear()
    several = PulseOptConfig(calibration="off", control_mode="random", lr_candidates=[1.0, 2.0])
    trainer_of(several).train()
    assert not [r for r in caplog.records if r.name == "pulseopt_hf"]


def test_a_neutral_run_after_copying_is_still_invisible(trainer_of: Any) -> None:
    stock = trainer_of(road="stock")
    stock.train()
    neutral = PulseOptConfig(calibration="off")
    ours = copy.deepcopy(trainer_of(neutral, "attached"))
    ours.train()
    assert parameters_equal(stock.model, ours.model)
    assert history(stock) == history(ours)
    assert torch.get_rng_state() is not None


class Noting(torch.optim.AdamW):
    """Keeps state that a checkpoint of the snapshot has no word for."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        for state in self.state.values():
            state.setdefault("seen", set()).add(int(state["step"]))


def test_a_checkpoint_is_saved_whatever_the_optimizer_keeps(
    tiny_model: Any, tiny_data: Any, arguments: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model()
    args = arguments(save_strategy="steps", save_steps=6)
    trainer = PulseOptTrainer(
        model,
        args,
        train_dataset=tiny_data,
        optimizers=(Noting(model.parameters(), lr=1e-3), None),
        pulse=PulseOptConfig(lr_candidates=[0.5, 1.0], episode_length=4, divergence="rollback"),
    )
    trainer.train()
    assert (Path(args.output_dir) / "checkpoint-6" / "optimizer.pt").exists()
    assert "goes back to there at worst, not to where its episode began" in caplog.text
