"""The learning rate, asked for without training."""

import copy
import random
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from pulseopt_hf import AEES, find_learning_rate
from pulseopt_hf.aees.calibration import TRUSTED
from tests.conftest import Make, history, on, parameters_equal, take_step, without_dropout
from tests.engines.ranks import run_ranks


def random_state() -> tuple[Any, ...]:
    numpy = np.random.get_state()
    return torch.get_rng_state().tolist(), random.getstate(), numpy[1].tolist(), numpy[2]


@pytest.mark.parametrize("kind", ["stock", "subclass", "attached"])
@pytest.mark.parametrize("setting", ["plain", "bf16", "accumulation", "own optimizer", "trained"])
def test_a_trainer_is_as_if_it_had_not_been_asked(make_trainer, kind, setting):
    extra = {"bf16": {"bf16": True}, "accumulation": {"gradient_accumulation_steps": 2}}

    def fresh() -> Any:
        trainer = make_trainer(kind, max_steps=60, learning_rate=1e-4, **extra.get(setting, {}))
        if setting == "own optimizer":
            trainer.optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=1e-4)
        if setting == "trained":
            trainer.train()
        return trainer

    asked, other = fresh(), fresh()
    # It must rest while the LR is asked for: it would write files, or log to a server.
    loud = on("on_train_begin", lambda *_, **kwargs: pytest.fail("a callback was called"))
    asked.add_callback(loud)
    attributes, callbacks = dict(vars(asked)), list(asked.callback_handler.callbacks)
    before, weights = random_state(), copy.deepcopy(asked.model.state_dict())
    modes = [module.training for module in asked.model.modules()]
    groups = copy.deepcopy(asked.optimizer.state_dict()) if asked.optimizer else None
    suggestion = find_learning_rate(asked) if kind == "stock" else asked.find_learning_rate()
    assert suggestion.reason is None
    # A trained Trainer of ours has the LR that was found.
    was_calibrated = setting == "trained" and kind != "stock"
    assert (suggestion.set_lr == 1e-4) != was_calibrated
    assert suggestion.learning_rate > 5e-4
    assert suggestion.limited_by in ("outputs", "weights")
    assert len({trial.step for trial in suggestion.trials}) == TRUSTED + 1
    assert suggestion.replayed_rows > 0

    assert random_state() == before
    assert vars(asked) == attributes
    assert type(asked) is type(other)
    assert asked.callback_handler.callbacks == callbacks
    assert all(torch.equal(weights[k], v) for k, v in asked.model.state_dict().items())
    assert [module.training for module in asked.model.modules()] == modes
    assert all(p.grad is None for p in asked.model.parameters())
    assert "forward" not in vars(asked.model) or setting == "trained"
    if groups is not None:
        now = asked.optimizer.state_dict()
        torch.testing.assert_close(now, groups, rtol=0, atol=0)
    asked.remove_callback(loud)
    for trainer in (asked, other):
        torch.manual_seed(5)
        trainer.train()
    assert parameters_equal(asked.model, other.model)
    assert history(asked) == history(other)


def test_under_ddp_all_ranks_find_the_same(make_trainer: Make, tiny_model: Any) -> None:
    def body(rank: int) -> Any:
        trainer = make_trainer("stock", max_steps=60)
        suggestion = find_learning_rate(trainer)
        assert trainer.args.world_size == 2
        assert parameters_equal(trainer.model, tiny_model())
        trainer.train()
        return suggestion

    one, other = run_ranks(2, body)
    assert one == other
    assert one.reason is None


class Loop:
    """A loop of one's own, without Transformers' Trainer."""

    def __init__(self, model: Any, data: Any) -> None:
        self.model = model.train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.data = data
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda k: 1 - k / 60)

    def loader(self, seed: int = 0) -> Any:
        generator = torch.Generator().manual_seed(seed)
        return DataLoader(self.data, batch_size=4, shuffle=True, generator=generator)

    @staticmethod
    def loss(model: Any, batch: Any) -> Any:
        return model(**batch).loss

    def ask(self, **given: Any) -> Any:
        own = {"model": self.model, "optimizer": self.optimizer, "loss": self.loss}
        return find_learning_rate(**{**own, "batches": self.loader(), **given})

    def train(self, steps: int = 60, **kwargs: Any) -> tuple[AEES, list[float]]:
        torch.manual_seed(0)
        aees = AEES(self.optimizer, model=self.model, lr_scheduler=self.scheduler, seed=0, **kwargs)
        losses: list[float] = []
        while len(losses) < steps:
            for batch in self.loader(len(losses)):
                loss = take_step(aees, len(losses), partial(self.loss, self.model, batch))
                losses.append(loss.item())
                if len(losses) == steps:
                    break
        aees.finalize()
        return aees, losses


@pytest.fixture
def loop(tiny_model: Any, tiny_data: Any) -> Loop:
    return Loop(tiny_model(), tiny_data)


