"""What can only be measured on a GPU: the cost of a step of GPT-2, and calibration at size.

    python benchmarks/gpu.py --data FOLDER [--pieces overhead,gpt_10m,...] [--out FOLDER] [--write]

`overhead` trains GPT-2 of 124M parameters, in bf16 with a fused AdamW, as `overhead.py` does a
small model on a CPU: variants in turn in one process, times as ratios to the vanilla Trainer's, the
median over rounds. The other pieces train models of a size from scratch on the sources of the
installed packages, and fine-tune one of them on `wikitext2` of FOLDER, whole and with LoRA. In each
the static LR is tuned on a grid of half decades, and the default is run from 5e-5; see `atlas.py`.
What was run before is kept in `--out` and not run again. `--write` puts what is there into
`benchmarks/results`.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.data import Dataset
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

try:
    from benchmarks import atlas
except ImportError:
    import atlas

from pulseopt_hf import PulseOptConfig, PulseOptTrainer
from pulseopt_hf.aees.calibration import SHORTEST_RUN
from pulseopt_hf.compare.published import PublishedTrainer
from pulseopt_hf.compare.scores import excess, tuned_lr
from pulseopt_hf.embedded import train_tokenizer
from pulseopt_hf.trainer.nonfinite import NonFiniteGuard

OUT = Path("runs/gpu")
RESULT = Path(__file__).parent / "results" / "gpu.json"
VARIANTS = (
    "vanilla",
    "vanilla again",
    "lr",
    "lr, guard off",
    "lr+noise",
    "published lr",
    "published lr+noise",
)
LONG_RUN = 1000  # optimizer steps
BLOCK = 256  # tokens of a row
EVALUATED = 256  # rows
MOST_TOKENS = 6_000_000


@dataclass(frozen=True)
class Size:
    """A model and how long it is trained.

    Attributes:
        layers: its layers.
        width: of its hidden states.
        heads: of its attention.
        vocabulary: tokens, of which the tokenizer uses the first 2,048; `None` is as many.
        guess: where tuning begins, an LR of the atlas's grid.
        steps: of a static run, with `batch` rows each.
        batch: rows of a step.
        start: piece whose tuned model is fine-tuned.
        lora: rank of LoRA; `None` trains everything.
    """

    layers: int
    width: int
    heads: int
    vocabulary: int | None
    guess: float
    steps: int = 600
    batch: int = 32
    start: str | None = None
    lora: int | None = None


SIZES = {
    "gpt_10m": Size(8, 320, 5, None, 1e-3),
    "gpt_50m": Size(12, 576, 9, None, 1e-3),
    "gpt_124m": Size(12, 768, 12, 50257, 1e-3),
    "gpt_350m": Size(24, 1024, 16, 50257, 3e-4),
    "gpt_124m_to_text": Size(12, 768, 12, 50257, 3e-4, 130, 8, "gpt_124m"),
    "gpt_124m_to_text_lora": Size(12, 768, 12, 50257, 3e-3, 130, 8, "gpt_124m", 16),
}


def main() -> None:
    warnings.filterwarnings("ignore", message=".*not every arm is tried")
    warnings.filterwarnings("ignore", message=".*overridden after learning rate scheduler")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--pieces", default=",".join(["overhead", *SIZES]))
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--batch", type=int, default=32, help="rows of the overhead's step")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--write", action="store_true", help="into benchmarks/results")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device")
    options.out.mkdir(parents=True, exist_ok=True)
    for piece in options.pieces.split(","):
        if piece == "overhead":
            once(options.out / "overhead.json", lambda: overhead(options.rounds, options.batch))
        else:
            measure(piece, options.data, options.out)
    sizes = {name: summary(SIZES[name].steps, options.out / name) for name in SIZES}
    result = {
        "card": torch.cuda.get_device_name(),
        "versions": {
            name: version(name) for name in ("torch", "transformers", "accelerate", "pulseopt-hf")
        },
        "overhead": read(options.out / "overhead.json"),
        "sizes": {name: found for name, found in sizes.items() if found is not None},
        "unfinished": {
            name: losses
            for name, found in sizes.items()
            if found is None and (losses := static_losses(options.out / name))
        },
    }
    print(json.dumps(result, indent=1))
    if options.write:
        RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def once(file: Path, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what a file holds, and make it by `run` where it is not there."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        part.write_text(json.dumps(run()) + "\n", encoding="utf-8")
        part.replace(file)
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def read(file: Path) -> dict[str, Any] | None:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


class Clock(TrainerCallback):
    """Times the steps of a training but for the first two, which warm up."""

    def on_step_begin(self, args, state, control, **kwargs):
        """Start the clock."""
        if state.global_step == 2:
            torch.cuda.synchronize()
            self._start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        """Stop the clock at the last step."""
        if state.global_step == state.max_steps:
            torch.cuda.synchronize()
            self.seconds = (time.perf_counter() - self._start) / (state.max_steps - 2)


class Rows(Dataset):
    """Rows of tokens, as a causal language model is given them."""

    def __init__(self, tokens: torch.Tensor) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return one row and its labels."""
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


