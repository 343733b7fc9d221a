"""Calibration under a real Trainer."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback

from pulseopt_hf import PulseOptCallback, PulseOptConfig, PulseOptTrainer
from pulseopt_hf.aees import calibration
from pulseopt_hf.aees.calibration import TRUSTED
from pulseopt_hf.optim import calibrator as calibrators
from tests.conftest import VOCABULARY, history, parameters_equal
from tests.engines.ranks import run_ranks

TRIAL_STEPS = TRUSTED + 1  # one batch finds the order of magnitude
WATCHED = calibrators.SHORTEST_WATCH
FIRST_EPISODE = TRIAL_STEPS - 1 + WATCHED  # the last trial's batch is trained on
NAMED = PulseOptConfig(calibration="trust_region")
ARMS = PulseOptConfig(lr_candidates=[0.5, 1.0, 2.0], calibration="trust_region", episode_length=5)


def calibrator_of(trainer: Any) -> Any:
    callbacks = trainer.callback_handler.callbacks
    (ours,) = (callback for callback in callbacks if isinstance(callback, PulseOptCallback))
    assert ours.aees is not None
    return ours.aees.calibrator


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


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


class Spy(TrainerCallback):
    """Keeps what there is after each of the first steps."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_step_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        optimizer, scheduler = kwargs["optimizer"], kwargs["lr_scheduler"]
        inner = optimizer.optimizer
        self.seen.append(
            {
                "parameters": [p.detach().clone() for p in model.parameters()],
                "state": len(inner.state),
                "lr": inner.param_groups[0]["lr"],
                "initial_lr": inner.param_groups[0]["initial_lr"],
                "schedule": scheduler.last_epoch,
                "torch": torch.get_rng_state(),
                "python": random.getstate(),
                "numpy": np.random.get_state()[1].tolist(),
                "training": [module.training for module in model.modules()],
                "hooks": sum(len(module._forward_pre_hooks) for module in model.modules()),
            }
        )


def test_until_the_first_real_step_all_is_as_in_the_stock_trainer(
    tiny_model: Any, tiny_data: Any, arguments: Any
) -> None:
    """Parameters, optimizer, schedule and random states; the data draws from the latter."""
    spies = []
    for cls, kwargs in ((Trainer, {}), (PulseOptTrainer, {"pulse": NAMED})):
        args = arguments(max_steps=60, learning_rate=1e-4)
        trainer = cls(tiny_model(), args, train_dataset=tiny_data, **kwargs)
        spies.append(Spy())
        trainer.add_callback(spies[-1])
        trainer.train()
    stock, ours = (spy.seen[:TRIAL_STEPS] for spy in spies)
    untouched = list(tiny_model().parameters())
    for step, (theirs, mine) in enumerate(zip(stock, ours, strict=True)):
        for key in ("schedule", "python", "numpy", "training"):
            assert mine[key] == theirs[key], (step, key)
        assert torch.equal(mine["torch"], theirs["torch"])
        last = step == TRIAL_STEPS - 1
        assert all(map(torch.equal, mine["parameters"], untouched)) != last
        assert (mine["state"] > 0) == last
        assert (mine["lr"] == theirs["lr"]) != last
    assert ours[-1]["hooks"] == stock[-1]["hooks"] == 0


@pytest.mark.parametrize("road", ["subclass", "attached", "events"])
def test_what_is_found_is_the_base_lr_everywhere(trainer_of: Any, road: str, caplog: Any) -> None:
    trainer = trainer_of(NAMED, road, max_steps=60, learning_rate=1e-4, warmup_steps=10)
    trainer.train()
    outcome = calibrator_of(trainer).outcome
    found = outcome.learning_rate
    assert outcome.reason is None
    assert found > 10 * 1e-4
    assert trainer.lr_scheduler.base_lrs == pytest.approx([found] * 2)
    groups = trainer.optimizer.param_groups
    assert [group["initial_lr"] for group in groups] == pytest.approx([found] * 2)
    logged = [e["learning_rate"] for e in trainer.state.log_history if "loss" in e]
    assert logged[3] == pytest.approx(3e-5)  # of the schedule that was set, while it is tried out
    for step in range(TRIAL_STEPS, 60):
        share = min(step / 10, (60 - step) / 50)
        assert logged[step] == pytest.approx(found * share)
    said = [r.getMessage() for r in caplog.records if r.name.startswith("pulseopt_hf")]
    assert said == [str(outcome)]


