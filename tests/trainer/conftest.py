"""What the tests of the Trainer floor share."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
from transformers import Trainer

from pulseopt_hf import PulseOptCallback, PulseOptConfig, PulseOptTrainer

OF_TRAINER = set(inspect.signature(Trainer.__init__).parameters)


@pytest.fixture
def trainer_of(tiny_model: Any, tiny_data: Any, arguments: Any) -> Callable[..., Any]:
    """Return a maker of Trainers of `tiny_model` on `tiny_data`.

    It takes the knobs, the road by which they come to the Trainer (`stock` is without), or a class
    of one's own, and what differs from the fixture `arguments` and from Trainer's arguments.
    """

    def make(
        pulse: PulseOptConfig | None = None,
        road: str = "subclass",
        cls: Callable[..., Any] | None = None,
        **given: Any,
    ) -> Any:
        own = {name: given.pop(name) for name in OF_TRAINER & given.keys()}
        args = own.pop("args", None) or arguments(**given)
        data = {"train_dataset": tiny_data, "eval_dataset": tiny_data[:8]}
        own = {"model": tiny_model(), "args": args, **data, **own}
        if cls is None and road == "subclass":
            cls = PulseOptTrainer
        if cls is not None:
            return cls(**own, **({} if pulse is None else {"pulse": pulse}))
        callback = PulseOptCallback(pulse)
        if road == "events":
            own["callbacks"] = [*own.get("callbacks", ()), callback]
        trainer = Trainer(**own)
        if road == "attached":
            callback.attach(trainer)
        return trainer

    return make