def settings(folder: Path, steps: int, batch: int, **extra: Any) -> TrainingArguments:
    """Return the arguments that all runs share: bf16, no files, no logs."""
    return TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=32,
        bf16=True,
        optim="adamw_torch_fused",
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=True,
        **extra,
    )


def overhead(rounds: int, batch: int, steps: int = 8) -> dict[str, Any]:
    """Return step times and peak memory of the variants, as ratios and differences to vanilla."""
    set_seed(0)
    model = GPT2LMHeadModel(GPT2Config()).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    data = Rows(torch.randint(0, 50257, (batch * (steps + 2), 1024)))
    common = {
        "model": model,
        "args": settings(OUT / "overhead", steps + 2, batch, learning_rate=1e-5),
        "train_dataset": data,
        "optimizers": (optimizer, None),
    }

    def trainer_of(variant: str) -> Trainer:
        knobs: dict[str, Any] = {
            "lr_candidates": [0.5, 1.0, 2.0],
            "noise_candidates": [0.005, 0.01] if "noise" in variant else [0.0],
            "episode_length": 4,
        }
        if variant.startswith("vanilla"):
            return Trainer(**common)
        if variant.startswith("published"):
            return PublishedTrainer(**common, **knobs)
        return PulseOptTrainer(**common, pulse=PulseOptConfig.published(**knobs))

    trainers = {variant: trainer_of(variant) for variant in VARIANTS}
    times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    peaks: dict[str, int] = {}
    order = random.Random(0)
    is_finite = NonFiniteGuard.is_finite
    for number in range(rounds + 1):
        for variant in order.sample(VARIANTS, len(VARIANTS)):
            clock = Clock()
            trainers[variant].add_callback(clock)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            if "guard off" in variant:
                NonFiniteGuard.is_finite = lambda self: True
            trainers[variant].train()
            NonFiniteGuard.is_finite = is_finite
            trainers[variant].remove_callback(clock)
            if number:  # the first round warms up
                times[variant].append(clock.seconds)
                peaks[variant] = torch.cuda.max_memory_allocated()
        print(f"round {number} of {rounds}", file=sys.stderr, flush=True)
    step = statistics.median(times["vanilla"])
    return {
        "parameters": model.num_parameters(),
        "batch": batch,
        "tokens": 1024,
        "rounds": rounds,
        "steps_a_round": steps,
        "published": version("pulseopt"),
        "step_seconds": step,
        **calibration_cost(model, data, batch, step),
        "variants": {
            variant: {
                "step_ratio": statistics.median(
                    mine / theirs
                    for mine, theirs in zip(times[variant], times["vanilla"], strict=True)
                ),
                "extra_peak_mib": (peaks[variant] - peaks["vanilla"]) / 2**20,
            }
            for variant in VARIANTS
        },
    }


