"""A run that is resumed from a checkpoint ends as if it had never stopped, bit for bit."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pulseopt_hf import PulseOptConfig, newest_whole_checkpoint
from pulseopt_hf.aees import StateError
from pulseopt_hf.optim.divergence import ROLLED_BACK
from tests.conftest import ARMS, Make, checkpoint, history, parameters_equal, raise_at

KNOBS: dict[str, Any] = {**ARMS, "episode_length": 3}
MODES: dict[str, dict[str, Any]] = {
    "published": {},
    "conditional in context": {"context_mode": "trend", "structured_control_mode": "conditional"},
    "random, relative noise": {"control_mode": "random", "noise_mode": "relative"},
    "update norms": {"log_update_norm": True},
    "a deadly arm, undone": {
        **{"lr_candidates": [1.0, 300.0], "noise_candidates": [0.0], "episode_length": 6},
        **{"divergence": "rollback", "divergence_factor": 1.1},
    },
}


OURS = ("subclass", "attached")


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
@pytest.mark.parametrize("road", OURS)
def test_from_every_step_of_an_episode(train: Make, road: str, mode: str) -> None:
    """Eighteen steps are six episodes and two epochs, of nine steps each."""
    pulse, settings = {**KNOBS, **MODES[mode]}, {"max_steps": 18, "gradient_accumulation_steps": 2}
    run = partial(train, road, pulse, **settings)
    whole = run(save_steps=1)
    if mode == "a deadly arm, undone":
        assert ROLLED_BACK in whole.aees.get_logs()["episode_outcomes"]
    for step in (1, 2, 3, 4, 9, 10, 17):
        assert_same_end(run(resume=checkpoint(whole, step)), whole)


@pytest.mark.parametrize("eval_strategy", ["no", "epoch"])
def test_from_the_last_step_no_other_is_taken(train: Make, eval_strategy: str) -> None:
    """Step 17 is amid the second epoch, of nine steps; Trainer evaluates where it breaks off."""
    run = partial(
        train,
        pulse={**KNOBS, "episode_length": 2},
        **{"gradient_accumulation_steps": 2, "max_steps": 17, "eval_strategy": eval_strategy},
        save_steps=1,
    )
    whole = run()
    evaluated = [entry["step"] for entry in whole.state.log_history if "eval_loss" in entry]
    assert evaluated == ([] if eval_strategy == "no" else [9, 17])
    resumed = run(resume=checkpoint(whole, 17))
    assert resumed.state.global_step == 17
    assert_same_end(resumed, whole)


@pytest.mark.parametrize("road", OURS)
def test_where_trainer_rebuilds_its_callbacks_from_the_checkpoint(train: Make, road: str) -> None:
    settings = {"save_steps": 6, "restore_callback_states_from_checkpoint": True}
    whole = train(road, KNOBS, **settings)
    resumed = train(road, KNOBS, resume=checkpoint(whole, 6), **settings)
    assert_same_end(resumed, whole)
    resumed.train()  # a fresh run afterwards, through the instance that Trainer made
    assert resumed.aees.get_logs()["episode_start_steps"][0] == 0


def test_a_subclass_resumes_what_a_callback_saved(train: Make) -> None:
    whole = train("attached", KNOBS, save_steps=6)
    assert_same_end(train(pulse=KNOBS, resume=checkpoint(whole, 6), save_steps=6), whole)


def test_other_settings_are_refused_naming_both_values(train: Make) -> None:
    whole = train(pulse=KNOBS, save_steps=6)
    other = {**KNOBS, "lr_candidates": [0.5, 4.0], "episode_length": 2}
    with pytest.raises(StateError) as error:
        train(pulse=other, resume=checkpoint(whole, 6))
    assert "`lr_candidates` was [0.5, 1.0, 2.0] and is now [0.5, 4.0]" in str(error.value)
    assert "`episode_length` was 3 and is now 2" in str(error.value)


def test_a_longer_run_keeps_the_episode_length_that_followed_from_the_shorter(train: Make) -> None:
    config = PulseOptConfig(lr_candidates=[0.5, 2.0])
    short = train(pulse=config, max_steps=120, save_steps=120)
    assert config.for_run(160, 0).episode_length == 8
    longer = train(pulse=config, max_steps=160, resume=checkpoint(short, 120))
    assert longer.aees.episode_length == short.aees.episode_length == 6


def test_the_checkpoint_of_a_plain_trainer_is_resumed_with_bandits_that_start_afresh(train, caplog):
    plain = train("stock", save_steps=6)
    resumed = train(pulse=KNOBS, resume=checkpoint(plain, 6))
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
def test_with_trainers_own_settings(train: Make, tmp_path: Path, settings: dict[str, Any]) -> None:
    """Broken off at step 9 by its user, a run goes on from the newest checkpoint, of step 8."""
    settings = {**settings, "save_steps": 4, "max_steps": 18}
    whole = train(pulse=KNOBS, **settings)
    folder = tmp_path / "broken off"
    settings["output_dir"] = str(folder)
    with pytest.raises(KeyboardInterrupt):
        train(pulse=KNOBS, callbacks=[raise_at(9)], **settings)
    assert newest_whole_checkpoint(folder) == (folder / "checkpoint-8", [])
    assert_same_end(train(pulse=KNOBS, resume=True, **settings), whole)


def test_with_another_accumulation_the_arms_go_on(train: Make) -> None:
    """An episode counts optimizer steps, so its state means the same."""
    whole = train(pulse=KNOBS, max_steps=18, save_steps=7)
    other = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    resumed = train(pulse=KNOBS, max_steps=18, resume=checkpoint(whole, 7), **other)
    ours, theirs = resumed.aees.get_logs(), whole.aees.get_logs()
    assert ours["episode_start_steps"] == theirs["episode_start_steps"]
    assert ours["episode_rewards"][:2] == theirs["episode_rewards"][:2]


def test_from_the_last_step_of_an_epoch_that_is_evaluated_at_its_end(train: Make) -> None:
    """The checkpoint waits for the evaluation, which a resumed run would leave out."""
    run = partial(
        train,
        pulse=KNOBS,
        **{"gradient_accumulation_steps": 2, "max_steps": 24, "eval_strategy": "epoch"},
        save_steps=9,
    )
    whole = run()
    names = sorted(folder.name for folder in Path(whole.args.output_dir).glob("checkpoint-*"))
    assert names == ["checkpoint-18", "checkpoint-24", "checkpoint-9"]
    for step in (9, 18):
        assert_same_end(run(resume=checkpoint(whole, step)), whole)
