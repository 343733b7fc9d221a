"""Calibration under a real Trainer."""

import logging
import os
import random
from typing import Any

import numpy as np
import prodigyopt
import pytest
import torch
from schedulefree import AdamWScheduleFree, SGDScheduleFree
from torch.utils.data import IterableDataset

from pulseopt_hf import PulseOptCallback, PulseOptConfig
from pulseopt_hf.aees import StateError, calibration
from pulseopt_hf.optim import loss_watch
from tests.conftest import (
    NAMED,
    SHORT,
    TRIAL_STEPS,
    VOCABULARY,
    Make,
    checkpoint,
    history,
    logged,
    messages,
    on,
    parameters_equal,
    stop_after,
)
from tests.engines.engine import slow
from tests.engines.ranks import run_ranks
from tests.optim.test_optimizers import KINDS

WATCHED = loss_watch.SHORTEST_WATCH
FIRST_EPISODE = TRIAL_STEPS - 1 + WATCHED  # the last trial's batch is trained on
THREE_ARMS = PulseOptConfig(
    lr_candidates=[0.5, 1.0, 2.0], calibration="trust_region", episode_length=5
)
OURS = ("subclass", "attached", "events")


def calibrator_of(trainer: Any) -> Any:
    callbacks = trainer.callback_handler.callbacks
    (ours,) = (callback for callback in callbacks if isinstance(callback, PulseOptCallback))
    return ours.aees.calibrator