def test_without_a_warm_up_the_lr_rises_to_what_was_found_and_the_log_says_so(
    trainer_of: Any,
) -> None:
    trainer = trainer_of(NAMED, max_steps=800, learning_rate=1e-4, lr_scheduler_type="constant")
    seen = []

    class Base(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(kwargs["optimizer"].param_groups[0]["lr"])
            control.should_training_stop = state.global_step == 60

    trainer.add_callback(Base())
    trainer.train()
    found = calibrator_of(trainer).outcome.learning_rate
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    first, ramp = TRIAL_STEPS - 1, 40  # a twentieth of the run
    for step in range(first, 60):
        share = min(1.0, (step - first + 1) / ramp)
        assert logs[step]["learning_rate"] == pytest.approx(found * share)
        assert logs[step]["pulse/learning_rate"] == pytest.approx(found * share)
        assert seen[step] == pytest.approx(found)  # schedulers only ever see the base LR


def test_all_roads_train_alike(trainer_of: Any) -> None:
    trainers = []
    for road in ("subclass", "attached", "events"):
        trainers.append(trainer_of(NAMED, road, max_steps=60, learning_rate=1e-4))
        trainers[-1].train()
    one, two, three = trainers
    assert parameters_equal(one.model, two.model)
    assert parameters_equal(one.model, three.model)
    assert calibrator_of(one).search.trials == calibrator_of(three).search.trials
    assert one.aees.get_logs() == two.aees.get_logs()


def test_episodes_follow_when_the_net_is_gone(trainer_of: Any) -> None:
    trainer = trainer_of(ARMS, max_steps=60)
    trainer.train()
    logs = trainer.aees.get_logs()
    assert logs["episode_start_steps"][0] == FIRST_EPISODE
    assert set(logs["selected_lr_values"]) == {0.5, 1.0, 2.0}
    assert trainer.aees.optimizer_steps == 60
    assert not calibrator_of(trainer)._origin.is_taken


@pytest.mark.parametrize("road", ["subclass", "attached", "events"])
@pytest.mark.parametrize("net", ["holds nothing", "catches"])
def test_a_resumed_run_ends_as_the_uninterrupted_one(
    trainer_of: Any, dice: Any, road: str, net: str, request: Any
) -> None:
    """Amid the trials, while the net hangs, and after."""
    if net == "catches":
        request.getfixturevalue("loose")
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 50, "learning_rate": 1e-4}
    whole = trainer_of(NAMED, road, train_dataset=dice, **settings)
    whole.train()
    assert (calibrator_of(whole).outcome.reason is not None) == (net == "catches")
    steps = range(1, FIRST_EPISODE + 3) if road == "subclass" else (3, TRIAL_STEPS + 4)
    for step in steps:
        folder = Path(whole.args.output_dir) / f"checkpoint-{step}"
        files = {file.name for file in folder.glob("pulse_*")}
        expected = "pulse_calls_0.safetensors" if step < TRIAL_STEPS else ""
        if TRIAL_STEPS <= step < FIRST_EPISODE:
            expected = "pulse_origin_0.safetensors"
        assert files == ({expected} if expected else set()), step
        if step % 4 and step not in (1, TRIAL_STEPS, FIRST_EPISODE):
            continue
        resumed = trainer_of(NAMED, road, train_dataset=dice, **settings | {"max_steps": 50})
        if road == "events":  # no event says what is resumed but the run's own folder
            resumed.args.output_dir = whole.args.output_dir
            resumed.args.save_strategy = "no"
        resumed.train(resume_from_checkpoint=str(folder))
        assert parameters_equal(resumed.model, whole.model), step
        assert calibrator_of(resumed).search.trials == calibrator_of(whole).search.trials
        assert calibrator_of(resumed).outcomes == calibrator_of(whole).outcomes
        assert losses(resumed) == losses(whole)
        if road != "events":
            assert history(resumed)[:-1] == history(whole)[:-1]


def test_a_plain_trainer_goes_on_at_the_calibrated_lr(trainer_of: Any) -> None:
    settings = {"save_strategy": "steps", "save_steps": 30, "max_steps": 60, "learning_rate": 1e-4}
    ours = trainer_of(NAMED, **settings)
    ours.train()
    plain = trainer_of(road="stock", **settings)
    plain.train(resume_from_checkpoint=str(Path(ours.args.output_dir) / "checkpoint-30"))
    rates = [
        [e["learning_rate"] for e in trainer.state.log_history if "loss" in e]
        for trainer in (plain, ours)
    ]
    assert rates[0] == rates[1]
    assert rates[0][40] > 1e-3 / 3
    assert parameters_equal(plain.model, ours.model)


