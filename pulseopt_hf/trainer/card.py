"""The model card's section on what the method did."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from pulseopt_hf.config import PulseOptConfig
from pulseopt_hf.optim import AEES

TAG = "pulseopt_hf"
_HEADING = "## Learning rate"


def add_section(trainer: Any) -> None:
    """Add a section and a tag to the model card that Trainer has just written.

    Nothing is done before a first training, on a rank that writes no card, and where there is none.
    """
    aees: AEES | None = getattr(trainer, "aees", None)
    file = Path(trainer.args.output_dir) / "README.md"
    if aees is None or not trainer.is_world_process_zero() or not file.exists():
        return
    card = ModelCard.load(file, ignore_metadata_errors=True)
    tags = list(getattr(card.data, "tags", None) or [])
    if TAG not in tags:
        card.data.tags = [*tags, TAG]
    used = [
        entry["pulse/learning_rate"]
        for entry in trainer.state.log_history
        if "pulse/learning_rate" in entry
    ]
    text = card.text.split(f"\n{_HEADING}\n")[0].rstrip()
    card.text = f"{text}\n\n{section(aees, used)}"
    card.save(file)


def section(aees: AEES, used: list[float]) -> str:
    """Return the section as Markdown.

    Args:
        aees: the AEES of the run.
        used: effective LRs that were logged.
    """
    lines = [_HEADING, "", "Adapted in episodes by pulseopt_hf."]
    if used:
        lines[-1] += f" Effective learning rates logged: {min(used):.3g} to {max(used):.3g}."
    if aees.calibration is not None:
        lines[-1] += f" Calibrated: {aees.calibration.scale:.3g} times the base learning rate."
    plays = Counter((record.lr_value, record.noise_value) for record in aees.controller.records)
    if plays:
        lines += ["", "| LR multiplier | noise | episodes |", "|---|---|---|"]
        lines += [f"| x{lr:g} | {noise:g} | {plays[lr, noise]} |" for lr, noise in sorted(plays)]
    lines += ["", "| knob | value |", "|---|---|"]
    default = PulseOptConfig()
    for field in fields(aees.config):
        value = getattr(aees.config, field.name)
        if value != getattr(default, field.name):
            lines.append(f"| `{field.name}` | `{value}` |")
    lines += ["", "Knobs that are not listed have their defaults."]
    return "\n".join(lines) + "\n"