@pytest.fixture(scope="session")
def dice() -> list[dict[str, torch.Tensor]]:
    """Return sequences that nothing can be learned of, so that a bad step shows in the loss."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, VOCABULARY, (280, 16), generator=generator)
    return [{"input_ids": row, "labels": row} for row in rows]


@pytest.fixture
def loose(monkeypatch: pytest.MonkeyPatch) -> None:
    """Break the measure: an LR a hundred times too high is found."""
    monkeypatch.setattr(calibration, "OUTPUT_RADIUS", 100 * calibration.OUTPUT_RADIUS)
    monkeypatch.setattr(calibration, "WEIGHT_RADIUS", 1e6)


def spy(seen: list[Any]) -> Any:
    """Return a callback that keeps what there is after each step."""

    def look(state: Any, model: Any, optimizer: Any, lr_scheduler: Any, **kwargs: Any) -> None:
        inner = optimizer.optimizer
        seen.append(
            {
                "parameters": [p.detach().clone() for p in model.parameters()],
                "state": len(inner.state),
                "lr": inner.param_groups[0]["lr"],
                "schedule": lr_scheduler.last_epoch,
                "torch": torch.get_rng_state().tolist(),
                "python": random.getstate(),
                "numpy": np.random.get_state()[1].tolist(),
                "training": [module.training for module in model.modules()],
                "hooks": sum(len(module._forward_pre_hooks) for module in model.modules()),
            }
        )

    return on("on_step_end", look)


def test_until_the_first_real_step_all_is_as_in_the_stock_trainer(train, tiny_model):
    """Parameters, optimizer, schedule and random states; the data draws from the latter."""
    stock: list[Any] = []
    ours: list[Any] = []
    train("stock", **SHORT, callbacks=[spy(stock)])
    train(pulse=NAMED, **SHORT, callbacks=[spy(ours)])
    untouched = list(tiny_model().parameters())
    for step, (theirs, mine) in enumerate(zip(stock[:TRIAL_STEPS], ours, strict=False)):
        for key in ("schedule", "torch", "python", "numpy", "training"):
            assert mine[key] == theirs[key], (step, key)
        last = step == TRIAL_STEPS - 1
        assert all(map(torch.equal, mine["parameters"], untouched)) != last
        assert (mine["state"] > 0) == last
        assert (mine["lr"] == theirs["lr"]) != last
    assert mine["hooks"] == theirs["hooks"] == 0


def test_what_is_found_is_the_base_lr_everywhere(train: Make, caplog: Any) -> None:
    trainers = []
    for road in OURS:
        caplog.clear()
        trainer = train(road, NAMED, **SHORT, warmup_steps=10)
        outcome = calibrator_of(trainer).outcome
        found = outcome.learning_rate
        assert outcome.reason is None
        assert found > 10 * 1e-4
        assert trainer.lr_scheduler.base_lrs == pytest.approx([found] * 2)
        groups = trainer.optimizer.param_groups
        assert [group["initial_lr"] for group in groups] == pytest.approx([found] * 2)
        rates = logged(trainer, "learning_rate")
        assert rates[3] == pytest.approx(3e-5)  # of the schedule that was set, while it is tried
        for step in range(TRIAL_STEPS, 60):
            assert rates[step] == pytest.approx(found * min(step / 10, (60 - step) / 50))
        assert messages(caplog) == [str(outcome)]
        trainers.append(trainer)
    one, two, three = trainers
    assert parameters_equal(one.model, two.model)
    assert parameters_equal(one.model, three.model)
    assert calibrator_of(one).search.trials == calibrator_of(three).search.trials
    assert one.aees.get_logs() == two.aees.get_logs()


def test_without_a_warm_up_the_lr_rises_to_what_was_found_and_the_log_says_so(train: Make) -> None:
    seen: list[Any] = []
    settings = {**SHORT, "max_steps": 800, "lr_scheduler_type": "constant"}
    trainer = train(pulse=NAMED, **settings, callbacks=[spy(seen), stop_after(60)])
    found = calibrator_of(trainer).outcome.learning_rate
    first, ramp = TRIAL_STEPS - 1, 40  # a twentieth of the run
    for step in range(first, 60):
        share = min(1.0, (step - first + 1) / ramp)
        assert logged(trainer, "learning_rate")[step] == pytest.approx(found * share)
        assert logged(trainer, "pulse/learning_rate")[step] == pytest.approx(found * share)
        assert seen[step]["lr"] == pytest.approx(found)  # schedulers only ever see the base LR


def test_episodes_follow_when_the_net_is_gone(train: Make) -> None:
    trainer = train(pulse=THREE_ARMS, max_steps=60)
    logs = trainer.aees.get_logs()
    assert logs["episode_start_steps"][0] == FIRST_EPISODE
    assert set(logs["selected_lr_values"]) == {0.5, 1.0, 2.0}
    assert trainer.aees.optimizer_steps == 60
    assert not calibrator_of(trainer)._origin.is_taken


@pytest.mark.parametrize("road", OURS)
@pytest.mark.parametrize("net", ["holds nothing", "catches"])
def test_a_resumed_run_ends_as_the_uninterrupted_one(train, dice, road, net, request):
    """Amid the trials, while the net hangs, and after."""
    if net == "catches":
        request.getfixturevalue("loose")
    settings = {"train_dataset": dice, "max_steps": 50, "learning_rate": 1e-4}
    saves = {"save_strategy": "steps", "save_steps": 1}
    whole = train(road, NAMED, **settings, **saves)
    assert (calibrator_of(whole).outcome.reason is not None) == (net == "catches")
    steps = range(1, FIRST_EPISODE + 3) if road == "subclass" else (3, TRIAL_STEPS + 4)
    for step in steps:
        folder = checkpoint(whole, step)
        files = {name for name in os.listdir(folder) if name.startswith("pulse_")}
        expected = "pulse_calls_0.safetensors" if step < TRIAL_STEPS else ""
        if TRIAL_STEPS <= step < FIRST_EPISODE:
            expected = "pulse_origin_0.safetensors"
        assert files == ({expected} if expected else set()), step
        if step % 4 and step not in (1, TRIAL_STEPS, FIRST_EPISODE):
            continue
        # No event says what is resumed but the run's own folder.
        own = {"output_dir": whole.args.output_dir} if road == "events" else saves
        resumed = train(road, NAMED, **settings, **own, resume=folder)
        assert parameters_equal(resumed.model, whole.model), step
        assert calibrator_of(resumed).search.trials == calibrator_of(whole).search.trials
        assert calibrator_of(resumed).outcomes == calibrator_of(whole).outcomes
        assert logged(resumed) == logged(whole)
        if road != "events":
            assert history(resumed)[:-1] == history(whole)[:-1]


def test_events_alone_resume_in_another_folder_once_the_net_is_gone(
    train: Make, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"save_strategy": "steps", "save_steps": 30, **SHORT}
    whole = train("events", NAMED, **settings)
    resumed = train("events", NAMED, **settings, resume=checkpoint(whole, 30))
    assert parameters_equal(resumed.model, whole.model)
    assert "weights only" not in caplog.text
    early = train("events", NAMED, **{**settings, "save_steps": 4})
    with pytest.raises(StateError, match=r"no event names.*\.attach\(trainer\)"):
        train("events", NAMED, **settings, resume=checkpoint(early, 4))


def test_a_plain_trainer_goes_on_at_the_calibrated_lr(train: Make) -> None:
    settings = {"save_strategy": "steps", "save_steps": 30, **SHORT}
    ours = train(pulse=NAMED, **settings)
    plain = train("stock", **settings, resume=checkpoint(ours, 30))
    rates = logged(plain, "learning_rate")
    assert rates == logged(ours, "learning_rate")
    assert rates[40] > 1e-3 / 3
    assert parameters_equal(plain.model, ours.model)


def test_a_run_that_was_not_calibrated_is_not_when_it_is_resumed(train: Make) -> None:
    short = train(max_steps=20, save_strategy="steps", save_steps=10)
    longer = train(max_steps=60, resume=checkpoint(short, 10))
    assert longer.aees.calibrator is None


AS_UNDER_AEES = ("adamw", "adamw foreach", "adamw fused", "transformers adafactor", "rmsprop")
OPTIMIZERS = {
    **{name: KINDS[name] for name in AS_UNDER_AEES},
    "sgd": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr),
    "momentum": KINDS["sgd"],
    "schedule-free adamw": lambda parameters, lr: AdamWScheduleFree(parameters, lr=lr),
    "schedule-free sgd": lambda parameters, lr: SGDScheduleFree(parameters, lr=lr),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_found_does_not_depend_on_the_lr_that_was_set(make_trainer, name, tiny_model):
    found = []
    for learning_rate in (1e-7, 1e-3, 1.0):
        model = tiny_model()
        optimizer = OPTIMIZERS[name](model.parameters(), learning_rate)
        trainer = make_trainer(model=model, max_steps=60, optimizers=(optimizer, None))
        suggestion = trainer.find_learning_rate()
        assert suggestion.reason is None
        assert suggestion.set_lr == learning_rate
        assert len({trial.step for trial in suggestion.trials}) >= TRIAL_STEPS
        found.append(suggestion.learning_rate)
    assert max(found) < 1.15 * min(found), found


class Stream(IterableDataset[Any]):
    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __iter__(self) -> Any:
        return iter(self.rows)


@pytest.mark.parametrize("loader", ["stream", "fork", slow("spawn")])
def test_whatever_the_data_comes_from(train: Make, tiny_data: Any, loader: str) -> None:
    extra: dict[str, Any] = {}
    if loader != "stream":
        extra = {"dataloader_num_workers": 2, "dataloader_multiprocessing_context": loader}
    data = Stream(tiny_data) if loader == "stream" else tiny_data
    trainer = train(pulse=NAMED, train_dataset=data, **SHORT, **extra)
    assert calibrator_of(trainer).outcome.reason is None
    assert logged(trainer)[-1] < 0.9 * logged(trainer)[0]


@pytest.mark.parametrize(
    ("settings", "reason", "learning_rate"),
    [
        ({"max_steps": 49}, "49 steps are too few, 50 are needed", 3e-3),
        ({"max_steps": 60, "learning_rate": 0.0}, "it is zero", 0.0),
        ({"max_steps": 60, "prodigy": 1.0}, "Prodigy finds its own", 1.0),
    ],
)
def test_where_it_cannot_be_done_the_log_says_why(
    train: Make, tiny_model: Any, settings: Any, reason: str, learning_rate: float, caplog: Any
) -> None:
    settings = {"lr_scheduler_type": "constant", **settings}
    if lr := settings.pop("prodigy", None):
        model = tiny_model()
        prodigy = prodigyopt.Prodigy(model.parameters(), lr=lr)
        settings |= {"model": model, "optimizers": (prodigy, None)}
    trainer = train(**settings)
    (said,) = messages(caplog)
    assert f"not calibrated: {reason}" in said
    assert trainer.aees.calibrator is None
    assert trainer.aees.learning_rate == learning_rate


def test_a_search_over_the_lr_tries_the_lrs_that_it_names(make_trainer, tiny_model, caplog):
    pytest.importorskip("optuna", reason="install the extra `dev` to run this")
    used = []

    def note(state: Any, lr_scheduler: Any, **kwargs: Any) -> None:
        used.append((trainer.args.learning_rate, max(lr_scheduler.base_lrs)))

    trainer = make_trainer(
        model=None, model_init=tiny_model, callbacks=[on("on_train_end", note)], max_steps=60
    )
    trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_categorical("lr", [1e-4, 1e-3])},
        n_trials=2,
        direction="minimize",
    )
    assert len(used) == 2
    assert all(named == base for named, base in used)
    assert "a search over `learning_rate` is going on" in caplog.text


def test_a_loss_that_rises_takes_the_run_back_to_where_it_began(
    train: Make, tiny_model: Any, dice: Any, loose: None, caplog: Any
) -> None:
    seen: list[Any] = []
    settings = {**SHORT, "train_dataset": dice, "lr_scheduler_type": "constant"}
    trainer = train(pulse=NAMED, **settings, callbacks=[spy(seen)])
    outcomes = calibrator_of(trainer).outcomes
    assert outcomes[0].learning_rate > 0.1
    assert outcomes[1].learning_rate == 1e-4
    assert outcomes[1].step == FIRST_EPISODE - 1
    assert "the loss rose in 20 steps, so the run went back" in caplog.text
    untouched = list(tiny_model().parameters())
    amid, back = seen[FIRST_EPISODE - 2], seen[FIRST_EPISODE - 1]
    assert not all(map(torch.equal, amid["parameters"], untouched))
    assert all(map(torch.equal, back["parameters"], untouched))
    assert back["state"] == 0
    assert back["lr"] == pytest.approx(1e-4, rel=1e-12)
    assert trainer.lr_scheduler.base_lrs[0] == pytest.approx(1e-4, rel=1e-12)
    losses = logged(trainer)
    assert max(losses[:FIRST_EPISODE]) > 1.2 * losses[0]
    assert max(losses[FIRST_EPISODE:]) < 1.1 * losses[0]


def test_ranks_go_back_alike(train: Make, dice: Any, loose: None) -> None:
    def body(rank: int) -> Any:
        trainer = train(pulse=NAMED, train_dataset=dice, **SHORT)
        assert trainer.args.world_size == 2
        return calibrator_of(trainer).outcomes, [p.sum().item() for p in trainer.model.parameters()]

    one, other = run_ranks(2, body)
    assert one == other
    assert len(one[0]) == 2
    assert one[0][1].reason is not None


def test_running_statistics_go_back_with_the_rest(train, monkeypatch):
    monkeypatch.setattr(loss_watch, "has_risen", lambda before, after: True)

    class Normalised(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2)

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            logits = self.head(self.norm(x))
            return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}

    torch.manual_seed(0)
    rows = [{"x": 3.0 + torch.randn(4), "labels": i % 2} for i in range(240)]
    seen = []

    def count(state: Any, model: Any, **kwargs: Any) -> None:
        seen.append(int(model.norm.num_batches_tracked))

    settings = {**SHORT, "model": Normalised(), "train_dataset": rows}
    trainer = train(pulse=NAMED, **settings, callbacks=[on("on_step_end", count)])
    assert len(calibrator_of(trainer).outcomes) == 2
    # Trials leave them alone, as forward passes move them; the net puts back its own start.
    assert seen[:FIRST_EPISODE] == [*range(1, FIRST_EPISODE), TRIAL_STEPS]


def test_an_exception_in_a_trial_leaves_nothing_behind(make_trainer: Make, tiny_model: Any) -> None:
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    calls = []

    def interrupt(*_: Any) -> None:
        calls.append(optimizer.param_groups[0]["lr"])
        if len(calls) == 3:
            raise KeyboardInterrupt

    optimizer.register_step_post_hook(interrupt)
    trainer = make_trainer(pulse=NAMED, model=model, max_steps=60, optimizers=(optimizer, None))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert len(set(calls)) == 3
    assert parameters_equal(model, tiny_model())
    assert not optimizer.state
    assert optimizer.param_groups[0]["lr"] == 1e-4
    assert not model._forward_pre_hooks
    assert not optimizer._optimizer_step_pre_hooks


def test_nothing_is_said_with_calibration_off(train, caplog):
    caplog.set_level(logging.INFO)
    trainer = train(pulse={"calibration": "off"}, max_steps=60)
    assert trainer.aees.calibrator is None
    assert not [r for r in caplog.records if "calibrat" in r.getMessage()]


@pytest.mark.parametrize("road", OURS)
def test_a_second_training_is_calibrated_from_the_lr_that_was_set(train: Make, road: str) -> None:
    trainer = train(road, NAMED, max_steps=60, learning_rate=1e-6)
    assert calibrator_of(trainer).outcome.learning_rate > 1e-5
    for _ in range(2):
        trainer.train()
        assert calibrator_of(trainer).search.trials
        assert calibrator_of(trainer).outcome.set_lr == pytest.approx(1e-6, rel=1e-12)
    # One that is set in between is kept.
    for group in trainer.optimizer.param_groups:
        group["lr"] = group["initial_lr"] = 2e-5
    trainer.lr_scheduler = None
    trainer.train()
    assert calibrator_of(trainer).outcome.set_lr == pytest.approx(2e-5)
