"""PulseOptTrainer as a user meets it: arguments, logs, repeated training, search, the seam."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    HfArgumentParser,
    Seq2SeqTrainer,
    Trainer,
    TrainingArguments,
)
from transformers.training_args import OptimizerNames

import pulseopt_hf
from pulseopt_hf import (
    PulseOptConfig,
    PulseOptSeq2SeqTrainer,
    PulseOptTrainer,
    PulseOptTrainingArguments,
    with_pulseopt,
)
from pulseopt_hf.report.record_reader import read_run
from tests.conftest import parameters_equal

PULSE = PulseOptConfig(lr_candidates=[0.5, 2.0], episode_length=4)


def test_knobs_in_the_training_arguments_are_the_config(
    trainer_of: Any, tiny_model: Any, tiny_data: Any, arguments: Any
) -> None:
    flat = arguments(PulseOptTrainingArguments, lr_candidates=[0.5, 2.0], episode_length=4)
    one = PulseOptTrainer(tiny_model(), flat, train_dataset=tiny_data)
    one.train()
    other = trainer_of(PULSE)
    other.train()
    assert one.aees.get_logs() == other.aees.get_logs()
    assert parameters_equal(one.model, other.model)


def test_knobs_are_read_from_a_command_line() -> None:
    line = "--output_dir x --lr_candidates 0.5 2 --episode_length 7 --context_mode trend --seed 3"
    (parsed,) = HfArgumentParser(PulseOptTrainingArguments).parse_args_into_dataclasses(
        line.split()
    )
    config = PulseOptConfig.of_knobs(parsed)
    assert config.lr_candidates == [0.5, 2.0]
    assert (config.episode_length, config.context_mode, parsed.seed) == (7, "trend", 3)
    assert isinstance(parsed, TrainingArguments)


def test_knobs_given_twice_or_of_the_wrong_kind_are_refused(
    tiny_model: Any, arguments: Any
) -> None:
    flat = arguments(PulseOptTrainingArguments, episode_length=4)
    with pytest.raises(ValueError, match="given twice"):
        PulseOptTrainer(tiny_model(), flat, pulse=PULSE)
    PulseOptTrainer(tiny_model(), arguments(PulseOptTrainingArguments), pulse=PULSE)
    with pytest.raises(TypeError, match="`pulse` must be a PulseOptConfig, got dict"):
        PulseOptTrainer(tiny_model(), arguments(), pulse={})
    with pytest.raises(ValueError, match="`ema_alpha` must be a number in"):
        arguments(PulseOptTrainingArguments, ema_alpha=2.0)


def test_logs_carry_the_pulse_values_and_the_effective_lr_that_was_used(trainer_of: Any) -> None:
    trainer = trainer_of(PULSE)
    used: list[float] = []
    trainer.create_optimizer()
    optimizer = trainer.optimizer
    # Registered when training begins, so after the hook that scales and before the step itself.
    step_pre_hook = PulseOptTrainer.optimizer_step

    def record_lr() -> None:
        handle = optimizer.register_step_pre_hook(
            lambda *_: used.append(optimizer.param_groups[0]["lr"])
        )
        step_pre_hook(trainer)
        handle.remove()

    trainer.optimizer_step = record_lr
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 24
    assert [entry["pulse/learning_rate"] for entry in entries] == used
    for index, entry in enumerate(entries):
        assert entry["pulse/learning_rate"] == entry["learning_rate"] * entry["pulse/lr_multiplier"]
        assert entry["pulse/episode"] == index // 4 + 1
        assert entry["pulse/noise_std"] == 0.0
        assert entry["pulse/skipped_steps"] == 0
        assert ("pulse/reward" in entry) == (index >= 3)
    rewards = trainer.aees.get_logs()["episode_rewards"]
    assert [entry["pulse/reward"] for entry in entries[3::4]] == rewards


def test_training_twice_starts_afresh_each_time(trainer_of: Any) -> None:
    trainer = trainer_of(PULSE)
    trainer.train()
    first = trainer.aees
    trainer.train()
    assert trainer.aees is not first
    assert len(trainer.aees.get_logs()["episode_rewards"]) == 6
    assert trainer.aees.get_logs()["episode_start_steps"][0] == 0
    assert first.get_logs()["episode_rewards"] != trainer.aees.get_logs()["episode_rewards"]


@pytest.mark.parametrize("road", ["subclass", "callback"])
def test_a_hyperparameter_search_has_a_fresh_controller_for_each_trial(
    tiny_model: Any, tiny_data: Any, arguments: Any, road: str
) -> None:
    args = arguments(
        PulseOptTrainingArguments,
        lr_candidates=[0.5, 2.0],
        episode_length=4,
        eval_strategy="steps",
        eval_steps=24,
    )
    common = {"train_dataset": tiny_data, "eval_dataset": tiny_data[:8], "model_init": tiny_model}
    trainer: Any = (PulseOptTrainer if road == "subclass" else Trainer)(args=args, **common)
    if road == "callback":
        pulseopt_hf.PulseOptCallback().attach(trainer)
    seen: list[Any] = []
    lengths = [3, 6]

    def space(trial: Any) -> dict[str, Any]:
        length = lengths[len(seen)]
        return {"episode_length": trial.suggest_int("episode_length", length, length)}

    def objective(metrics: dict[str, float]) -> float:
        seen.append(trainer.aees)
        return metrics["eval_loss"]

    trainer.hyperparameter_search(space, objective, n_trials=2, backend="optuna")
    assert [aees.episode_length for aees in seen] == lengths
    assert seen[0] is not seen[1]
    assert [len(aees.controller.records) for aees in seen] == [8, 4]
    folders = [Path(args.output_dir) / f"run-{number}" for number in (0, 1)]
    assert [len(read_run(folder).episodes) for folder in folders] == [8, 4]


def test_the_seam_can_be_overridden(trainer_of: Any) -> None:
    class Counting(PulseOptTrainer):
        steps = 0

        def optimizer_step(self) -> None:
            self.steps += 1
            super().optimizer_step()

    runs: list[Any] = []
    for cls in (Counting, PulseOptTrainer):
        runs.append(trainer_of(PULSE, cls=cls))
        runs[-1].train()
    assert runs[0].steps == 24
    assert parameters_equal(runs[0].model, runs[1].model)


def test_the_seam_outside_of_training_says_whose_it_is(tiny_model: Any, arguments: Any) -> None:
    with pytest.raises(RuntimeError, match="called by Trainer's loop"):
        PulseOptTrainer(tiny_model(), arguments()).optimizer_step()


def test_with_pulseopt_makes_a_subclass_of_any_trainer_once() -> None:
    class Own(Trainer):
        pass

    adapted = with_pulseopt(Own)
    assert issubclass(adapted, Own)
    assert adapted.__name__ == "PulseOptOwn"
    assert with_pulseopt(Own) is adapted
    assert issubclass(PulseOptSeq2SeqTrainer, Seq2SeqTrainer)
    with pytest.raises(TypeError, match="has AEES already"):
        with_pulseopt(adapted)
    with pytest.raises(TypeError, match="must be a subclass of Trainer"):
        with_pulseopt(dict)


def test_an_unset_episode_length_follows_from_the_run() -> None:
    config = PulseOptConfig(lr_candidates=[0.5, 1.0, 2.0])
    lengths = {steps: config.for_run(steps, 0).episode_length for steps in (3, 100, 600, 10_000)}
    assert lengths == {3: 3, 100: 5, 600: 20, 10_000: 100}


def test_an_episode_longer_than_the_run_is_refused(trainer_of: Any) -> None:
    config = PulseOptConfig.published(lr_candidates=[0.5, 2.0])
    trainer = trainer_of(config)
    with pytest.raises(ValueError, match=r"must be at most the 24 optimizer steps .* got 100"):
        trainer.train()


def test_fewer_episodes_than_arms_warn_once_with_the_number_to_set(trainer_of: Any) -> None:
    config = PulseOptConfig(lr_candidates=[0.5, 1.0, 2.0], episode_length=10)
    trainer = trainer_of(config)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    ours = [str(w.message) for w in caught if "episodes" in str(w.message)]
    assert len(ours) == 1
    assert "24 steps make 2 episodes" in ours[0]
    assert "Set `episode_length` to at most 8" in ours[0]


@pytest.mark.parametrize("optim", [OptimizerNames.LOMO, "galore_adamw_layerwise"])
def test_an_optimizer_without_a_step_is_refused(
    tiny_model: Any, arguments: Any, optim: Any
) -> None:
    with pytest.raises(ValueError, match="updates parameters during the backward pass"):
        PulseOptTrainer(tiny_model(), arguments(optim=optim, optim_target_modules=["attn"]))


@pytest.mark.parametrize("optim", ["schedule_free_adamw", "adamw_torch", "rmsprop"])
def test_other_optimizers_of_trainer_run(trainer_of: Any, optim: str) -> None:
    scheduler = "constant" if "schedule_free" in optim else "linear"
    trainer = trainer_of(PULSE, optim=optim, lr_scheduler_type=scheduler)
    trainer.train()
    logs = trainer.aees.get_logs()
    assert logs["episode_end_losses"][-1] < logs["episode_start_losses"][0]


def test_a_greedy_scheduler_moves_the_base_lr_only(trainer_of: Any, tiny_data: Any) -> None:
    trainer = trainer_of(
        PulseOptConfig(lr_candidates=[2.0], episode_length=4),
        lr_scheduler_type="greedy",
        eval_strategy="steps",
        eval_steps=4,
        eval_dataset=tiny_data[:8],
    )
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(
        entry["pulse/learning_rate"] == 2.0 * entry["learning_rate"] for entry in entries[:3]
    )
