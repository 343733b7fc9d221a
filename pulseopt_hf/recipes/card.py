"""The model card of a run: its results, its arms and how to make it again."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from pulseopt_hf.config import PulseOptConfig, PulseOptKnobs
from pulseopt_hf.recipes import folder
from pulseopt_hf.recipes.parsing import Resolved

_PIPELINE = {
    "text-classification": "text-classification",
    "text-regression": "text-classification",
    "causal-lm": "text-generation",
    "masked-lm": "fill-mask",
    "image-classification": "image-classification",
}


def write_card(path: Path, resolved: Resolved, results: dict[str, Any], logs: Any) -> None:
    """Write `README.md` in the form that the hub reads.

    Args:
        path: the run folder.
        resolved: the recipe.
        results: what `all_results.json` holds.
        logs: the episodes, as `AEES.get_logs()` returns them, or `None` for a run without training.
    """
    recipe = resolved.recipe
    base = recipe.model_name_or_path
    # A local folder or file is nobody else's to find.
    on_hub = base is not None and ":" not in base and not Path(base).exists()
    local = recipe.train_file or recipe.validation_file
    named = recipe.dataset_name is not None and ":" not in recipe.dataset_name
    data = ModelCardData(
        base_model=base if on_hub else None,
        datasets=[str(recipe.dataset_name)] if named and not local else None,
        library_name="peft" if recipe.lora_r else "transformers",
        metrics=recipe.metrics or None,
        pipeline_tag=_PIPELINE.get(recipe.task),
        tags=["pulseopt", "aees"],
    )
    source = "local files" if local else recipe.dataset_name
    sections = [
        f"---\n{data.to_yaml()}\n---",
        f"# {path.resolve().name}",
        f"`{base or 'a new ' + str(recipe.model_type)}` trained for `{recipe.task}` on {source}, "
        "with the learning rate adapted in episodes by AEES (`pulseopt_hf`).",
        "## Results",
        _table(("result", "value"), _result_rows(results)),
    ]
    if logs is not None and logs["selected_lr_values"]:
        sections += ["## Arms", arms_summary(logs)]
    sections += [
        "## Settings of AEES",
        _table(("knob", "value", "meaning"), _knob_rows(resolved)),
        "## To run it again",
        f"`{folder.RECIPE}` in this folder is the whole recipe: "
        f"`pulseopt-hf train {folder.RECIPE}`. Versions, command and commit are in "
        f"`{folder.RUN}`, every episode in `episodes.json`.",
    ]
    (path / "README.md").write_text("\n\n".join(sections) + "\n", encoding="utf-8")


def arms_summary(logs: dict[str, list[Any]]) -> str:
    """Return a table of how often each arm was played and how it was rewarded.

    Args:
        logs: the episodes, as `AEES.get_logs()` returns them.
    """
    rewards: dict[tuple[float, float], list[float]] = defaultdict(list)
    steps: dict[tuple[float, float], int] = defaultdict(int)
    for lr, noise, reward, start, end in zip(
        logs["selected_lr_values"],
        logs["selected_noise_values"],
        logs["episode_rewards"],
        logs["episode_start_steps"],
        logs["episode_end_steps"],
        strict=True,
    ):
        rewards[lr, noise].append(reward)
        steps[lr, noise] += end - start + 1
    rows = [
        (
            f"x{arm[0]:g}",
            f"{arm[1]:g}",
            str(len(played)),
            str(steps[arm]),
            f"{sum(played) / len(played):+.4f}",
        )
        for arm, played in sorted(rewards.items())
    ]
    return _table(("LR multiplier", "noise", "episodes", "steps", "mean reward"), rows)


def _result_rows(results: dict[str, Any]) -> list[tuple[str, ...]]:
    return [
        (key, f"{value:.4g}" if isinstance(value, float) else str(value))
        for key, value in sorted(results.items())
    ]


def _knob_rows(resolved: Resolved) -> list[tuple[str, ...]]:
    defaults = PulseOptConfig()
    rows: list[tuple[str, ...]] = []
    for field in dataclasses.fields(PulseOptKnobs):
        value = getattr(resolved.training, field.name)
        if value != getattr(defaults, field.name) or field.name == "lr_candidates":
            rows.append((f"`{field.name}`", f"`{value}`", str(field.metadata["help"])))
    return rows


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines
    )
