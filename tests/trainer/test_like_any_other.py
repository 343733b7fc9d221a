"""Our Trainers are Trainers: pickled, copied, deleted, and fed with losses of any sign."""

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
from transformers import Trainer, set_seed

from pulseopt_hf import PulseOptCallback, PulseOptConfig, PulseOptTrainer, with_pulseopt
from tests.conftest import Make, checkpoint, logged, messages, on, parameters_equal

ARMS = PulseOptConfig(lr_candidates=[0.5, 2.0], episode_length=4)


class Named(Trainer):
    """A Trainer class of somebody else's."""


# Class or road of each kind, and its knobs.
KINDS: dict[str, tuple[Any, Any]] = {
    "subclass": ("subclass", ARMS),
    "made": (with_pulseopt(Named), ARMS),
    "attached": ("attached", ARMS),
    "events": ("events", None),
}


@pytest.fixture
def fresh_state() -> None:
    """Accelerate's state is shared by all Trainers, and after a training no pickle can hold it."""
    GradientState._reset_state()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["pickle", "deepcopy"])
@pytest.mark.usefixtures("fresh_state")
def test_a_copy_trains_itself_and_not_the_original(make_trainer, kind, way, tiny_model):
    original = make_trainer(*KINDS[kind], max_steps=60)
    copied = pickle.loads(pickle.dumps(original)) if way == "pickle" else copy.deepcopy(original)
    assert type(copied) is type(original)
    set_seed(0)
    copied.train()
    assert parameters_equal(original.model, tiny_model())
    assert not parameters_equal(copied.model, tiny_model())
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
    make_trainer: Make, kind: str, trained: bool, tiny_model: Any, no_collector: None
) -> None:
    model = tiny_model()
    alive = weakref.ref(model)
    trainer = make_trainer(*KINDS[kind], model=model, max_steps=60)
    if trained:
        trainer.train()
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
def test_a_loss_of_any_sign_trains(make_trainer: Make, shift: float, pulse: PulseOptConfig) -> None:
    trainer = make_trainer(Shifted, pulse, max_steps=60)
    trainer.shift = shift
    trainer.train()
    losses = logged(trainer)
    assert len(losses) == 60
    assert losses[-1] < losses[0] < 10.0 + shift
    logs = trainer.aees.get_logs()
    assert len(logs["episode_rewards"]) > 4
    assert "cut" not in logs.get("episode_outcomes", [])
    assert "rolled back" not in logs.get("episode_outcomes", [])


@pytest.mark.parametrize(
    "pulse", [PulseOptConfig(calibration="off"), ARMS], ids=["one arm", "arms"]
)
def test_events_come_in_trainers_own_order_where_no_arms_ask_for_another(train, pulse):
    def order(*kind: Any) -> list[str]:
        events: list[str] = []
        notes = [
            on(f"on_{event}", lambda *_, event=event, **kwargs: events.append(event))
            for event in ("save", "evaluate")
        ]
        train(*kind, callbacks=notes, max_steps=36, save_steps=6, eval_strategy="epoch")
        return events

    stock = order("stock")
    assert stock.count("evaluate") == 2
    assert (stock == order("subclass", pulse)) == (pulse is not ARMS)


def test_a_knob_that_means_nothing_alone_is_named(train, caplog):
    for knobs in (
        {"control_mode": "random"},
        {"context_mode": "trend"},
        {"bandit": "discounted_ucb"},
        {"structured_control_mode": "conditional"},
    ):
        caplog.clear()
        train(pulse={"calibration": "off", **knobs})
        (said,) = messages(caplog)
        assert f"`{next(iter(knobs))}` has no effect with one arm" in said
    caplog.clear()
    train(pulse={"calibration": "off", "control_mode": "random", "lr_candidates": [1.0, 2.0]})
    assert not messages(caplog)


class Noting(torch.optim.AdamW):
    """Keeps state that a checkpoint of the snapshot has no word for."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        for state in self.state.values():
            state.setdefault("seen", set()).add(int(state["step"]))


def test_a_checkpoint_is_saved_whatever_the_optimizer_keeps(train, tiny_model, caplog):
    model = tiny_model()
    trainer = train(
        pulse={"lr_candidates": [0.5, 1.0], "episode_length": 4, "divergence": "rollback"},
        model=model,
        optimizers=(Noting(model.parameters(), lr=1e-3), None),
        save_steps=6,
    )
    assert (Path(checkpoint(trainer, 6)) / "optimizer.pt").exists()
    assert "goes back to there at worst, not to where its episode began" in caplog.text
