"""PulseOptTrainer as a user meets it: arguments, logs, repeated training, search, the seam."""

from pathlib import Path
from typing import Any

import pytest
from transformers import HfArgumentParser, Seq2SeqTrainer, Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from pulseopt_hf import (
    PulseOptConfig,
    PulseOptSeq2SeqTrainer,
    PulseOptTrainer,
    PulseOptTrainingArguments,
    with_pulseopt,
)
from pulseopt_hf.report.record_reader import read_run
from tests.conftest import Make, logged, parameters_equal

PULSE = PulseOptConfig(lr_candidates=[0.5, 2.0], episode_length=4)


def test_knobs_in_the_training_arguments_are_the_config(train: Make, arguments: Any) -> None:
    flat = arguments(PulseOptTrainingArguments, lr_candidates=[0.5, 2.0], episode_length=4)
    one = train(args=flat)
    other = train(pulse=PULSE)
    assert one.aees.get_logs() == other.aees.get_logs()
    assert parameters_equal(one.model, other.model)


def test_knobs_are_read_from_a_command_line() -> None:
    line = "--output_dir x --lr_candidates 0.5 2 --episode_length 7 --context_mode trend --seed 3"
    parser = HfArgumentParser(PulseOptTrainingArguments)
    (parsed,) = parser.parse_args_into_dataclasses(line.split())
    config = PulseOptConfig.of_knobs(parsed)
    assert config.lr_candidates == [0.5, 2.0]
    assert (config.episode_length, config.context_mode, parsed.seed) == (7, "trend", 3)
    assert isinstance(parsed, TrainingArguments)


def test_knobs_given_twice_or_of_the_wrong_kind_are_refused(tiny_model, arguments):
    flat = arguments(PulseOptTrainingArguments, episode_length=4)
    with pytest.raises(ValueError, match="given twice"):
        PulseOptTrainer(tiny_model(), flat, pulse=PULSE)
    PulseOptTrainer(tiny_model(), arguments(PulseOptTrainingArguments), pulse=PULSE)
    with pytest.raises(TypeError, match="`pulse` must be a PulseOptConfig, got dict"):
        PulseOptTrainer(tiny_model(), arguments(), pulse={})
    with pytest.raises(ValueError, match="`ema_alpha` must be a number in"):
        arguments(PulseOptTrainingArguments, ema_alpha=2.0)


def test_training_twice_starts_afresh_each_time(train: Make) -> None:
    trainer = train(pulse=PULSE)
    first = trainer.aees
    trainer.train()
    assert trainer.aees is not first
    assert len(trainer.aees.get_logs()["episode_rewards"]) == 6
    assert trainer.aees.get_logs()["episode_start_steps"][0] == 0
    assert first.get_logs()["episode_rewards"] != trainer.aees.get_logs()["episode_rewards"]


@pytest.mark.parametrize("road", ["subclass", "attached"])
def test_a_hyperparameter_search_has_a_fresh_controller_for_each_trial(
    make_trainer: Make, tiny_model: Any, arguments: Any, road: str
) -> None:
    knobs = {"lr_candidates": [0.5, 2.0], "episode_length": 4}
    args = arguments(PulseOptTrainingArguments, eval_strategy="steps", eval_steps=24, **knobs)
    trainer = make_trainer(road, args=args, model=None, model_init=tiny_model)
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


def test_the_seam_can_be_overridden(train: Make) -> None:
    class Counting(PulseOptTrainer):
        steps = 0

        def optimizer_step(self) -> None:
            self.steps += 1
            super().optimizer_step()

    counting, plain = train(Counting, PULSE), train(pulse=PULSE)
    assert counting.steps == 24
    assert parameters_equal(counting.model, plain.model)


def test_the_seam_outside_of_training_says_whose_it_is(make_trainer: Make) -> None:
    with pytest.raises(RuntimeError, match="called by Trainer's loop"):
        make_trainer().optimizer_step()


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


def test_an_episode_longer_than_the_run_is_refused(train: Make) -> None:
    with pytest.raises(ValueError, match=r"must be at most the 24 optimizer steps .* got 100"):
        train(pulse=PulseOptConfig.published(lr_candidates=[0.5, 2.0]))


def test_fewer_episodes_than_arms_warn_once_with_the_number_to_set(train: Make) -> None:
    with pytest.warns(UserWarning, match="24 steps make 2 episodes") as caught:
        train(pulse={"lr_candidates": [0.5, 1.0, 2.0], "episode_length": 10})
    (ours,) = [str(w.message) for w in caught if "episodes" in str(w.message)]
    assert "Set `episode_length` to at most 8" in ours


@pytest.mark.parametrize("optim", [OptimizerNames.LOMO, "galore_adamw_layerwise"])
def test_an_optimizer_without_a_step_is_refused(make_trainer: Make, optim: Any) -> None:
    with pytest.raises(ValueError, match="updates parameters during the backward pass"):
        make_trainer(optim=optim, optim_target_modules=["attn"])


@pytest.mark.parametrize("optim", ["schedule_free_adamw", "adamw_torch", "rmsprop"])
def test_other_optimizers_of_trainer_run(train: Make, optim: str) -> None:
    scheduler = "constant" if "schedule_free" in optim else "linear"
    trainer = train(pulse=PULSE, optim=optim, lr_scheduler_type=scheduler)
    logs = trainer.aees.get_logs()
    assert logs["episode_end_losses"][-1] < logs["episode_start_losses"][0]


def test_a_greedy_scheduler_moves_the_base_lr_only(train: Make) -> None:
    settings = {"lr_scheduler_type": "greedy", "eval_strategy": "steps", "eval_steps": 4}
    trainer = train(pulse={"lr_candidates": [2.0], "episode_length": 4}, **settings)
    used, base = logged(trainer, "pulse/learning_rate"), logged(trainer, "learning_rate")
    assert used[:3] == [2.0 * rate for rate in base[:3]]