def calibration_cost(
    model: GPT2LMHeadModel, data: Rows, batch: int, step: float, rounds: int = 2
) -> dict[str, float]:
    """Return what calibration takes, in optimizer steps of the same model: medians over rounds."""
    taken, lost, peaks = [], [], {}
    for _ in range(rounds + 1):
        seconds = {}
        for calibration in ("off", "trust_region"):
            set_seed(0)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
            trainer = PulseOptTrainer(
                model,
                settings(OUT / "overhead", SHORTEST_RUN, batch, learning_rate=1e-5),
                train_dataset=data,
                optimizers=(optimizer, None),
                pulse=PulseOptConfig(calibration=calibration),
            )
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            trainer.train()
            torch.cuda.synchronize()
            peaks[calibration] = torch.cuda.max_memory_allocated()
            seconds[calibration] = time.perf_counter() - start
        assert trainer.aees is not None
        assert trainer.aees.calibrator is not None
        lost.append(len({trial.step for trial in trainer.aees.calibrator.search.trials}) - 1)
        taken.append((seconds["trust_region"] - seconds["off"]) / step)
        print(f"calibration: {taken[-1]:.1f} steps, {lost[-1]} batches", file=sys.stderr)
    steps, batches = statistics.median(taken[1:]), statistics.median(lost[1:])
    return {
        "calibration_steps": steps,
        "calibration_batches": batches,
        "calibration_share": (steps + batches) / LONG_RUN,
        "calibration_extra_peak_mib": (peaks["trust_region"] - peaks["off"]) / 2**20,
    }


def measure(piece: str, texts: Path, out: Path) -> None:
    """Tune the static LR of a size, and run the default from 5e-5."""
    size, folder = SIZES[piece], out / piece
    data = corpus(out, texts if size.start else None)

    def run(method: str, learning_rate: float) -> dict[str, Any]:
        file = folder / f"{method}-{learning_rate:g}.json"
        return once(file, lambda: trained(size, data, method, learning_rate, out))

    def loss(learning_rate: float) -> float:
        return run("static", learning_rate)["loss_after"]

    losses = atlas.tune(loss, size.guess)
    run("static", atlas.UNTOUCHED)
    found = run("default", atlas.UNTOUCHED)
    best = min(losses, key=lambda rate: losses[rate])
    print(
        f"{piece}: tuned {best:g} ({losses[best]:.4f}), found {found['found']} "
        f"({found['loss_after']:.4f})",
        flush=True,
    )
    if any(other.start == piece for other in SIZES.values()):
        trained(size, data, "static", best, out, keep=folder / "model")


