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
        "Each knob is a field of `PulseOptConfig` and of `PulseOptTrainingArguments`, which uses "
        "Trainer's own `seed`. Recipes take the knobs as keys, and `pulseopt-hf train` takes them "
        "as flags. Bad values raise one `ValueError` that names all of them.",
        "`PulseOptConfig.published()` is the method of `pulseopt` 0.3.0. If its default differs "
        "from the recommended one, both are given.",
        "## Settings of the method",
        "A resumed run must have the same values as the run that it continues.",
        *map(_knob, method),
        "## Safeguards and measurements",
        "A resumed run may have other values of these.",
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