def test_a_loop_of_ones_own_is_as_if_it_had_not_been_asked(loop: Loop, tiny_model: Any) -> None:
    loop.model.eval()
    loop.model.lm_head.weight.grad = torch.ones_like(loop.model.lm_head.weight)
    gradient = loop.model.lm_head.weight.grad
    state = copy.deepcopy((loop.optimizer.state_dict(), loop.scheduler.state_dict()))
    before = random_state()
    suggestion = loop.ask()
    assert suggestion.reason is None
    assert 5e-4 < suggestion.learning_rate < 1e-2
    assert random_state() == before
    assert parameters_equal(loop.model, tiny_model())
    assert (loop.optimizer.state_dict(), loop.scheduler.state_dict()) == state
    assert not any(module.training for module in loop.model.modules())
    assert loop.model.lm_head.weight.grad is gradient
    assert not loop.model._forward_pre_hooks
    assert not loop.optimizer._optimizer_step_pre_hooks


def test_double_precision_finds_the_same(tiny_model: Any, tiny_data: Any) -> None:
    single = Loop(without_dropout(tiny_model()), tiny_data).ask()
    double = Loop(without_dropout(tiny_model()).double(), tiny_data)
    assert next(double.model.parameters()).dtype == torch.float64
    assert double.ask().learning_rate == pytest.approx(single.learning_rate, rel=0.05)


def test_long_rows_are_replayed_no_more_than_it_takes(tiny_model, tiny_data, monkeypatch):
    whole = Loop(tiny_model(), tiny_data).ask()
    monkeypatch.setattr("pulseopt_hf.optim.probe.POSITIONS", 64)  # one call of 4 rows of 16 tokens
    part = Loop(tiny_model(), tiny_data).ask()
    assert part.replayed_rows < 0.5 * whole.replayed_rows
    assert part.learning_rate == pytest.approx(whole.learning_rate, rel=0.3)


def test_a_loop_of_ones_own_is_calibrated(loop: Loop, tiny_model: Any, tiny_data: Any) -> None:
    aees, losses = loop.train(calibration="auto", lr_candidates=[0.5, 2.0], episode_length=4)
    found = aees.calibrator.search.learning_rate
    assert found is not None
    assert loop.scheduler.base_lrs == [found]
    assert losses[-1] < 0.8 * losses[0]
    _, without = Loop(tiny_model(), tiny_data).train()
    assert losses[-1] < without[-1]
    logs = aees.get_logs()
    assert len(logs["calibration_trials"]) == len(aees.calibrator.search.trials)
    assert set(logs["selected_lr_values"]) == {0.5, 2.0}
    assert logs["episode_start_steps"][0] == TRUSTED + 20


def test_a_loop_of_ones_own_goes_on_from_its_state(tiny_model: Any, tiny_data: Any) -> None:
    """After the trials; the state holds no parameters, so the net is gone."""
    for steps in (10, 40):
        loop = Loop(tiny_model(), tiny_data)
        aees, _ = loop.train(steps, calibration="auto")
        state = aees.state_dict()
        aees.remove()
        kwargs = {"lr_scheduler": loop.scheduler, "calibration": "auto", "seed": 0}
        restored = AEES(loop.optimizer, model=loop.model, **kwargs)
        restored.load_state_dict(state)
        assert not restored.calibrator.is_searching
        for step in range(steps, steps + 30):
            take_step(restored, step, partial(loop.loss, loop.model, next(iter(loop.loader()))))
        assert restored.calibrator.is_done
        assert loop.scheduler.base_lrs == [restored.calibrator.search.learning_rate]


def test_what_has_no_model_or_no_lr_is_refused(loop: Loop) -> None:
    with pytest.raises(TypeError, match="`model`, `optimizer`, `batches` and `loss`"):
        find_learning_rate(model=loop.model, optimizer=loop.optimizer)
    with pytest.raises(ValueError, match="must be 'off' without a model, got 'auto'"):
        AEES(loop.optimizer, calibration="auto")
    loop.optimizer.param_groups[0]["initial_lr"] = 0.0
    with pytest.raises(ValueError, match="not calibrated: it is zero"):
        loop.ask()


def test_few_batches_are_taken_again_and_none_is_said(tiny_model: Any, tiny_data: Any) -> None:
    loop = Loop(tiny_model(), tiny_data[:8])
    assert loop.ask().reason is None
    nothing = loop.ask(batches=[])
    assert nothing.reason == "the data ended before the search did"
    assert nothing.learning_rate == 1e-4
    assert nothing.limited_by is None


def test_the_picture_is_that_of_the_report(loop: Loop) -> None:
    pytest.importorskip("altair", reason="install the extra `report` to run this")
    suggestion = loop.ask()
    data = suggestion.plot().to_dict()["datasets"]
    assert len(data["trials"]) == 2 * len(suggestion.trials)
    assert data["star"][0]["rate"] == pytest.approx(suggestion.learning_rate, rel=1e-3)


def test_the_knobs_of_a_trainer_do_not_matter(make_trainer: Make) -> None:
    """It is asked for by name, and a run may be too short to calibrate itself."""
    off = {"calibration": "off", "lr_candidates": [0.5, 2.0]}
    trainer = make_trainer(pulse=off, max_steps=10)
    assert trainer.find_learning_rate().reason is None
    trainer.train()
    assert trainer.aees.calibrator is None