def test_a_run_that_was_not_calibrated_is_not_when_it_is_resumed(trainer_of: Any) -> None:
    settings = {"save_strategy": "steps", "save_steps": 10}
    short = trainer_of(max_steps=20, **settings)
    short.train()
    longer = trainer_of(max_steps=60)
    longer.train(resume_from_checkpoint=str(Path(short.args.output_dir) / "checkpoint-10"))
    assert longer.aees is not None
    assert longer.aees.calibrator is None


def adamw(**kwargs: Any) -> Callable[[Any, float], torch.optim.Optimizer]:
    return lambda parameters, lr: torch.optim.AdamW(parameters, lr=lr, **kwargs)


def schedule_free(name: str) -> Callable[[Any, float], torch.optim.Optimizer]:
    def make_one(parameters: Any, lr: float) -> Any:
        schedulefree = pytest.importorskip("schedulefree", reason="install the extra `peers`")
        return getattr(schedulefree, name)(parameters, lr=lr)

    return make_one


def adafactor(parameters: Any, lr: float) -> Any:
    from transformers import Adafactor

    return Adafactor(parameters, lr=lr, relative_step=False, scale_parameter=False)


OPTIMIZERS: dict[str, Callable[[Any, float], Any]] = {
    "adamw": adamw(foreach=False),
    "adamw foreach": adamw(foreach=True),
    "adamw fused": adamw(fused=True),
    "sgd": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr),
    "momentum": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, momentum=0.9),
    "adafactor": adafactor,
    "rmsprop": lambda parameters, lr: torch.optim.RMSprop(parameters, lr=lr),
    "schedule-free adamw": schedule_free("AdamWScheduleFree"),
    "schedule-free sgd": schedule_free("SGDScheduleFree"),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_found_does_not_depend_on_the_lr_that_was_set(
    trainer_of: Any, name: str, tiny_model: Any
) -> None:
    found = []
    for learning_rate in (1e-7, 1e-3, 1.0):
        model = tiny_model()
        optimizer = OPTIMIZERS[name](model.parameters(), learning_rate)
        trainer = trainer_of(model=model, max_steps=60, optimizers=(optimizer, None))
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


@pytest.mark.parametrize("loader", ["stream", "spawn", "fork"])
def test_whatever_the_data_comes_from(trainer_of: Any, tiny_data: Any, loader: str) -> None:
    extra: dict[str, Any] = {}
    if loader != "stream":
        extra = {"dataloader_num_workers": 2, "dataloader_multiprocessing_context": loader}
    data = Stream(tiny_data) if loader == "stream" else tiny_data
    trainer = trainer_of(NAMED, train_dataset=data, max_steps=60, learning_rate=1e-4, **extra)
    trainer.train()
    assert calibrator_of(trainer).outcome.reason is None
    assert losses(trainer)[-1] < 0.9 * losses(trainer)[0]


def said(caplog: pytest.LogCaptureFixture) -> str:
    messages = [r.getMessage() for r in caplog.records if r.name.startswith("pulseopt_hf")]
    assert len(messages) == 1, messages
    return messages[0]


