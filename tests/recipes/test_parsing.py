"""Default, YAML, command line: what wins, and what is said about mistakes."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from pulseopt_hf.errors import UsageError
from pulseopt_hf.recipes.parsing import Resolved, keys_of, recipe_parser, resolve, to_yaml_values

DATA = "dataset_name: some/data\n"
BASE = f"task: text-classification\nmodel_name_or_path: some/model\n{DATA}"
NEW = f"task: causal-lm\nmodel_type: gpt2\ntokenizer_name: embedded:bpe\n{DATA}"


def resolved(tmp_path: Path, text: str, *options: str, base: str = BASE) -> Resolved:
    path = tmp_path / "mine.yaml"
    path.write_text(base + text)
    return resolve(str(path), list(options))


def again(tmp_path: Path, run: Resolved) -> Resolved:
    return resolved(tmp_path, yaml.safe_dump(to_yaml_values(run)), base="")


def problems(tmp_path: Path, text: str, *options: str, base: str = BASE) -> list[str]:
    with pytest.raises(UsageError) as error:
        resolved(tmp_path, text, *options, base=base)
    return list(error.value.problems)


def test_the_command_line_wins_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    text = "learning_rate: 1e-4\nepisode_length: 7\nlr_candidates: [1, 3]\nweight_decay: -1\n"
    options = ["--learning_rate", "3e-5", "--max-length=9", "--weight_decay", "0.1"]
    run = resolved(tmp_path, text, *options)
    assert run.training.learning_rate == 3e-5
    assert run.training.episode_length == 7
    assert run.training.lr_candidates == [1.0, 3.0]
    assert run.recipe.max_length == 9
    assert run.training.num_train_epochs == 3
    # What the command line corrects need not be right in the file.
    assert run.training.weight_decay == 0.1


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("do_train: no", False),
        ("eval_strategy: no", "no"),
        ("max_steps: 1e3", 1000),
        ("validation_split: dev", ["dev"]),
        ("report_to: [tensorboard]", ["tensorboard"]),
        ("lr_scheduler_kwargs: {num_cycles: 2}", {"num_cycles": 2}),
        ("episode_length:", None),
        ("source_prefix: '--x: '", "--x: "),
    ],
)
def test_values_of_all_kinds_reach_their_fields(text: str, value: Any, tmp_path: Path) -> None:
    run, key = resolved(tmp_path, text), text.split(":")[0]
    assert getattr(run.recipe if hasattr(run.recipe, key) else run.training, key) == value


def test_all_mistakes_are_told_at_once_with_the_key_and_the_fix(tmp_path: Path) -> None:
    text = (
        "learning_rat: 1e-4\nmax_steps: many\nlr_candidates: [0, 1]\nmax_length: 0\n"
        "metrics: [bleu]\nema_alpha: 2\nper_device_train_batch_size: [1, 2]\nseed: -1\n"
    )
    told = problems(tmp_path, text, "--seeed", "3", "--warmup_steps", "5", "--learning_r", "1")
    assert all(line.startswith(str(tmp_path / "mine.yaml")) for line in told)
    for part in (
        "unknown recipe key `learning_rat`; did you mean `learning_rate`?",
        "`max_steps`: invalid int value: 'many'",
        "`lr_candidates` must hold numbers > 0, got 0",
        "`max_length` must be at least 1, got 0",
        "`metrics` of `text-classification` are accuracy, f1, matthews, got 'bleu'",
        "`ema_alpha` must be a number in (0, 1], got 2",
        "`per_device_train_batch_size` takes one value, got the list [1, 2]",
        "`seed` must be a number >= 0, got -1",
        "unknown option `--seeed`; did you mean `--seed`?",
        "unknown option `--learning_r`",  # a prefix of an option is no option
    ):
        assert sum(part in line for line in told) == 1, (part, told)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("task: causal-lm\ndo_predict: true", "`do_predict` cannot be used with `task: causal-lm`"),
        ("task: masked-lm\nlora_r: 8", "`lora_r` cannot be used with `task: masked-lm`"),
        ("task: seq2seq", "`target_column` must be set in `seq2seq`"),
        ("task: seq2seq\ntarget_column: a\nmetrics: [rouge]", "`predict_with_generate: true`"),
        ("task: image-classification\nmodel_type: vit", "`image_size` must be set"),
        ("task: causal-lm\nmodel_type: gpt2", "`tokenizer_name` must be set for a new model"),
        ("task: text-regression\nclass_names: [a, b]", "`class_names` cannot be used with"),
        ("task: tagging", "`task` must be one of text-classification, "),
        ("model_config: {}", "`model_config` is for a new model"),
        ("label_range: [1]", "`label_range` must be two numbers"),
        ("", "Set one of `model_name_or_path` (pretrained) and `model_type`"),
    ],
)
def test_keys_that_do_not_go_together_are_found_before_anything_is_loaded(text, says, tmp_path):
    base = "" if "model_type" in text or not text else "model_name_or_path: x\n"
    (told,) = problems(tmp_path, text or "task: causal-lm", base=base)
    assert says in told


@pytest.mark.parametrize("key", ["trust_remote_code", "hub_token"])
def test_a_file_cannot_allow_what_only_the_user_may(key: str, tmp_path: Path) -> None:
    (told,) = problems(tmp_path, f"{key}: true\n")
    assert f"`{key}` can be set on the command line only" in told
    assert resolved(tmp_path, "", "--trust_remote_code").recipe.trust_remote_code
    assert not resolved(tmp_path, "").recipe.trust_remote_code


@pytest.mark.parametrize("value", ["-3e-4", "-inf"])
def test_a_value_with_a_minus_sign_is_a_value(value: str, tmp_path: Path) -> None:
    (told,) = problems(tmp_path, "", "--learning_rate", value)
    assert f"`learning_rate` must be a number >= 0, got {float(value)}" in told
    assert problems(tmp_path, f"lr_candidates: [{value.replace('inf', '.inf')}, 1]\n") != []
    run = resolved(tmp_path, "label_range: [-1e-5, 1]\n", "--source_prefix", "-x")
    assert (run.recipe.label_range, run.recipe.source_prefix) == ([-1e-5, 1.0], "-x")


def test_the_command_lines_keys_come_in_the_parsers_order(tmp_path: Path) -> None:
    keys = ["seed", "max_steps", "weight_decay", "eval_steps", "lr_candidates", "warmup_steps"]
    run = resolved(tmp_path, "", *(word for key in keys for word in (f"--{key}", "1")))
    order = keys_of(recipe_parser())
    set_here = [key for key in run.given if key in keys]
    assert set_here == sorted(keys, key=order.index)


def test_the_resolved_recipe_resolves_to_itself(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text,label\na,0\n")
    text = "lr_scheduler_kwargs: {}\nreport_to: none\nclass_names: ['no', '1']\n"
    text += "validation_percentage: 5\n"
    options = ["--learning_rate", "3e-5", "--train_file", str(tmp_path / "train.csv")]
    first = resolved(tmp_path, text, *options, "--output_dir", "x", "--trust_remote_code")
    values = to_yaml_values(first)
    assert not {"output_dir", "trust_remote_code"} & values.keys()
    second = again(tmp_path, first)
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


def test_mappings_are_kept_as_they_are_given(tmp_path: Path) -> None:
    run = resolved(tmp_path, "model_config: {n_embd: 8, a: [1, 2]}\n", base=NEW)
    assert run.recipe.model_config == {"n_embd": 8, "a": [1, 2]}
    run = resolved(tmp_path, "", "--lr_scheduler_kwargs", '{"num_cycles": 2}')
    assert run.training.lr_scheduler_kwargs == {"num_cycles": 2}
    assert again(tmp_path, run).training.lr_scheduler_kwargs == {"num_cycles": 2}
    # Trainer writes into its own copy.
    run = resolved(tmp_path, "fsdp_config: {xla: false}\nliger_kernel_config: {rope: true}\n")
    assert to_yaml_values(run)["fsdp_config"] == {"xla": False}
    assert run.training.liger_kernel_config == {"rope": True}


@pytest.mark.parametrize("key", ["accelerator_config", "deepspeed", "fsdp_config"])
def test_a_file_of_settings_must_be_there_and_hold_a_mapping(key: str, tmp_path: Path) -> None:
    file = tmp_path / "settings.json"
    for options in ([f"--{key}", str(file)], []):
        (told,) = problems(tmp_path, "" if options else f"{key}: {file}", *options)
        assert f"`{key}`: {file} cannot be read: No such file or directory." in told
    for content in ("1", "[]", "{", "[" * 10_000, "\x00"):
        file.write_text(content)
        (told,) = problems(tmp_path, f"{key}: {file}")
        assert told.endswith(f"`{key}`: {file} holds no JSON mapping.")


def test_whatever_trainer_raises_over_a_value_is_a_problem_of_the_recipe(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    (told,) = problems(tmp_path, "deepspeed: {zero_optimization: 5}", "--use_cpu")
    assert "Trainer refuses a value: AttributeError: " in told


def test_a_problem_is_one_line_whatever_value_it_quotes(tmp_path: Path) -> None:
    (line,) = problems(tmp_path, 'do_train: "a\\nb\\u2028c"\n')
    assert len(line.splitlines()) == 1
    assert "`do_train`: Truthy value expected: got a b c but" in line
    assert not line.endswith("..")


def test_every_key_has_help() -> None:
    actions = recipe_parser()._option_string_actions
    assert len(keys_of(recipe_parser())) > 150
    for key in ("task", "train_file", "class_names", "lr_candidates", "learning_rate"):
        assert actions[f"--{key}"].help
