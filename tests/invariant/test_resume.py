"""A run that is resumed from a checkpoint ends as if it had never stopped, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer, TrainerCallback

from pulseopt_hf import (
    PulseOptCallback,
    PulseOptConfig,
    PulseOptTrainer,
    newest_whole_checkpoint,
)
from pulseopt_hf.aees import StateError
from pulseopt_hf.optim.divergence import ROLLED_BACK
from tests.conftest import history, parameters_equal

KNOBS: dict[str, Any] = {
    "lr_candidates": [0.5, 1.0, 2.0],
    "noise_candidates": [0.0, 0.01],
    "episode_length": 3,
}
MODES: dict[str, dict[str, Any]] = {
    "published": {},
    "conditional in context": {
        "context_mode": "trend",
        "structured_control_mode": "conditional",
    },
    "random, relative noise": {"control_mode": "random", "noise_mode": "relative"},
    "a deadly arm, undone": {
        "lr_candidates": [1.0, 300.0],
        "noise_candidates": [0.0],
        "episode_length": 6,
        "divergence": "rollback",
        "divergence_factor": 1.1,
    },
}


def make_trainer(road: str, model: Any, args: Any, data: Any, config: PulseOptConfig) -> Any:
    if road == "subclass":
        return PulseOptTrainer(model, args, train_dataset=data, pulse=config)
    trainer = Trainer(model, args, train_dataset=data)
    PulseOptCallback(config).attach(trainer)
    return trainer


def checkpoint(trainer: Trainer, step: int) -> str:
    return str(Path(trainer.args.output_dir) / f"checkpoint-{step}")


def assert_same_end(resumed: Any, whole: Any) -> None:
    assert resumed.aees.get_logs() == whole.aees.get_logs()
    assert resumed.aees.state_dict() == whole.aees.state_dict()
    assert parameters_equal(resumed.model, whole.model)
    ours, theirs = resumed.optimizer.state_dict(), whole.optimizer.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    for key, moments in theirs["state"].items():
        for name, moment in moments.items():
            assert moment.equal(ours["state"][key][name])
    # The last entry sums up the part of the run that this process ran.
    assert history(resumed)[:-1] == history(whole)[:-1]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("road", ["subclass", "callback"])
def test_from_every_step_of_an_episode(
    tiny_model: Any, tiny_data: Any, arguments: Any, road: str, mode: str
) -> None:
    """Eighteen steps are six episodes and two epochs, of nine steps each."""
    config = PulseOptConfig(**{**KNOBS, **MODES[mode]})
    settings = {
        "gradient_accumulation_steps": 2,
        "max_steps": 18,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    whole = make_trainer(road, tiny_model(), arguments(**settings), tiny_data, config)
    whole.train()
    if config.divergence != "off":
        assert ROLLED_BACK in whole.aees.get_logs()["episode_outcomes"]
    for step in (1, 2, 3, 4, 9, 10, 17):
        args = arguments(**{**settings, "save_strategy": "no"})
        resumed = make_trainer(road, tiny_model(), args, tiny_data, config)
        resumed.train(resume_from_checkpoint=checkpoint(whole, step))
        assert_same_end(resumed, whole)


@pytest.mark.parametrize("eval_strategy", ["no", "epoch"])
def test_from_the_last_step_no_other_is_taken(
    tiny_model: Any, tiny_data: Any, arguments: Any, eval_strategy: str
) -> None:
    """Step 17 is amid the second epoch, of nine steps; Trainer evaluates where it breaks off."""
    config = PulseOptConfig(**{**KNOBS, "episode_length": 2})
    settings = {
        "gradient_accumulation_steps": 2,
        "max_steps": 17,
        "save_strategy": "steps",
        "save_steps": 1,
        "eval_strategy": eval_strategy,
    }

    def make() -> PulseOptTrainer:
        data = {"train_dataset": tiny_data, "eval_dataset": tiny_data[:8]}
        return PulseOptTrainer(tiny_model(), arguments(**settings), pulse=config, **data)

    whole, resumed = make(), make()
    whole.train()
    evaluated = [entry["step"] for entry in whole.state.log_history if "eval_loss" in entry]
    assert evaluated == ([] if eval_strategy == "no" else [9, 17])
    resumed.train(resume_from_checkpoint=checkpoint(whole, 17))
    assert resumed.state.global_step == 17
    assert_same_end(resumed, whole)


def test_where_trainer_rebuilds_its_callbacks_from_the_checkpoint(
    tiny_model: Any, tiny_data: Any, arguments: Any
) -> None:
    config = PulseOptConfig(**KNOBS)
    settings = {
        "save_strategy": "steps",
        "save_steps": 6,
        "restore_callback_states_from_checkpoint": True,
    }
    for road in ("subclass", "callback"):
        whole = make_trainer(road, tiny_model(), arguments(**settings), tiny_data, config)
        whole.train()
        resumed = make_trainer(road, tiny_model(), arguments(**settings), tiny_data, config)
        resumed.train(resume_from_checkpoint=checkpoint(whole, 6))
        assert_same_end(resumed, whole)
        resumed.train()  # a fresh run afterwards, through the instance that Trainer made
        assert resumed.aees.get_logs()["episode_start_steps"][0] == 0


def test_a_subclass_resumes_what_a_callback_saved(
    tiny_model: Any, tiny_data: Any, arguments: Any
) -> None:
    config = PulseOptConfig(**KNOBS)
    settings = {"save_strategy": "steps", "save_steps": 6}
    whole = make_trainer("callback", tiny_model(), arguments(**settings), tiny_data, config)
    whole.train()
    resumed = make_trainer("subclass", tiny_model(), arguments(**settings), tiny_data, config)
    resumed.train(resume_from_checkpoint=checkpoint(whole, 6))
    assert_same_end(resumed, whole)


def test_other_settings_are_refused_naming_both_values(
    tiny_model: Any, tiny_data: Any, arguments: Any
) -> None:
    settings = {"save_strategy": "steps", "save_steps": 6}
    whole = make_trainer(
        "subclass", tiny_model(), arguments(**settings), tiny_data, PulseOptConfig(**KNOBS)
    )
    whole.train()
    other = PulseOptConfig(**{**KNOBS, "lr_candidates": [0.5, 4.0], "episode_length": 2})
    resumed = make_trainer("subclass", tiny_model(), arguments(**settings), tiny_data, other)
    with pytest.raises(StateError) as error:
        resumed.train(resume_from_checkpoint=checkpoint(whole, 6))
    assert "`lr_candidates` was [0.5, 1.0, 2.0] and is now [0.5, 4.0]" in str(error.value)
    assert "`episode_length` was 3 and is now 2" in str(error.value)


def test_a_longer_run_keeps_the_episode_length_that_followed_from_the_shorter(
    tiny_model: Any, tiny_data: Any, arguments: Any
) -> None:
    config = PulseOptConfig(lr_candidates=[0.5, 2.0])
    settings = {"save_strategy": "steps", "save_steps": 120}
    short = make_trainer(
        "subclass", tiny_model(), arguments(max_steps=120, **settings), tiny_data, config
    )
    short.train()
    longer = make_trainer(
        "subclass", tiny_model(), arguments(max_steps=160, **settings), tiny_data, config
    )
    assert config.for_run(160, 0).episode_length == 8
    longer.train(resume_from_checkpoint=checkpoint(short, 120))
    assert longer.aees.episode_length == short.aees.episode_length == 6


def test_the_checkpoint_of_a_plain_trainer_is_resumed_with_bandits_that_start_afresh(
    tiny_model: Any, tiny_data: Any, arguments: Any, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"save_strategy": "steps", "save_steps": 6}
    plain = Trainer(tiny_model(), arguments(**settings), train_dataset=tiny_data)
    plain.train()
    resumed = make_trainer(
        "subclass", tiny_model(), arguments(**settings), tiny_data, PulseOptConfig(**KNOBS)
    )
    resumed.train(resume_from_checkpoint=checkpoint(plain, 6))
    assert "saved without pulseopt_hf" in caplog.text
    assert resumed.aees.get_logs()["episode_start_steps"][0] == 6


@pytest.mark.parametrize(
    "settings",
    [
        {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 4},
        {"save_total_limit": 1},
        {"dataloader_num_workers": 2},
        {"gradient_accumulation_steps": 3},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_with_trainers_own_settings(
    tiny_model: Any, tiny_data: Any, arguments: Any, settings: dict[str, Any]
) -> None:
    """Broken off at step 9 by its user, a run goes on from the newest checkpoint, of step 8."""
    config = PulseOptConfig(**KNOBS)
    settings = {**settings, "save_strategy": "steps", "save_steps": 4, "max_steps": 18}

    def make(args: Any) -> PulseOptTrainer:
        return PulseOptTrainer(
            tiny_model(), args, train_dataset=tiny_data, eval_dataset=tiny_data[:8], pulse=config
        )

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 9:
                raise KeyboardInterrupt

    whole = make(arguments(**settings))
    whole.train()
    args = arguments(**settings)
    broken_off = make(args)
    broken_off.add_callback(Stop())
    with pytest.raises(KeyboardInterrupt):
        broken_off.train()
    found, passed_over = newest_whole_checkpoint(args.output_dir)
    assert found is not None
    assert found.name == "checkpoint-8"
    assert not passed_over
    resumed = make(args)
    resumed.train(resume_from_checkpoint=True)
    assert_same_end(resumed, whole)


def test_with_another_accumulation_the_arms_go_on(
    tiny_model: Any, tiny_data: Any, arguments: Any
) -> None:
    """An episode counts optimizer steps, so its state means the same."""
    config = PulseOptConfig(**KNOBS)
    settings = {"save_strategy": "steps", "save_steps": 7, "max_steps": 18}
    whole = make_trainer("subclass", tiny_model(), arguments(**settings), tiny_data, config)
    whole.train()
    args = arguments(max_steps=18, gradient_accumulation_steps=2, per_device_train_batch_size=2)
    resumed = make_trainer("subclass", tiny_model(), args, tiny_data, config)
    resumed.train(resume_from_checkpoint=checkpoint(whole, 7))
    ours, theirs = resumed.aees.get_logs(), whole.aees.get_logs()
    assert ours["episode_start_steps"] == theirs["episode_start_steps"]
    assert ours["episode_rewards"][:2] == theirs["episode_rewards"][:2]


def test_from_the_last_step_of_an_epoch_that_is_evaluated_at_its_end(
    tiny_model: Any, tiny_data: Any, arguments: Any
) -> None:
    """The checkpoint waits for the evaluation, which a resumed run would leave out."""
    config = PulseOptConfig(**KNOBS)
    settings = {
        "eval_strategy": "epoch",
        "save_strategy": "steps",
        "save_steps": 9,
        "gradient_accumulation_steps": 2,
        "max_steps": 24,
    }

    def make() -> PulseOptTrainer:
        return PulseOptTrainer(
            tiny_model(),
            arguments(**settings),
            train_dataset=tiny_data,
            eval_dataset=tiny_data[:8],
            pulse=config,
        )

    whole = make()
    whole.train()
    names = sorted(folder.name for folder in Path(whole.args.output_dir).glob("checkpoint-*"))
    assert names == ["checkpoint-18", "checkpoint-24", "checkpoint-9"]
    for step in (9, 18):
        resumed = make()
        resumed.train(resume_from_checkpoint=checkpoint(whole, step))
        assert_same_end(resumed, whole)