def test_an_optimizer_that_finds_its_own_lr_is_left_alone(
    trainer_of: Any, tiny_model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    import prodigyopt

    model = tiny_model()
    prodigy = prodigyopt.Prodigy(model.parameters(), lr=1.0)
    trainer = trainer_of(
        model=model, max_steps=60, lr_scheduler_type="constant", optimizers=(prodigy, None)
    )
    trainer.train()
    assert "not calibrated: Prodigy finds its own" in said(caplog)
    assert trainer.aees is not None
    assert trainer.aees.calibrator is None
    assert trainer.aees.learning_rate == 1.0


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"max_steps": 49}, "49 steps are too few, 50 are needed"),
        ({"max_steps": 60, "learning_rate": 0.0}, "it is zero"),
    ],
)
def test_where_it_cannot_be_done_the_log_says_why(
    trainer_of: Any, settings: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = trainer_of(**settings)
    trainer.train()
    assert f"not calibrated: {reason}" in said(caplog)
    assert trainer.aees is not None
    assert trainer.aees.calibrator is None


def test_a_search_over_the_lr_tries_the_lrs_that_it_names(
    tiny_model: Any, tiny_data: Any, arguments: Any, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("optuna", reason="install the extra `dev` to run this")
    used = []

    class Used(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.state = state

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            used.append((args.learning_rate, max(kwargs["lr_scheduler"].base_lrs)))

    trainer = PulseOptTrainer(
        args=arguments(max_steps=60),
        model_init=tiny_model,
        train_dataset=tiny_data,
        eval_dataset=tiny_data[:8],
        callbacks=[Used],
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
    trainer_of: Any, tiny_model: Any, dice: Any, loose: None, caplog: Any
) -> None:
    trainer = trainer_of(
        NAMED, train_dataset=dice, max_steps=60, learning_rate=1e-4, lr_scheduler_type="constant"
    )
    spy = Spy()
    trainer.add_callback(spy)
    trainer.train()
    outcomes = calibrator_of(trainer).outcomes
    assert outcomes[0].learning_rate > 0.1
    assert outcomes[1].learning_rate == 1e-4
    assert outcomes[1].step == FIRST_EPISODE - 1
    assert "the loss rose in 20 steps, so the run went back" in caplog.text
    untouched = list(tiny_model().parameters())
    amid, back = spy.seen[FIRST_EPISODE - 2], spy.seen[FIRST_EPISODE - 1]
    assert not all(map(torch.equal, amid["parameters"], untouched))
    assert all(map(torch.equal, back["parameters"], untouched))
    assert back["state"] == 0
    assert back["lr"] == pytest.approx(1e-4, rel=1e-12)
    assert trainer.lr_scheduler.base_lrs[0] == pytest.approx(1e-4, rel=1e-12)
    start = losses(trainer)[0]
    assert max(losses(trainer)[:FIRST_EPISODE]) > 1.2 * start
    assert max(losses(trainer)[FIRST_EPISODE:]) < 1.1 * start


def test_ranks_go_back_alike(trainer_of: Any, dice: Any, loose: None) -> None:
    def body(rank: int) -> Any:
        trainer = trainer_of(NAMED, train_dataset=dice, max_steps=60, learning_rate=1e-4)
        trainer.train()
        assert trainer.args.world_size == 2
        return calibrator_of(trainer).outcomes, [p.sum().item() for p in trainer.model.parameters()]

    one, other = run_ranks(2, body)
    assert one == other
    assert len(one[0]) == 2
    assert one[0][1].reason is not None


def test_running_statistics_go_back_with_the_rest(
    trainer_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrators, "has_risen", lambda before, after: True)

    class Normalised(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2)

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            logits = self.head(self.norm(x))
            return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}

    torch.manual_seed(0)
    rows = [{"x": 3.0 + torch.randn(4), "labels": i % 2} for i in range(240)]
    trainer = trainer_of(
        NAMED, model=Normalised(), train_dataset=rows, max_steps=60, learning_rate=1e-4
    )
    seen = []

    class Batches(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
            seen.append(int(model.norm.num_batches_tracked))

    trainer.add_callback(Batches())
    trainer.train()
    assert len(calibrator_of(trainer).outcomes) == 2
    # Trials leave them alone, as forward passes move them; the net puts back its own start.
    assert seen[:FIRST_EPISODE] == [*range(1, FIRST_EPISODE), TRIAL_STEPS]


def test_an_exception_in_a_trial_leaves_nothing_behind(trainer_of: Any, tiny_model: Any) -> None:
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    calls = []

    def interrupt(*_: Any) -> None:
        calls.append(optimizer.param_groups[0]["lr"])
        if len(calls) == 3:
            raise KeyboardInterrupt

    optimizer.register_step_post_hook(interrupt)
    trainer = trainer_of(NAMED, model=model, max_steps=60, optimizers=(optimizer, None))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert len(set(calls)) == 3
    assert parameters_equal(model, tiny_model())
    assert not optimizer.state
    assert optimizer.param_groups[0]["lr"] == 1e-4
    assert not model._forward_pre_hooks
    assert not optimizer._optimizer_step_pre_hooks


def test_nothing_is_said_with_calibration_off(
    trainer_of: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    off = PulseOptConfig(calibration="off")
    trainer = trainer_of(off, max_steps=60)
    trainer.train()
    assert trainer.aees.calibrator is None
    assert not [r for r in caplog.records if "calibrat" in r.getMessage()]
