"""The model card's section on what the method did."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from huggingface_hub import metadata_load, metadata_save

from pulseopt_hf.aees import EpisodeRecord
from pulseopt_hf.config import PulseOptConfig, method_settings
from pulseopt_hf.optim import AEES

# The hub has fields for tags and for scores, which Trainer fills in, and none for learning rates.
TAGS = ("pulseopt_hf", "aees")
# What stands between them is ours to write anew; all else in a card is somebody else's.
BEGIN, END = "<!-- pulseopt_hf: begin -->", "<!-- pulseopt_hf: end -->"


def add_section(trainer: Any) -> None:
    """Add a section and tags to the model card that Trainer has just written.

    A section that is there already is replaced, and the text round it stays. Nothing is done before
    a first training, on a rank that writes no card, and where there is none.
    """
    file = Path(trainer.args.output_dir) / "README.md"
    written = section(trainer)
    if written is None or not trainer.is_world_process_zero() or not file.exists():
        return
    file.write_text(with_section(file.read_text(encoding="utf-8"), written), encoding="utf-8")
    data = metadata_load(file) or {}
    tags = data.get("tags") or []
    tags = [tags] if isinstance(tags, str) else list(tags)
    data["tags"] = [*tags, *(tag for tag in TAGS if tag not in tags)]
    metadata_save(file, data)


def with_section(card: str, written: str) -> str:
    """Return a card's text with a section in place of the one that it has, or at its end.

    Args:
        card: the text of a model card.
        written: a section, as `section` returns it.
    """
    before, begin, rest = card.rpartition(BEGIN)
    _, end, after = rest.partition(END)
    if begin and end:
        return before + written + after
    return f"{card.rstrip()}\n\n{written}\n"


def section(trainer: Any) -> str | None:
    """Return the section of a Trainer's current or latest run as Markdown, between its markers.

    Args:
        trainer: a Trainer that has AEES.

    Returns:
        The text, or `None` before a first training.
    """
    aees: AEES | None = getattr(trainer, "aees", None)
    if aees is None:
        return None
    logged = [
        float(entry["pulse/learning_rate"])
        for entry in trainer.state.log_history
        if "pulse/learning_rate" in entry
    ]
    # A scheduler notes in each group where it began; `reduce_lr_on_plateau` does not.
    base = aees.optimizer.param_groups[0].get("initial_lr", trainer.args.learning_rate)
    rows = [*_rate_rows(aees, float(base), logged), *_count_rows(aees)]
    blocks = [
        BEGIN,
        "## Learning rate",
        "The learning rate was adapted in episodes by AEES (`pulseopt_hf`).",
        table(("", "value"), rows),
    ]
    if aees.controller.records:
        blocks += ["### Arms that were played", arms_table(aees.controller.records)]
    blocks += ["### Knobs", table(("knob", "value"), _knob_rows(aees.config)), END]
    return "\n\n".join(blocks)


def arms_table(records: Sequence[EpisodeRecord]) -> str:
    """Return a table of how often each arm was played and how it was rewarded."""
    played: dict[tuple[float, float], list[EpisodeRecord]] = defaultdict(list)
    for record in records:
        played[record.lr_value, record.noise_value].append(record)
    rows = []
    for (multiplier, noise), episodes in sorted(played.items()):
        steps = sum(record.end_step - record.start_step + 1 for record in episodes)
        rewards = [record.reward for record in episodes]
        rows.append(
            (
                f"x{multiplier:g}",
                f"{noise:g}",
                str(len(episodes)),
                str(steps),
                f"{sum(rewards) / len(rewards):+.4f}",
                f"{min(rewards):+.4f} to {max(rewards):+.4f}",
            )
        )
    return table(("LR multiplier", "noise", "episodes", "steps", "mean reward", "rewards"), rows)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table. Cells may hold anything: they neither end a cell nor a row."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())


def _rate_rows(aees: AEES, base: float, logged: list[float]) -> list[tuple[str, str]]:
    rows = [("Base learning rate", f"{base:.4g}")]
    search = aees.calibration
    if search is not None and search.is_done:
        text = f"{base * search.scale:.4g}, {search.scale:.4g} times the base learning rate"
        rows.append(("Calibrated learning rate", text))
    elif search is not None:
        rows.append(("Calibrated learning rate", "none: training ended amid the search"))
    if logged:
        text = (
            f"{min(logged):.4g} to {max(logged):.4g}, of the {len(logged)} steps that were logged"
        )
        rows.append(("Effective learning rate", text))
    return rows


def _count_rows(aees: AEES) -> list[tuple[str, str]]:
    records = aees.controller.records
    rows = [("Episodes", str(len(records)))]
    if aees.skipped_steps:
        rows.append(("Skipped steps", str(aees.skipped_steps)))
    outcomes = Counter(record.outcome for record in records if record.outcome is not None)
    rows += [(f"Episodes that were {name}", str(n)) for name, n in sorted(outcomes.items())]
    return rows


def _knob_rows(config: PulseOptConfig) -> list[tuple[str, str]]:
    """All knobs that say what the method is, and of the others those that were changed."""
    default, method = PulseOptConfig(), method_settings(config)
    return [
        (f"`{field.name}`", f"`{value}`")
        for field in fields(config)
        if (value := getattr(config, field.name)) != getattr(default, field.name)
        or field.name in method
    ]