def corpus(out: Path, texts: Path | None) -> dict[str, torch.Tensor]:
    """Return rows of tokens to train on and to evaluate: of `wikitext2`, or installed sources."""
    file = out / ("sources.pt" if texts is None else "wikitext2.pt")
    if not file.exists():
        if texts is not None:
            lines = (texts / "wikitext2" / "train.txt").read_text(encoding="utf-8")
            documents = lines.split("\n \n")
        else:
            folders = [Path(package.__file__).parent for package in (torch, transformers)]
            files = [file for folder in folders for file in sorted(folder.rglob("*.py"))]
            random.Random(0).shuffle(files)
            documents = [path.read_text(encoding="utf-8", errors="replace") for path in files]
        tokenizer = train_tokenizer()
        ids: list[int] = []
        for start in range(0, len(documents), 256):
            for row in tokenizer(documents[start : start + 256])["input_ids"]:
                ids += [*row, tokenizer.eos_token_id]
            if len(ids) >= MOST_TOKENS:
                break
        tokens = torch.tensor(ids[: len(ids) // BLOCK * BLOCK]).view(-1, BLOCK)
        torch.save({"train": tokens[:-EVALUATED], "validation": tokens[-EVALUATED:]}, file)
    found: dict[str, torch.Tensor] = torch.load(file)
    return found


def model_of(size: Size, out: Path) -> Any:
    """Return the model of a size, new or as its start left it, with LoRA if it has a rank."""
    set_seed(0)
    if size.start is not None:
        model = GPT2LMHeadModel.from_pretrained(out / size.start / "model")
    else:
        config = GPT2Config(
            vocab_size=size.vocabulary or 2048,
            n_positions=BLOCK,
            n_layer=size.layers,
            n_embd=size.width,
            n_head=size.heads,
        )
        model = GPT2LMHeadModel(config)
    if size.lora is None:
        return model
    from peft import LoraConfig, get_peft_model

    modules = ["c_attn", "c_proj", "c_fc"]
    lora = LoraConfig(r=size.lora, lora_alpha=32, target_modules=modules, fan_in_fan_out=True)
    return get_peft_model(model, lora)


def trained(
    size: Size,
    data: dict[str, torch.Tensor],
    method: str,
    learning_rate: float,
    out: Path,
    keep: Path | None = None,
) -> dict[str, Any]:
    """Train, and return eval losses before and after, and the LR that was found."""
    model = model_of(size, out)
    steps = size.steps
    arguments = settings(
        out / "run",
        steps,
        size.batch,
        learning_rate=learning_rate,
        warmup_steps=round(atlas.WARMUP * steps),
    )
    trainer = PulseOptTrainer(
        model,
        arguments,
        train_dataset=Rows(data["train"]),
        eval_dataset=Rows(data["validation"]),
        pulse=PulseOptConfig(calibration="off" if method == "static" else "auto"),
    )
    before = trainer.evaluate()["eval_loss"]
    if method != "static":
        replayed = trainer.find_learning_rate().replayed_rows
        arguments.max_steps = steps - math.ceil(replayed / 3 / size.batch)  # as `compare` pays
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    if keep is not None:
        model.save_pretrained(keep)
    calibrator = None if trainer.aees is None else trainer.aees.calibrator
    outcome = None if calibrator is None else calibrator.outcome
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "passes": steps * size.batch / len(data["train"]),
        "loss_before": before,
        "loss_after": after if math.isfinite(after) else math.inf,
        "found": None if outcome is None else outcome.learning_rate,
    }


def static_losses(folder: Path) -> dict[float, float]:
    """Return the final eval losses of the static runs that are there, by LR."""
    runs = {float(file.stem.split("-", 1)[1]): read(file) for file in folder.glob("static-*.json")}
    return {rate: runs[rate]["loss_after"] for rate in sorted(runs)}


def summary(steps: int, folder: Path) -> dict[str, Any] | None:
    """Return tuned against found of a piece whose runs are all there."""
    losses = static_losses(folder)
    ours = read(folder / f"default-{atlas.UNTOUCHED:g}.json")
    if ours is None or atlas.UNTOUCHED not in losses:
        return None
    return {
        "steps": steps,
        "parameters": ours["parameters"],
        "passes": round(ours["passes"], 3),
        "tuned": tuned_lr(losses),
        "found": ours["found"],
        "losses": losses,
        "loss": {"untouched": losses[atlas.UNTOUCHED], "ours": ours["loss_after"]},
        "excess": excess(ours["loss_after"], ours["loss_before"], min(losses.values())),
    }


def to_markdown(result: dict[str, Any]) -> str:
    """Return a table of what a step costs, and one of the sizes, blank where nothing was run."""
    cost = result["overhead"]
    lines = [
        f"{result['card']}, a step of {1000 * cost['step_seconds']:.0f} ms:",
        "",
        "| variant | step time | extra peak memory |",
        "|---|---|---|",
    ]
    for name, row in cost["variants"].items():
        memory = round(row["extra_peak_mib"])
        lines.append(f"| {name} | {row['step_ratio']:.3f} x | {memory} MiB |")
    lines += [
        "",
        f"Calibration takes the time of {cost['calibration_steps']:.1f} optimizer steps and "
        f"{cost['calibration_batches']:.0f} batches, {cost['calibration_share']:.1%} of "
        f"{LONG_RUN:,} steps, and {max(0, round(cost['calibration_extra_peak_mib']))} MiB.",
        "",
    ]
    rows = {name: row["losses"] for name, row in result["sizes"].items()} | result["unfinished"]
    rates = sorted({float(rate) for losses in rows.values() for rate in losses})
    lines += [
        "| model | " + " | ".join(f"{rate:g}" for rate in rates) + " | tuned | found | its loss |",
        "|---" * (len(rates) + 4) + "|",
    ]
    for name, losses in rows.items():
        known = {float(rate): loss for rate, loss in losses.items()}
        cells = [f"{known[rate]:.3f}" if rate in known else "" for rate in rates]
        row = result["sizes"].get(name)
        found = ["", "", ""]
        if row is not None:
            found = [f"{row['tuned']:.1e}", f"{row['found']:.1e}", f"{row['loss']['ours']:.3f}"]
        lines.append(f"| {name} | {' | '.join([*cells, *found])} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
