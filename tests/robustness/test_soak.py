"""`make soak` in small."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.robustness.soak import soak


def results(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.slow
def test_a_soak_kills_and_resumes_and_is_itself_resumed(tmp_path: Path) -> None:
    soak(tmp_path, kills=2, ddp_kills=0, examples=100)
    kills = results(tmp_path / "kills.jsonl")
    assert {line["kind"] for line in kills} == {"script", "command"}
    assert sum(line["kills"] for line in kills) == 2
    assert sum(sum(line["places"].values()) for line in kills) == 2
    said = soak(tmp_path, kills=2, ddp_kills=0, examples=200)
    assert results(tmp_path / "kills.jsonl") == kills
    examples = results(tmp_path / "examples.jsonl")
    assert len({line["kind"] for line in examples}) == 2
    assert [line["loaded"] + line["refused"] for line in examples] == [100, 100]
    saves = sum(line["saves"] for line in kills)
    assert re.fullmatch(
        rf"2 kills \(0 of two ranks, {saves} amid a save\): every run ended bit-equal\. "
        r"200 states and recipes: no traceback\. \d+ min on \d+ cores\.",
        said,
    )
