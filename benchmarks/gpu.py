"""What can only be measured on a GPU: the cost of a step of GPT-2, and calibration at size.

    python -m benchmarks.gpu --data FOLDER [--pieces overhead,gpt_10m,...] [--out FOLDER] [--write]

`overhead` trains GPT-2 of 124M parameters, in bf16 with a fused AdamW, as `overhead.py` does a
small model on a CPU: variants in turn in one process, times as ratios to the vanilla Trainer's, the
median over rounds. The other pieces train models of a size from scratch on the sources of the
installed packages, and fine-tune one of them on `wikitext2` of FOLDER, whole and with LoRA. In each
the static LR is tuned on a grid of half decades, and the default is run from 5e-5; see `atlas.py`.
What was run before is kept in `--out` and not run again. `--write` puts what is there into
`benchmarks/results`.
"""

from __future__ import annotations

import contextlib
import json
import math
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments, set_seed

from benchmarks import atlas, common, overhead
from pulseopt_hf import PulseOptConfig, PulseOptTrainer
from pulseopt_hf.aees.calibration import SHORTEST_RUN
from pulseopt_hf.compare.cells import steps_after_calibration
from pulseopt_hf.compare.scores import excess, tuned_lr
from pulseopt_hf.compare.summary import markdown
from pulseopt_hf.embedded import train_tokenizer
from pulseopt_hf.files import write_whole
from pulseopt_hf.trainer import session

OUT = Path("runs/gpu")
RESULT = common.RESULTS / "gpu.json"
VARIANTS = (*overhead.VARIANTS, "lr, guard off")
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
    parser = common.parser(str(__doc__), RESULT)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--pieces", default=",".join(["overhead", *SIZES]))
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--batch", type=int, default=32, help="rows of the overhead's step")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device")
    options.out.mkdir(parents=True, exist_ok=True)
    for piece in options.pieces.split(","):
        if piece == "overhead":
            file = options.out / "overhead.json"
            once(file, lambda: cost_of_a_step(options.rounds, options.batch))
        else:
            measure(piece, options.data, options.out)
    sizes = {name: summary(SIZES[name].steps, options.out / name) for name in SIZES}
    packages = ("torch", "transformers", "accelerate", "pulseopt-hf")
    result = {
        "card": torch.cuda.get_device_name(),
        "versions": {name: version(name) for name in packages},
        "overhead": common.read(options.out / "overhead.json"),
        "sizes": {name: found for name, found in sizes.items() if found is not None},
        "unfinished": {
            name: losses
            for name, found in sizes.items()
            if found is None and (losses := static_losses(options.out / name))
        },
    }
    common.finish(result, to_markdown, options.write)


def once(file: Path, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what a file holds, and make it by `run` where it is not there."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(run()) + "\n")
    found: dict[str, Any] = common.read(file)
    return found


def rows_of(tokens: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """Return rows of tokens as a causal language model is given them."""
    return [{"input_ids": row, "labels": row} for row in tokens]


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


def cost_of_a_step(rounds: int, batch: int, steps: int = 8) -> dict[str, Any]:
    """Return step times and peak memory of the variants, and what a calibration costs."""
    peaks: dict[str, float] = {}
    data = rows_of(torch.randint(0, 50257, (batch * (steps + 2), 1024)))
    set_seed(0)
    model = GPT2LMHeadModel(GPT2Config()).cuda()

    def shared(steps: int) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        arguments = settings(OUT / "overhead", steps, batch, learning_rate=1e-5)
        trained = {"model": model, "optimizers": (optimizer, None)}
        return {**trained, "args": arguments, "train_dataset": data}

    def timed(what: str, trainer: Any) -> float:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        start = now()
        trainer.train()
        seconds = now() - start
        peaks[what] = torch.cuda.max_memory_allocated() / 2**20
        return seconds

    parts = shared(steps + 2)
    trainers = {variant: overhead.trainer_of(variant, **parts) for variant in VARIANTS}

    def train(variant: str) -> float:
        clock = overhead.Clock(now, warm_up=2)
        trainers[variant].add_callback(clock)
        unguarded = patch.object(session, "is_finite", lambda norm: True)
        with unguarded if "guard off" in variant else contextlib.nullcontext():
            timed(variant, trainers[variant])
        trainers[variant].remove_callback(clock)
        return clock.seconds

    def calibrate(calibration: str) -> tuple[float, PulseOptTrainer]:
        pulse = PulseOptConfig(calibration=calibration)
        trainer = PulseOptTrainer(**shared(SHORTEST_RUN), pulse=pulse)
        return timed(calibration, trainer), trainer

    times = overhead.times_of(VARIANTS, rounds, train)
    calibration = overhead.calibration_cost(calibrate, rounds=3)
    return {
        "parameters": model.num_parameters(),
        "batch": batch,
        "tokens": 1024,
        "rounds": rounds,
        "steps_a_round": steps,
        "published": version("pulseopt"),
        "step_seconds": statistics.median(times["vanilla"]),
        **calibration,
        "calibration_extra_peak_mib": peaks["trust_region"] - peaks["off"],
        "variants": overhead.compared(times, peaks),
    }


def now() -> float:
    """Return the time, in seconds, when the device has done what it was given."""
    torch.cuda.synchronize()
    return time.perf_counter()


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
        train_dataset=rows_of(data["train"]),
        eval_dataset=rows_of(data["validation"]),
        pulse=PulseOptConfig(calibration="off" if method == "static" else "auto"),
    )
    before = trainer.evaluate()["eval_loss"]
    if method != "static":
        arguments.max_steps = steps_after_calibration(trainer, steps, size.batch)
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
    files = {float(file.stem.split("-", 1)[1]): file for file in folder.glob("static-*.json")}
    return {rate: common.read(files[rate])["loss_after"] for rate in sorted(files)}


def summary(steps: int, folder: Path) -> dict[str, Any] | None:
    """Return tuned against found of a piece whose runs are all there."""
    losses = static_losses(folder)
    file = folder / f"default-{atlas.UNTOUCHED:g}.json"
    if not file.exists() or atlas.UNTOUCHED not in losses:
        return None
    ours = common.read(file)
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
    losses = {name: row["losses"] for name, row in result["sizes"].items()} | result["unfinished"]
    rates = sorted({rate for own in losses.values() for rate in own}, key=float)
    rows = [("model", *(f"{float(rate):g}" for rate in rates), "tuned", "found", "its loss")]
    for name, own in losses.items():
        found = ["", "", ""]
        if row := result["sizes"].get(name):
            found = [f"{row['tuned']:.1e}", f"{row['found']:.1e}", f"{row['loss']['ours']:.3f}"]
        rows.append((name, *(f"{own[r]:.3f}" if r in own else "" for r in rates), *found))
    return (
        f"{result['card']}, a step of {1000 * cost['step_seconds']:.0f} ms:\n\n"
        f"{overhead.to_markdown(cost)}\n{markdown(rows)}\n"
    )


if __name__ == "__main__":
    main()
