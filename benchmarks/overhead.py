"""Measure what AEES costs: step time and peak memory against a vanilla Trainer.

    python -m benchmarks.overhead [--rounds 12] [--steps 4] [--layers 6] [--width 384] [--write]

Variants train the same BERT-like model on the same batches in one process: the vanilla Trainer
(twice, to show what the clock can tell apart), PulseOptTrainer adapting the LR only and with
gradient noise, and the published `pulseopt` package wired into a Trainer, LR only and with noise.
Each round trains every variant for a few steps, in random order, so that what else the machine does
falls on all of them alike. Times are quoted as ratios to vanilla: the median over rounds of the
ratio within a round. On one thread, the default, they are processor times, to which other processes
add nothing; on more they are times by the clock, and need a machine that does nothing else. Memory
is the peak of a process that trains one variant, less that of the vanilla Trainer's.

Calibration is paid for once a run, in two ways. Runs of 50 steps are trained with it and without,
in turn, and the difference in time is quoted in optimizer steps: its forward passes and copies.
Besides, the batches that trials are taken on, but for the last, train nothing.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from benchmarks import common
from pulseopt_hf import PulseOptConfig, PulseOptTrainer
from pulseopt_hf.aees.calibration import SHORTEST_RUN
from pulseopt_hf.compare.methods import PublishedSteps
from pulseopt_hf.compare.summary import markdown

RESULT = common.RESULTS / "overhead.json"
VARIANTS = ("vanilla", "vanilla again", "lr", "lr+noise", "published lr", "published lr+noise")
LONG_RUN = 1000  # optimizer steps


class Clock(TrainerCallback):
    """Times the steps of a training but for the first ones, which warm up.

    Attributes:
        seconds: mean time of a step.
    """

    def __init__(self, now: Callable[[], float], warm_up: int) -> None:
        self._now, self._warm_up = now, warm_up

    def on_step_begin(self, args, state, control, **kwargs):
        """Start the clock."""
        if state.global_step == self._warm_up:
            self._start = self._now()

    def on_step_end(self, args, state, control, **kwargs):
        """Stop the clock at the last step."""
        if state.global_step == state.max_steps:
            self.seconds = (self._now() - self._start) / (state.max_steps - self._warm_up)


def trainer_of(variant: str, **shared: Any) -> Trainer:
    """Return the Trainer of a variant, made with what all of them share."""
    knobs: dict[str, Any] = {
        "lr_candidates": [0.5, 1.0, 2.0],
        # Noise in every step, so that its cost is not averaged away.
        "noise_candidates": [0.005, 0.01] if "noise" in variant else [0.0],
        "episode_length": 4,
    }
    # Runs of a few steps do not try every arm, and need not: all arms cost the same.
    warnings.filterwarnings("ignore", message=".*not every arm is tried")
    if variant.startswith("lr"):
        return PulseOptTrainer(**shared, pulse=PulseOptConfig.published(**knobs))
    trainer = Trainer(**shared)
    if variant.startswith("published"):
        PublishedSteps(trainer, **knobs)
    return trainer


def times_of(
    variants: Sequence[str], rounds: int, train: Callable[[str], float]
) -> dict[str, list[float]]:
    """Return for each variant the time of a step in every round, in seconds.

    Args:
        variants: their names.
        rounds: how many, after one that warms up.
        train: trains one of them, and returns the time of a step.
    """
    times: dict[str, list[float]] = {variant: [] for variant in variants}
    order = random.Random(0)
    for number in range(rounds + 1):
        for variant in order.sample(variants, len(variants)):
            seconds = train(variant)
            if number:
                times[variant].append(seconds)
        print(f"round {number} of {rounds}", file=sys.stderr, flush=True)
    return times


def calibration_cost(
    train: Callable[[str], tuple[float, PulseOptTrainer]], rounds: int
) -> dict[str, float]:
    """Return what a calibration takes, in optimizer steps and batches: medians over rounds.

    Args:
        rounds: how many.
        train: trains `SHORTEST_RUN` steps under a value of the knob `calibration`, and returns the
            time that took and the Trainer.
    """
    extra, batches = [], []
    for _ in range(rounds):
        without, _ = train("off")
        seconds, trainer = train("trust_region")
        assert trainer.aees is not None
        assert trainer.aees.calibrator is not None
        steps = {trial.step for trial in trainer.aees.calibrator.search.trials}
        extra.append((seconds / without - 1.0) * SHORTEST_RUN)
        batches.append(len(steps) - 1)
        print(f"calibration: {extra[-1]:.1f} steps, {batches[-1]} batches", file=sys.stderr)
    return {
        "calibration_steps": statistics.median(extra),
        "calibration_batches": statistics.median(batches),
    }


def compared(times: dict[str, list[float]], peaks: dict[str, float]) -> dict[str, dict[str, float]]:
    """Return step times as ratios to the vanilla Trainer's, and peaks as what they are above it."""
    return {
        variant: {
            "step_ratio": statistics.median(
                mine / theirs for mine, theirs in zip(own, times["vanilla"], strict=True)
            ),
            "extra_peak_mib": peaks[variant] - peaks["vanilla"],
        }
        for variant, own in times.items()
    }


