"""Default, YAML, command line: what wins, and what is said of mistakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pulseopt_hf.errors import UsageError
from pulseopt_hf.recipes.parsing import RecipeParser, Resolved, resolve, to_yaml_values

BASE = "task: text-classification\nmodel_name_or_path: some/model\n"


def resolved(tmp_path: Path, text: str, *options: str) -> Resolved:
    path = tmp_path / "mine.yaml"
    path.write_text(BASE + text)
    return resolve(str(path), list(options))


def problems(tmp_path: Path, text: str, *options: str) -> list[str]:
    with pytest.raises(UsageError) as error:
        resolved(tmp_path, text, *options)
    return list(error.value.problems)


def test_the_command_line_wins_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    text = "learning_rate: 1e-4\nepisode_length: 7\nlr_candidates: [1, 3]\n"
    run = resolved(tmp_path, text, "--learning_rate", "3e-5", "--max-length=9")
    assert run.training.learning_rate == 3e-5
    assert run.training.episode_length == 7
    assert run.training.lr_candidates == [1.0, 3.0]
    assert run.recipe.max_length == 9
    assert run.training.num_train_epochs == 3


def test_a_value_that_the_command_line_corrects_need_not_be_right_in_the_file(
    tmp_path: Path,
) -> None:
    run = resolved(tmp_path, "weight_decay: -1\n", "--weight_decay", "0.1")
    assert run.training.weight_decay == 0.1


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("do_train: no", "do_train", False),
        ("eval_strategy: no", "eval_strategy", "no"),
        ("max_steps: 1e3", "max_steps", 1000),
        ("validation_split: dev", "validation_split", ["dev"]),
        ("report_to: [tensorboard]", "report_to", ["tensorboard"]),
        ("model_config: {}", "model_config", None),
        ("lr_scheduler_kwargs: {num_cycles: 2}", "lr_scheduler_kwargs", {"num_cycles": 2}),
        ("episode_length:", "episode_length", None),
        ("source_prefix: '--x: '", "source_prefix", "--x: "),
    ],
)
def test_values_of_all_kinds_reach_their_fields(
    text: str, key: str, value: Any, tmp_path: Path
) -> None:
    if key == "model_config":
        path = tmp_path / "mine.yaml"
        path.write_text("model_type: gpt2\nmodel_config: {n_embd: 8, a: [1, 2]}\n")
        assert resolve(str(path), []).recipe.model_config == {"n_embd": 8, "a": [1, 2]}
        return
    run = resolved(tmp_path, text)
    found = getattr(run.recipe, key, None) if hasattr(run.recipe, key) else None
    found = getattr(run.training, key) if found is None and hasattr(run.training, key) else found
    assert found == value


def test_all_mistakes_are_told_at_once_with_the_key_and_the_fix(tmp_path: Path) -> None:
    text = (
        "learning_rat: 1e-4\nmax_steps: many\nlr_candidates: [0, 1]\nmax_length: 0\n"
        "metrics: [bleu]\nema_alpha: 2\nper_device_train_batch_size: [1, 2]\n"
    )
    told = problems(tmp_path, text, "--seeed", "3", "--warmup_steps", "5")
    assert all(line.startswith(str(tmp_path / "mine.yaml")) for line in told)
    for part in (
        "unknown recipe key `learning_rat`; did you mean `learning_rate`?",
        "`max_steps`: invalid int value: 'many'",
        "`lr_candidates` must hold numbers > 0, got 0",
        "`max_length` must be at least 1, got 0",
        "`metrics` of `text-classification` are accuracy, f1, matthews, got 'bleu'",
        "`ema_alpha` must be a number in (0, 1], got 2",
        "`per_device_train_batch_size` takes one value, got the list [1, 2]",
        "unknown option `--seeed`; did you mean `--seed`?",
    ):
        assert sum(part in line for line in told) == 1, (part, told)


@pytest.mark.parametrize("key", ["trust_remote_code", "hub_token"])
def test_a_file_cannot_allow_what_only_the_user_may(key: str, tmp_path: Path) -> None:
    (told,) = problems(tmp_path, f"{key}: true\n")
    assert f"`{key}` can be set on the command line only" in told
    assert resolved(tmp_path, "", "--trust_remote_code").recipe.trust_remote_code
    assert not resolved(tmp_path, "").recipe.trust_remote_code


def test_prefixes_of_options_are_no_options(tmp_path: Path) -> None:
    (told,) = problems(tmp_path, "", "--learning_r", "1e-4")
    assert "unknown option `--learning_r`" in told


@pytest.mark.parametrize("value", ["-3e-4", "-inf"])
def test_a_value_with_a_minus_sign_is_a_value(value: str, tmp_path: Path) -> None:
    (told,) = problems(tmp_path, "", "--learning_rate", value)
    assert f"`learning_rate` must be a number >= 0, got {float(value)}" in told
    assert problems(tmp_path, f"lr_candidates: [{value.replace('inf', '.inf')}, 1]\n") != []
    run = resolved(tmp_path, "label_range: [-1e-5, 1]\n", "--source_prefix", "-x")
    assert (run.recipe.label_range, run.recipe.source_prefix) == ([-1e-5, 1.0], "-x")


def test_the_resolved_recipe_resolves_to_itself(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text,label\na,0\n")
    text = "lr_scheduler_kwargs: {}\nreport_to: none\nclass_names: ['no', '1']\n"
    options = ["--learning_rate", "3e-5", "--train_file", str(tmp_path / "train.csv")]
    first = resolved(tmp_path, text, *options, "--output_dir", "x", "--trust_remote_code")
    values = to_yaml_values(first)
    assert "output_dir" not in values
    assert "trust_remote_code" not in values
    path = tmp_path / "again.yaml"
    path.write_text(yaml.safe_dump(values))
    second = resolve(str(path), [])
    assert to_yaml_values(second) == values
    assert second.training.learning_rate == 3e-5
    assert second.recipe.class_names == ["no", "1"]


@pytest.mark.parametrize("value", ["{task}: ", '{"a": 1}', "[x] "])
def test_a_text_that_begins_with_a_bracket_stays_a_text(value: str, tmp_path: Path) -> None:
    for run in (
        resolved(tmp_path, "", "--source_prefix", value, "--run_name", value),
        resolved(tmp_path, yaml.safe_dump({"source_prefix": value, "run_name": value})),
    ):
        values = to_yaml_values(run)
        assert values["source_prefix"] == values["run_name"] == run.recipe.source_prefix == value
    (told,) = problems(tmp_path, "source_prefix: {task}\n")
    assert "put quotes round a text that begins with a bracket" in told


def test_a_mapping_may_be_json_on_a_command_line(tmp_path: Path) -> None:
    run = resolved(tmp_path, "", "--lr_scheduler_kwargs", '{"num_cycles": 2}')
    assert run.training.lr_scheduler_kwargs == {"num_cycles": 2}
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(to_yaml_values(run)))
    assert resolve(str(tmp_path / "again.yaml"), []).training.lr_scheduler_kwargs == {
        "num_cycles": 2
    }


def test_what_trainer_writes_into_a_mapping_is_not_in_the_resolved_recipe(tmp_path: Path) -> None:
    run = resolved(tmp_path, "fsdp_config: {xla: false}\nliger_kernel_config: {rope: true}\n")
    assert to_yaml_values(run)["fsdp_config"] == {"xla": False}
    assert run.training.liger_kernel_config == {"rope": True}


def test_every_key_has_help() -> None:
    actions = RecipeParser()._option_string_actions
    own = [key for key in RecipeParser().keys if f"--{key}" in actions]
    assert len(own) > 150
    for key in ("task", "train_file", "class_names", "lr_candidates", "learning_rate"):
        assert actions[f"--{key}"].help
