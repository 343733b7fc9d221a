"""A run that is killed at any moment and started again ends as if it had never stopped."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from pulseopt_hf import PulseOptConfig, PulseOptTrainer, newest_whole_checkpoint
from pulseopt_hf.report.record_reader import read_run
from tests.recipes.tiny import files_of

CONFIG = {
    "lr_candidates": [0.5, 1.0, 2.0],
    "noise_candidates": [0.0, 0.01],
    "episode_length": 7,
    "calibration": "trust_region",
    "divergence": "rollback",
}


def train(model: Any, data: Any, folder: Path, steps: int) -> None:
    """Train with a checkpoint every third step, from the newest whole one there is."""
    args = TrainingArguments(
        str(folder),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=steps,
        learning_rate=3e-3,
        save_steps=3,
        save_total_limit=3,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = PulseOptTrainer(model, args, train_dataset=data, pulse=PulseOptConfig(**CONFIG))
    checkpoint, _ = newest_whole_checkpoint(folder)
    sys.stdout = open(os.devnull, "w")
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    assert trainer.aees is not None
    end = folder / "end.json"
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    torch.save(trainer.model.state_dict(), folder / "end.pt")
    end.write_text(json.dumps({"logs": trainer.aees.get_logs(), "losses": losses}))


def wait_for_a_checkpoint(folder: Path, is_alive: Callable[[], bool]) -> None:
    """Return once there is a new one, or the process that writes them has ended."""
    before = set(folder.glob("checkpoint-*"))
    while is_alive() and set(folder.glob("checkpoint-*")) <= before:
        time.sleep(0.01)


def survive(model: Any, data: Any, folder: Path, kills: int, steps: int) -> tuple[int, int]:
    """Start, kill and start again; return how many kills hit, and how many of them a save."""
    rng = random.Random(kills)
    hits = in_saves = 0
    # Forked from here, where all is imported, a start takes a moment and not ten seconds.
    context = multiprocessing.get_context("fork")
    deadline = time.monotonic() + 60 + 20 * kills
    while not (folder / "end.json").exists():
        assert time.monotonic() < deadline, "the run does not get on"
        process = context.Process(target=train, args=(model, data, folder, steps))
        process.start()
        if hits < kills:
            if hits % 2:
                # However slow the machine is: every other kill falls where there are saves.
                wait_for_a_checkpoint(folder, process.is_alive)
                process.join(timeout=rng.uniform(0.0, 0.3))
            else:
                process.join(timeout=rng.uniform(0.2, 0.8))
            if process.is_alive():
                os.kill(process.pid or 0, signal.SIGKILL)
                hits += 1
        process.join(timeout=600)  # only a hang takes that long, on the slowest machine too
        assert process.exitcode in (0, -signal.SIGKILL)
        in_saves += bool(newest_whole_checkpoint(folder)[1])
    return hits, in_saves


def assert_killed_equals_whole(
    tmp_path: Path, model: Any, data: Any, kills: int, steps: int
) -> int:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    survive(model(), data, whole, kills=0, steps=steps)
    hits, in_saves = survive(model(), data, killed, kills=kills, steps=steps)
    assert hits == kills
    assert json.loads((killed / "end.json").read_text()) == json.loads(
        (whole / "end.json").read_text()
    )
    one = torch.load(whole / "end.pt", weights_only=True)
    other = torch.load(killed / "end.pt", weights_only=True)
    torch.testing.assert_close(other, one, rtol=0, atol=0)
    # The run record reads as if nothing had happened, too.
    record, expected = read_run(killed), read_run(whole)
    assert record.loss == expected.loss
    assert len(record.loss) == steps
    assert record.episodes == expected.episodes
    assert record.trials == expected.trials != []
    assert record.outcome == expected.outcome is not None
    assert record.status == expected.status == "finished"
    return in_saves


def test_five_kills(tmp_path: Path, tiny_model: Any, tiny_data: Any) -> None:
    assert_killed_equals_whole(tmp_path, tiny_model, tiny_data, kills=5, steps=250)


@pytest.mark.slow
def test_forty_kills_some_of_them_in_a_save(
    tmp_path: Path, tiny_model: Any, tiny_data: Any
) -> None:
    assert assert_killed_equals_whole(tmp_path, tiny_model, tiny_data, kills=40, steps=2000) > 0


@pytest.mark.slow
def test_the_command_line_survives_kills(tmp_path: Path, bert: str) -> None:
    files = files_of("cola", tmp_path / "data")
    words = [sys.executable, "-m", "pulseopt_hf", "train", "glue/cola", *files, "--use_cpu"]
    words += ["--model_name_or_path", bert, "--max_steps", "400", "--save_steps", "5"]
    words += ["--save_strategy", "steps", "--per_device_train_batch_size", "8", "--quiet"]
    rng = random.Random(0)

    def run(name: str, kills: int) -> Path:
        folder = tmp_path / name
        for _ in range(3 * kills + 1):
            resume = ["--resume"] if list(folder.glob("checkpoint-*")) else ["--overwrite"]
            process = subprocess.Popen([*words, "--output_dir", str(folder), *resume])
            if kills > 0:
                # A start takes seconds: the moment is counted from the first new checkpoint.
                wait_for_a_checkpoint(folder, lambda p=process: p.poll() is None)
                time.sleep(rng.uniform(0.0, 1.0))
                if process.poll() is None:
                    process.kill()
                    kills -= 1
            if process.wait(timeout=300) == 0:
                return folder
        raise AssertionError("the run was never done")

    whole, killed = run("whole", 0), run("killed", 5)
    for name in ("episodes.json", "model.safetensors"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
