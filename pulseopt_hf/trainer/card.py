"""The model card's section on what the method did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from huggingface_hub import metadata_load, metadata_save

from pulseopt_hf.aees.left_out import ArmTotals
from pulseopt_hf.config import PulseOptConfig
from pulseopt_hf.optim import AEES

# The hub has fields for tags and for scores, which Trainer fills in, and none for learning rates.
TAGS = ("pulseopt_hf", "aees")
# What stands between them is ours to write anew; all else in a card is somebody else's.
BEGIN, END = "<!-- pulseopt_hf: begin -->", "<!-- pulseopt_hf: end -->"


def add_section(trainer: Any) -> None:
    """Add a section and tags to the model card that Trainer has just written.

    A section that is there already is replaced, and the text round it stays. Nothing is done where
    nothing was done to the LR, on a rank that writes no card, and where there is none.
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
        The text, or `None` where nothing was done to the LR.
    """
    aees: AEES | None = getattr(trainer, "aees", None)
    if aees is None or aees.is_plain:
        return None
    plays = not aees.controller.is_neutral
    logged = [
        float(entry["pulse/learning_rate"])
        for entry in trainer.state.log_history
        if "pulse/learning_rate" in entry
    ]
    outcome = None if aees.calibrator is None else aees.calibrator.outcome
    done = ["calibrated"] if outcome is not None and outcome.reason is None else []
    done += ["adapted in episodes by AEES"] if plays else []
    said = f"was {' and '.join(done)}" if done else "is the one that was set"
    blocks = [
        BEGIN,
        "## Learning rate",
        f"The learning rate {said} (`pulseopt_hf`).",
        table(("", "value"), [*_rate_rows(aees, logged), *_count_rows(aees, plays)]),
    ]
    if plays and aees.controller.records:
        blocks += ["### Arms that were played", arms_table(aees.controller.totals())]
    if knobs := _knob_rows(aees.config, plays):
        blocks += ["### Knobs", table(("knob", "value"), knobs)]
    return "\n\n".join([*blocks, END])


def arms_table(arms: Iterable[ArmTotals]) -> str:
    """Return a table of how often each arm was played and how it was rewarded."""
    rows = [
        (
            f"x{arm.lr_multiplier:g}",
            f"{arm.noise_std:g}",
            str(arm.plays),
            str(arm.steps),
            f"{arm.mean:+.4f}",
            f"{arm.lowest:+.4f} to {arm.highest:+.4f}",
        )
        for arm in arms
    ]
    return table(("LR multiplier", "noise", "episodes", "steps", "mean reward", "rewards"), rows)


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table. Cells may hold anything: they neither end a cell nor a row."""
    lines: list[Sequence[object]] = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(value: object) -> str:
    return " ".join(str(value).replace("|", "\\|").replace("<", "&lt;").split())


def _rate_rows(aees: AEES, logged: list[float]) -> list[tuple[str, str]]:
    if aees.calibrator is None:
        rows = [("Base learning rate", f"{aees.set_lr:.4g}")]
    else:
        search, outcome = aees.calibrator.search, aees.calibrator.outcome
        rows = [("Learning rate that was set", f"{aees.set_lr:.4g}")]
        if outcome is None:
            text = "none: training ended amid the search"
        elif outcome.reason is not None:
            text = f"none: {outcome.reason}"
        else:
            text = f"{outcome.learning_rate:.4g}, found in {len(search.trials)} trials"
        rows.append(("Calibrated learning rate", text))
    if logged:
        text = f"{min(logged):.4g} to {max(logged):.4g}"
        rows.append(("Effective learning rate", f"{text}, of the {len(logged)} steps logged"))
    return rows


def _count_rows(aees: AEES, plays: bool) -> list[tuple[str, str]]:
    rows = [("Episodes", str(aees.controller.closed))] if plays else []
    if aees.skipped_steps:
        rows.append(("Skipped steps", str(aees.skipped_steps)))
    outcomes = Counter[str]()
    for arm in aees.controller.totals():
        outcomes.update(arm.outcomes)
    rows += [(f"Episodes that were {name}", str(n)) for name, n in sorted(outcomes.items())]
    return rows


def _knob_rows(config: PulseOptConfig, plays: bool) -> list[tuple[str, str]]:
    """The knobs that were changed, and with arms those that followed from the run."""
    default = PulseOptConfig()
    followed = () if plays else ("episode_length", "seed")
    return [
        (f"`{field.name}`", f"`{value}`")
        for field in fields(config)
        if (value := getattr(config, field.name)) != getattr(default, field.name)
        and field.name not in followed
    ]
