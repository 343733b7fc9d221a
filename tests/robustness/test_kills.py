"""A run that is killed at any moment and started again ends as if it had never stopped."""

import random
from pathlib import Path
from typing import Any

import pytest

from tests.recipes.tiny import files_of
from tests.robustness.kills import Kill, Run, command, script


def kill_and_compare(run: Run, folder: Path, kills: int) -> list[Kill]:
    whole, killed = folder / "whole", folder / "killed"
    assert run.survive(whole, 0, random.Random()) == []
    taken = run.survive(killed, kills, random.Random(kills))
    assert kills - 1 <= len(taken) <= kills
    run.assert_equal(whole, killed)
    return taken


def test_five_kills(tmp_path: Path, tiny_model: Any, tiny_data: Any) -> None:
    kill_and_compare(script(tiny_model, tiny_data, steps=250), tmp_path, kills=5)


@pytest.mark.slow
def test_forty_kills_some_of_them_in_a_save(tmp_path, tiny_model, tiny_data):
    taken = kill_and_compare(script(tiny_model, tiny_data, steps=2000), tmp_path, kills=40)
    assert any(kill.place == "save" for kill in taken)
    assert any(kill.left_half for kill in taken)


@pytest.mark.slow
def test_the_command_line_survives_kills(tmp_path: Path, bert: str) -> None:
    words = ["glue/cola", *files_of("cola", tmp_path / "data"), "--model_name_or_path", bert]
    kill_and_compare(command(words, steps=400, own_process=True), tmp_path, kills=5)
