"""Measure what AEES costs: step time and peak memory against a vanilla Trainer.

    python benchmarks/overhead.py [--rounds 12] [--steps 4] [--layers 6] [--width 384] [--out FILE]

Variants train the same BERT-like model on the same batches in one process: the vanilla Trainer
(twice, to show what the clock can tell apart), PulseOptTrainer adapting the LR only and with
gradient noise, and the published `pulseopt` package wired into a Trainer, LR only and with noise.
Each round trains every variant for a few steps, in random order, so that what else the machine does
falls on all of them alike. Times are quoted as ratios to vanilla: the median over rounds of the
ratio within a round. On one thread, the default, they are processor times, to which other processes
add nothing; on more they are times by the clock, and need a machine that does nothing else. Memory
is the peak of a process that trains one variant, less that of the vanilla Trainer's.

Calibration is paid for once a run, in two ways. Runs of 50 steps are trained with it and without,
in turn, and the difference in time is quoted in optimizer steps and in seconds: its forward passes
and copies. Besides, the batches that trials are taken on, but for the last, train nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from importlib.metadata import version

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from pulseopt_hf import PulseOptConfig, PulseOptTrainer
from pulseopt_hf.aees.calibration import SHORTEST_RUN
from pulseopt_hf.compare.published import PublishedTrainer

VARIANTS = ("vanilla", "vanilla again", "lr", "lr+noise", "published lr", "published lr+noise")
LONG_RUN = 1500  # optimizer steps
ARMS = [0.5, 1.0, 2.0]
NOISE = [0.005, 0.01]  # noise in every step, so that its cost is not averaged away


class StepClock(TrainerCallback):
    """Times every optimizer step, from its first micro-batch to its end."""

    def __init__(self, threads: int) -> None:
        """Choose the clock by the number of threads that torch uses."""
        self.durations: list[float] = []
        self._now = time.process_time if threads == 1 else time.perf_counter

    def on_step_begin(self, args, state, control, **kwargs):
        """Start the clock."""
        self._start = self._now()

    def on_step_end(self, args, state, control, **kwargs):
        """Stop the clock."""
        self.durations.append(self._now() - self._start)


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


def build_trainer(
    variant: str,
    model: BertForSequenceClassification,
    optimizer: torch.optim.Optimizer,
    options: argparse.Namespace,
    directory: str,
) -> Trainer:
    """Return the Trainer of a variant; all of them see the same batches."""
    generator = torch.Generator().manual_seed(0)
    batches = [
        {
            "input_ids": torch.randint(5, 30000, (options.tokens,), generator=generator),
            "labels": index % 2,
        }
        for index in range(options.batch * 8)
    ]
    arguments = TrainingArguments(
        output_dir=directory,
        per_device_train_batch_size=options.batch,
        max_steps=options.steps + 1,
        learning_rate=1e-5,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    common = {
        "model": model,
        "args": arguments,
        "train_dataset": batches,
        "optimizers": (optimizer, None),
    }
    noise = NOISE if "noise" in variant else [0.0]
    if variant.startswith("vanilla"):
        return Trainer(**common)
    if variant.startswith("published"):
        return PublishedTrainer(
            **common, lr_candidates=ARMS, noise_candidates=noise, episode_length=4
        )
    pulse = PulseOptConfig.published(lr_candidates=ARMS, noise_candidates=noise, episode_length=4)
    return PulseOptTrainer(**common, pulse=pulse)


def measure_times(options: argparse.Namespace) -> dict[str, list[float]]:
    """Return for each variant the time of a step in every round, in seconds."""
    times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    order = random.Random(0)
    # One model and one optimizer for all: where their memory happens to lie makes a difference of
    # several per cent between two equal Trainers.
    model = build_model(options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    with tempfile.TemporaryDirectory() as directory:
        trainers = {v: build_trainer(v, model, optimizer, options, directory) for v in VARIANTS}
        for number in range(options.rounds + 1):
            for variant in order.sample(VARIANTS, len(VARIANTS)):
                clock = StepClock(options.threads)
                trainers[variant].add_callback(clock)
                trainers[variant].train()
                trainers[variant].remove_callback(clock)
                if number:  # the first round warms up, as does the first step of each
                    times[variant].append(statistics.median(clock.durations[1:]))
            print(f"round {number} of {options.rounds}", file=sys.stderr)
    return times


def measure_calibration(options: argparse.Namespace) -> dict[str, float]:
    """Return what calibration takes, in optimizer steps of the same model: medians over rounds."""
    clock = time.process_time if options.threads == 1 else time.perf_counter
    extra: list[float] = []
    taken: list[float] = []
    lost: list[float] = []
    for _ in range(options.calibration_rounds):
        seconds = {}
        for calibration in ("off", "trust_region"):
            model = build_model(options)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
            with tempfile.TemporaryDirectory() as directory:
                plain = build_trainer("vanilla", model, optimizer, options, directory)
                plain.args.max_steps = SHORTEST_RUN
                trainer = PulseOptTrainer(
                    model,
                    plain.args,
                    train_dataset=plain.train_dataset,
                    optimizers=(optimizer, None),
                    pulse=PulseOptConfig(calibration=calibration),
                )
                start = clock()
                trainer.train()
                seconds[calibration] = clock() - start
        assert trainer.aees is not None
        assert trainer.aees.calibrator is not None
        steps = {trial.step for trial in trainer.aees.calibrator.search.trials}
        lost.append(len(steps) - 1)
        taken.append(seconds["trust_region"] - seconds["off"])
        extra.append((seconds["trust_region"] / seconds["off"] - 1.0) * SHORTEST_RUN)
        print(f"calibration: {extra[-1]:.1f} steps, {lost[-1]} batches", file=sys.stderr)
    return {
        "calibration_steps": statistics.median(extra),
        "calibration_seconds": statistics.median(taken),
        "calibration_batches": statistics.median(lost),
    }


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
    command = [sys.executable, __file__, "--memory-of", variant]
    for name in ("layers", "width", "batch", "tokens"):
        command += [f"--{name}", str(getattr(options, name))]
    # Freed memory goes back to the system at once, so that the peak is what was in use together.
    environment = {**os.environ, "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return float(output.stdout.split()[-1])


def main() -> None:
    # Runs of a few steps do not try every arm, and need not: all arms cost the same.
    warnings.filterwarnings("ignore", message=".*not every arm is tried")
    warnings.filterwarnings("ignore", message=".*overridden after learning rate scheduler")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=4, help="timed optimizer steps in a round")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--calibration-rounds", type=int, default=3)
    parser.add_argument("--out", help="also write the result to this JSON file")
    parser.add_argument("--memory-of", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        model = build_model(options)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        with tempfile.TemporaryDirectory() as directory:
            build_trainer(options.memory_of, model, optimizer, options, directory).train()
        print(peak_memory())
        return
    times = measure_times(options)
    memory = {variant: measure_memory(variant, options) for variant in VARIANTS}
    calibration = measure_calibration(options)
    parameters = build_model(options).num_parameters()
    result = {
        "parameters": parameters,
        "batch": options.batch,
        "tokens": options.tokens,
        "threads": options.threads,
        "rounds": options.rounds,
        "versions": {
            name: version(name) for name in ("torch", "transformers", "pulseopt", "pulseopt-hf")
        },
        "machine": platform.machine(),
        **calibration,
        "variants": {
            variant: {
                "step_ratio": statistics.median(
                    mine / theirs
                    for mine, theirs in zip(times[variant], times["vanilla"], strict=True)
                ),
                "extra_peak_mib": memory[variant] - memory["vanilla"],
            }
            for variant in VARIANTS
        },
    }
    print(f"{parameters / 1e6:.1f}M parameters, batch {options.batch} x {options.tokens} tokens")
    print(f"{'variant':<20} {'step time':>10} {'extra peak memory':>18}")
    for variant, row in result["variants"].items():
        print(f"{variant:<20} {row['step_ratio']:>8.3f} x {row['extra_peak_mib']:>14.0f} MiB")
    steps, batches = calibration["calibration_steps"], calibration["calibration_batches"]
    print(
        f"calibration takes the time of {steps:.1f} optimizer steps and {batches:.0f} batches, "
        f"once a run: {1.0 + (steps + batches) / LONG_RUN:.3f} x in one of {LONG_RUN:,} steps"
    )
    if options.out:
        with open(options.out, "w") as file:
            json.dump(result, file, indent=2)
            file.write("\n")


if __name__ == "__main__":
    main()
