"""The command: what is said before the runs and between them, and what is written after."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pulseopt_hf.command_line import aligned
from pulseopt_hf.compare.cells import expected_seconds, result_of, run_in_subprocess
from pulseopt_hf.compare.drawing import draw
from pulseopt_hf.compare.plan import Plan, plan_of
from pulseopt_hf.compare.scores import score
from pulseopt_hf.compare.summary import about, markdown, scores_table, table, verdict
from pulseopt_hf.errors import UsageError
from pulseopt_hf.report.wording import counted


def compare(words: Sequence[str]) -> Path:
    """Run what is not there yet of a comparison, say what came of it, and write it.

    Args:
        words: the recipe and the command's options; those it does not know are the recipe's keys.

    Returns:
        The folder with `compare.json`, `compare.md`, `compare.svg` and a file for each cell.

    Raises:
        UsageError: an option, the recipe or its data is wrong.
        KeyboardInterrupt: it was stopped; the message says how it goes on.
    """
    plan = plan_of(words)
    folder = plan.folder
    (folder / "cells").mkdir(parents=True, exist_ok=True)
    results = _run(plan)
    try:
        scores = score(results)
    except ValueError as error:
        raise UsageError(str(error)) from error
    content: dict[str, Any] = {
        "recipe": plan.recipe,
        "options": plan.options,
        "scores": asdict(scores),
        "cells": results,
    }
    (folder / "compare.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    said, rows = verdict(results, scores, plan.own_lr), table(results, scores, plan.own_lr)
    parts = [said, markdown(rows), scores_table(plan.recipe, plan.steps, len(plan.seeds), scores)]
    (folder / "compare.md").write_text("\n".join(f"{part}\n" for part in parts), encoding="utf-8")
    print("", said, "", *aligned(rows), "", sep="\n")
    print(f"In {folder}: compare.md has this and the scores, compare.json every run,")
    if draw({plan.recipe: (results, content["scores"])}, folder / "compare.svg"):
        print("compare.svg the picture.")
    else:
        print("but no picture, which needs pip install 'pulseopt-hf[report]'.")
    return folder


def _run(plan: Plan) -> list[dict[str, Any]]:
    """Run the cells that have no result yet, and return the results of all."""
    folder = plan.folder / "cells"
    cells = plan.cells
    missing = {run for run in plan.runs if result_of(run, folder) is None}
    results: list[dict[str, Any]] = []
    print(plan, flush=True)
    # To a file, where a bar would be many lines, it writes none.
    bar = tqdm(
        total=len(missing),
        disable=None,
        leave=False,
        smoothing=0.0,
        bar_format="{bar:30} {n_fmt} of {total_fmt} runs, {remaining} left",
    )
    try:
        if missing:
            seconds = expected_seconds(cells[0]) * len(missing)
            left = "" if missing == plan.runs else f"{counted(len(missing), 'run')} to go. "
            tqdm.write(f"{left}About {about(seconds)}; Ctrl-C stops, and finished runs are kept.")
            bar.unpause()
        for index, cell in enumerate(cells, 1):
            run = plan.run_of(cell)
            result = run_in_subprocess(run, folder)
            results.append({**result, "cell": asdict(cell)})
            bar.update(run in missing)
            missing.discard(run)
            loss = result["loss_after"]
            shown = "not finite" if loss is None else f"{loss:.4f}"
            tqdm.write(
                f"{index}/{len(cells)}  {cell.method} at {cell.learning_rate:g}, seed "
                f"{cell.seed}: eval loss {result['loss_before']:.4f} to {shown}, "
                f"{result['seconds']:.0f} s"
            )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"stopped with {counted(len(missing), 'run')} to go. Finished runs are kept: the same "
            "command continues from there."
        ) from None
    finally:
        bar.close()
    return results
