"""`make soak` in small."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def soak(out: Path, *options: str) -> str:
    words = [sys.executable, "-m", "tests.robustness.soak", "--out", str(out), *options]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()[-1]


def results(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_soak_kills_and_resumes_and_is_itself_resumed(tmp_path: Path) -> None:
    counts = ["--kills", "2", "--ddp-kills", "0"]
    soak(tmp_path, *counts, "--examples", "100")
    kills = results(tmp_path / "kills.jsonl")
    assert {line["kind"] for line in kills} == {"script", "command"}
    assert [line["kills"] for line in kills] == [1, 1]
    assert [sum(line["places"].values()) for line in kills] == [1, 1]
    said = soak(tmp_path, *counts, "--examples", "200")
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