def to_markdown(result: dict[str, Any]) -> str:
    """Return the table of what each variant costs, and a line on what calibration does."""
    rows = [("variant", "step time", "extra peak memory")]
    for name, row in result["variants"].items():
        rows.append((name, f"{row['step_ratio']:.3f} x", f"{round(row['extra_peak_mib'])} MiB"))
    steps, batches = result["calibration_steps"], result["calibration_batches"]
    memory = ""
    if "calibration_extra_peak_mib" in result:
        memory = f", and {max(0, round(result['calibration_extra_peak_mib']))} MiB"
    return (
        f"{markdown(rows)}\n\nCalibration takes the time of {steps:.1f} optimizer steps and "
        f"{batches:.0f} batches, {(steps + batches) / LONG_RUN:.1%} of {LONG_RUN:,} steps{memory}."
        "\n"
    )


def build_model(options: argparse.Namespace) -> BertForSequenceClassification:
    """Return the model, always with the same weights."""
    set_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            num_hidden_layers=options.layers,
            hidden_size=options.width,
            num_attention_heads=12,
            intermediate_size=4 * options.width,
        )
    )


def what_is_trained(options: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Return what all Trainers share: a model, an optimizer, arguments and batches.

    One model and one optimizer for all: where their memory happens to lie makes a difference of
    several per cent between two equal Trainers.
    """
    generator = torch.Generator().manual_seed(0)
    batches = [
        {
            "input_ids": torch.randint(5, 30000, (options.tokens,), generator=generator),
            "labels": index % 2,
        }
        for index in range(options.batch * 8)
    ]
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=options.batch,
        max_steps=options.steps + 1,
        learning_rate=1e-5,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    model = build_model(options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    return {
        "model": model,
        "optimizers": (optimizer, None),
        "args": arguments,
        "train_dataset": batches,
    }


def measure(options: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Return the times of all variants, and what calibration costs."""
    now = time.process_time if options.threads == 1 else time.perf_counter
    shared = what_is_trained(options, folder)
    trainers = {variant: trainer_of(variant, **shared) for variant in VARIANTS}

    def train(variant: str) -> float:
        clock = Clock(now, warm_up=1)
        trainers[variant].add_callback(clock)
        trainers[variant].train()
        trainers[variant].remove_callback(clock)
        return clock.seconds

    def calibrate(calibration: str) -> tuple[float, PulseOptTrainer]:
        shared = what_is_trained(options, folder)
        shared["args"].max_steps = SHORTEST_RUN
        trainer = PulseOptTrainer(**shared, pulse=PulseOptConfig(calibration=calibration))
        start = now()
        trainer.train()
        return now() - start, trainer

    times = times_of(VARIANTS, options.rounds, train)
    return {"times": times, **calibration_cost(calibrate, options.calibration_rounds)}


def peak_memory() -> float:
    """Return this process's peak resident memory in MiB, as the kernel counted it.

    `getrusage` would not do: a child starts with the peak of the process that started it.
    """
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("/proc/self/status has no VmHWM; the memory figures need Linux.")


def measure_memory(variant: str, options: argparse.Namespace) -> float:
    """Return the peak resident memory of a process that trains one variant, in MiB."""
    command = [sys.executable, "-m", "benchmarks.overhead", "--memory-of", variant]
    for name in ("layers", "width", "batch", "tokens"):
        command += [f"--{name}", str(getattr(options, name))]
    # Freed memory goes back to the system at once, so that the peak is what was in use together.
    environment = {**os.environ, "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}
    output = subprocess.run(
        command, check=True, capture_output=True, text=True, env=environment, cwd=common.ROOT
    )
    return float(output.stdout.split()[-1])


def main() -> None:
    parser = common.parser(str(__doc__), RESULT)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--calibration-rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="timed optimizer steps in a round")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory-of", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        if options.memory_of:
            trainer_of(options.memory_of, **what_is_trained(options, folder)).train()
            print(peak_memory())
            return
        measured = measure(options, folder)
    peaks = {variant: measure_memory(variant, options) for variant in VARIANTS}
    packages = ("torch", "transformers", "pulseopt", "pulseopt-hf")
    result = {
        "parameters": build_model(options).num_parameters(),
        **{name: getattr(options, name) for name in ("batch", "tokens", "threads", "rounds")},
        "versions": {name: version(name) for name in packages},
        "machine": platform.machine(),
        "variants": compared(measured.pop("times"), peaks),
        **measured,
    }
    common.finish(result, to_markdown, options.write)


if __name__ == "__main__":
    main()
