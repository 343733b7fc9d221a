"""Every YAML that ships is right, names real things, and gets into the wheel."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from pulseopt_hf.recipes import catalogue
from pulseopt_hf.recipes.keys import TRL_TASKS, RecipeArguments
from pulseopt_hf.recipes.parsing import resolve
from tests.recipes.tiny import GLUE

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "recipes").rglob("*.y*ml"))
RECIPES = [file for file in FILES if file.parent.name != "launch"]
PROFILES = [file for file in FILES if file.parent.name == "launch"]


def name_of(file: Path) -> str:
    return file.relative_to(ROOT / "recipes").with_suffix("").as_posix()


def test_there_are_as_many_recipes_and_profiles_as_we_think() -> None:
    assert (len(RECIPES), len(PROFILES)) == (25, 6)
    assert catalogue.names() == sorted(map(name_of, RECIPES))
    assert catalogue.profiles() == sorted(map(name_of, PROFILES))


@pytest.mark.parametrize("file", RECIPES, ids=name_of)
def test_a_recipe_is_valid_and_opens_with_how_to_run_it_on_what_and_what_to_expect(file, tmp_path):
    # TRL's configs ask for bf16, which a machine without a GPU has only where it may use the CPU.
    options = ["--output_dir", str(tmp_path), "--use_cpu"]
    if name_of(file) == "lm/text_file":
        options += ["--train_file", str(ROOT / "constraints.txt")]
    run = resolve(str(file), options)
    assert run.recipe.expected_time
    assert run.recipe.expected_score
    assert run.recipe.metrics or run.recipe.task in TRL_TASKS  # where TRL measures
    assert not run.recipe.trust_remote_code
    assert run.training.max_steps > 0 or run.training.num_train_epochs > 0
    assert list(tmp_path.iterdir()) == []
    lines = file.read_text().splitlines()
    end = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    head = "\n".join(lines[:end])
    assert f"pulseopt-hf train {name_of(file)}" in head
    assert "Hardware:" in head
    assert re.search("Expect|score|measured", head)
    assert all(len(line) <= 100 for line in lines)


def test_glue_recipes_have_the_standard_settings_and_differ_only_where_the_tasks_do() -> None:
    of_task = {field.name for field in dataclasses.fields(RecipeArguments)}
    for name, (*_, score, _) in GLUE.items():
        values = yaml.safe_load((ROOT / "recipes" / "glue" / f"{name}.yaml").read_text())
        assert score in values["expected_score"]
        assert values["model_name_or_path"] == "google-bert/bert-base-cased"
        assert (values["dataset_name"], values["dataset_config_name"]) == ("nyu-mll/glue", name)
        assert values["max_length"] == 128
        assert {key: value for key, value in values.items() if key not in of_task} == {
            "per_device_train_batch_size": 32,
            "learning_rate": "2e-5",  # as YAML 1.1 reads it
            "num_train_epochs": 5 if name in ("mrpc", "wnli") else 3,
            "eval_strategy": "epoch",
            "save_strategy": "epoch",
        }


@pytest.mark.parametrize("file", PROFILES, ids=name_of)
def test_a_launch_profile_is_read_by_accelerate(file: Path) -> None:
    config = load_config_from_file(str(file))
    expected = {
        "single": ("NO", 1),
        "ddp": ("MULTI_GPU", 2),
        "fsdp2": ("FSDP", 2),
        "zero2": ("DEEPSPEED", 2),
        "zero3": ("DEEPSPEED", 2),
        "two_node": ("MULTI_GPU", 16),
    }[file.stem]
    assert (config.distributed_type.value, config.num_processes) == expected
    assert config.num_machines == (2 if file.stem == "two_node" else 1)
    if file.stem == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
    if file.stem.startswith("zero"):
        assert config.deepspeed_config["zero_stage"] == int(file.stem[-1])
    assert f"pulseopt-hf cp {name_of(file)}" in file.read_text()
