"""The picture of a comparison: final loss over the base LR, a line for each method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pulseopt_hf.compare.scores import Scores

# Okabe and Ito's colours, which the colour-blind tell apart.
_COLOURS = ("#000000", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999")


def draw(tasks: Mapping[str, tuple[Sequence[dict[str, Any]], Scores]], file: Path) -> bool:
    """Draw one panel a task and save them as one SVG.

    Lines are means over seeds, bars reach from the lowest to the highest. A run whose loss is not
    finite, or above the loss before training, is drawn there.

    Args:
        tasks: name of each task, with its cells as `run_apart` returned them and their scores.
        file: where to save it.

    Returns:
        Whether it was drawn: matplotlib is in the extra `report`.
    """
    try:
        import matplotlib
    except ImportError:
        return False
    from matplotlib.figure import Figure

    columns = min(3, len(tasks))
    rows = -(-len(tasks) // columns)
    figure = Figure(figsize=(1.5 + 3.6 * columns, 0.6 + 2.9 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    methods = list(dict.fromkeys(c["cell"]["method"] for cells, _ in tasks.values() for c in cells))
    lines: dict[str, Any] = {}
    for axis, (name, (cells, scores)) in zip(axes, tasks.items(), strict=False):
        for method in dict.fromkeys(c["cell"]["method"] for c in cells):
            colour = _COLOURS[methods.index(method) % len(_COLOURS)]
            lines[method] = _line(axis, method, cells, scores.loss_before, colour)
        axis.axhline(scores.loss_tuned, color="#999999", linewidth=0.8, linestyle=":")
        axis.set_xscale("log")
        axis.set_title(name)
        axis.set_xlabel("base learning rate")
        axis.set_ylabel("final eval loss")
        axis.grid(alpha=0.2)
    for axis in axes[len(tasks) :]:
        axis.set_axis_off()
    figure.legend(lines.values(), lines, loc="outside upper left", ncols=8, frameon=False)
    with matplotlib.rc_context({"svg.hashsalt": "pulseopt_hf"}):  # equal pictures are equal files
        figure.savefig(file, format="svg", metadata={"Date": None})
    return True


def _line(
    axis: Any, method: str, cells: Sequence[dict[str, Any]], loss_before: float, colour: str
) -> Any:
    losses: dict[float, list[float]] = {}
    for cell in cells:
        if cell["cell"]["method"] == method:
            loss = cell["loss_after"]
            bounded = loss_before if loss is None else min(loss, loss_before)
            losses.setdefault(cell["cell"]["learning_rate"], []).append(bounded)
    rates = sorted(losses)
    means = [sum(losses[rate]) / len(losses[rate]) for rate in rates]
    # Rounding may put the mean of equal losses beside them, and matplotlib takes no length below 0.
    below = [max(0.0, mean - min(losses[rate])) for rate, mean in zip(rates, means, strict=True)]
    above = [max(0.0, max(losses[rate]) - mean) for rate, mean in zip(rates, means, strict=True)]
    return axis.errorbar(
        rates, means, yerr=[below, above], label=method, color=colour, marker="o", capsize=3
    )
