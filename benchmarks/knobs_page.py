"""The page of knobs, made from their metadata; `python -m benchmarks.tables --write` keeps it."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

from pulseopt_hf.config import OPERATIONAL_KNOBS, PulseOptConfig


def knobs_page() -> str:
    """Return the page: of each knob its default, what else it may be, and its help text."""
    fields = dataclasses.fields(PulseOptConfig)
    method = [field for field in fields if field.name not in OPERATIONAL_KNOBS]
    watch = [field for field in fields if field.name in OPERATIONAL_KNOBS]
    blocks = [
        "# Knobs",
        "Each knob is a field of `PulseOptConfig`. `PulseOptTrainingArguments` has them too, "
        "beside Trainer's own arguments and with Trainer's `seed`. A recipe takes them as keys, "
        "and `pulseopt-hf train` as flags. Bad values raise `ValueError`, all of them in one "
        "message.",
        "`PulseOptConfig.published()` is the method of `pulseopt` 0.3.0. Where its default "
        "differs, it is given beside the recommended one.",
        "## What the method does",
        "A resumed run must have the values of the run that it continues.",
        *map(_knob, method),
        "## How a run is watched over",
        "A run may be resumed with other values of these.",
        *map(_knob, watch),
    ]
    return "\n\n".join(blocks) + "\n"


def _knob(field: dataclasses.Field[Any]) -> str:
    default = getattr(PulseOptConfig(), field.name)
    published = getattr(PulseOptConfig.published(), field.name)
    hint = typing.get_type_hints(PulseOptConfig)[field.name]
    facts = f"Default `{default}`"
    if published != default:
        facts += f", published `{published}`"
    if typing.get_origin(hint) is typing.Literal:
        facts += ". One of " + ", ".join(f"`{choice}`" for choice in typing.get_args(hint))
    return f"### `{field.name}`\n\n{facts}.\n\n{field.metadata['help']}"
