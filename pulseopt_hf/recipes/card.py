"""The model card of a run: its results, its arms and how to make it again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from pulseopt_hf.recipes import folder
from pulseopt_hf.recipes.parsing import Resolved
from pulseopt_hf.trainer.card import TAGS, table

_PIPELINE = {
    "text-classification": "text-classification",
    "text-regression": "text-classification",
    "causal-lm": "text-generation",
    "masked-lm": "fill-mask",
    "image-classification": "image-classification",
}


def write_card(path: Path, resolved: Resolved, results: dict[str, Any], arms: str | None) -> None:
    """Write `README.md` in the form that the hub reads.

    Args:
        path: the run folder.
        resolved: the recipe.
        results: what `all_results.json` holds.
        arms: the section on what the method did, or `None` for a run without training.
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
        tags=list(TAGS),
    )
    source = "local files" if local else recipe.dataset_name
    sections = [
        f"---\n{data.to_yaml()}\n---",
        f"# {path.resolve().name}",
        f"`{base or 'a new ' + str(recipe.model_type)}` trained for `{recipe.task}` on {source}, "
        "with the learning rate adapted in episodes by AEES (`pulseopt_hf`).",
        "## Results",
        table(("result", "value"), _result_rows(results)),
    ]
    if arms is not None:
        sections.append(arms)
    sections += [
        "## To run it again",
        f"`{folder.RECIPE}` in this folder is the whole recipe: "
        f"`pulseopt-hf train {folder.RECIPE}`. Versions, command and commit are in "
        f"`{folder.RUN}`, every episode in `episodes.json`.",
    ]
    (path / "README.md").write_text("\n\n".join(sections) + "\n", encoding="utf-8")


def _result_rows(results: dict[str, Any]) -> list[tuple[str, ...]]:
    return [
        (key, f"{value:.4g}" if isinstance(value, float) else str(value))
        for key, value in sorted(results.items())
    ]
