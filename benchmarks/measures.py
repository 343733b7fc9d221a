"""How far one step at the tuned LR moves a model, in each measure that a calibration could take.

    python -m benchmarks.measures --data FOLDER [--settings sst2,...] [--write]

A good measure has the same value at the tuned LR in every setting. Of each setting of the atlas,
one step of the optimizer is taken from the start on each of five batches, at the tuned LR of
`benchmarks/results/atlas.json`. It is measured on about 32 rows of other batches, as the root mean
square over the batches. Settings of several passes stand apart, as their tuned LR is lower for what
no step shows.

- outputs: change of the logits, without what classes share, over that under dropout of a tenth;
- body: the same of what the last layer returns;
- logits: change of the logits, without what classes share;
- Fisher: change of log p(y), with y as the model predicts it before the step;
- weights: root mean square of the change of the weight matrices over theirs, of those that move and
  of those that are not zero.

`--write` puts the result into `benchmarks/results/measures.json`.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import atlas, common, compare_tasks
from pulseopt_hf.compare.cells import Cell, trainer_of
from pulseopt_hf.compare.summary import markdown
from pulseopt_hf.optim.agreement import Agreement
from pulseopt_hf.optim.base_lr import skip_warmup
from pulseopt_hf.optim.movement import Reading, distance, noise, read, read_body
from pulseopt_hf.optim.newness import newness_of

RESULT = common.RESULTS / "measures.json"
MEASURES = ("outputs", "body", "logits", "Fisher", "weights")
ROWS, BATCHES, DRAWS = 32, 5, 4
KINDS = (
    *("a new head on a trained model", "a new head and adapters"),
    *("no new head", "no new head, but adapters"),
    "a new head, several passes",
)


def measure(name: str, tuned: float, data: Path, out: Path) -> dict[str, Any]:
    """Return what a step at the tuned LR of a setting moves, and of what kind its model is."""
    setting = atlas.SETTINGS[name]
    recipe = str(compare_tasks.TASKS_FOLDER / f"{setting.task}.yaml")
    cell = Cell(recipe, atlas.options_of(setting, data, out), "static", tuned, 0, setting.steps)
    with trainer_of(cell, "--eval_strategy", "no") as (trainer, _):
        model: torch.nn.Module = trainer.model
        newness = newness_of(model, Agreement(torch.device("cpu")))
        rows = iter(trainer.get_train_dataloader())
        batches = [next(rows) for _ in range(math.ceil(ROWS / setting.batch) + BATCHES)]
        probe = batches[BATCHES:]
        before = outputs(model, probe, newness.body)
        unit = [0.0, 0.0]
        for draw in range(DRAWS):
            with noise(model, draw):
                moved = distances(before, outputs(model, probe, newness.body))
            unit = [total + one / DRAWS for total, one in zip(unit, moved, strict=True)]
        start = {key: value.clone() for key, value in model.state_dict().items()}
        squares = defaultdict[str, list[float]](list)
        for batch in batches[:BATCHES]:
            step(trainer, batch, tuned)
            after = outputs(model, probe, newness.body)
            moved = distances(before, after)
            for key, one, size in zip(("outputs", "body"), moved, unit, strict=True):
                squares[key] += [one / size] if size else []
            logits = [[part for part in call if not part.is_body] for call in before]
            squares["logits"].append(moved[0] / count(logits))
            squares["Fisher"].append(fisher(before, after))
            squares["weights"].append(weights(model, start))
            model.load_state_dict(start)
    found = {key: math.sqrt(statistics.fmean(values)) for key, values in squares.items() if values}
    kind = KINDS[2 * (not newness.has_new_head) + ("lora" in name)]
    kind = kind if atlas.passes_once(name) else KINDS[-1]
    return {"tuned": tuned, "kind": kind, **found}


def step(trainer: Any, batch: Any, learning_rate: float) -> None:
    """Take the first step of a new optimizer."""
    trainer.optimizer = None
    trainer.create_optimizer()
    skip_warmup(trainer.optimizer)
    if hasattr(trainer.optimizer, "train"):  # schedule-free
        trainer.optimizer.train()
    model = trainer.model.train()
    model.zero_grad()
    model(**trainer._prepare_inputs(batch)).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
    for group in trainer.optimizer.param_groups:
        group["lr"] = learning_rate
    trainer.optimizer.step()


@torch.no_grad()
def outputs(
    model: torch.nn.Module, probe: list[Any], body: torch.nn.Module | None
) -> list[list[Reading]]:
    """Read the logits of each batch, and what the body returns."""
    model.eval()
    hidden: list[Any] = []
    handle = (body or model).register_forward_hook(lambda *args: hidden.append(args[-1]))
    found = []
    for batch in probe:
        hidden.clear()
        found.append(read(model(**batch), batch))
        found[-1] += read_body(hidden[-1], batch) if body else []
    handle.remove()
    return found


def distances(before: list[list[Reading]], after: list[list[Reading]]) -> list[float]:
    """Return the squared distances of the outputs and of the body."""
    found = [0.0, 0.0]
    for one, other in zip(before, after, strict=True):
        for a, b in zip(one, other, strict=True):
            found[a.is_body] += distance(a, b)
    return found


def count(readings: list[list[Reading]]) -> int:
    """Return the number of values in all readings."""
    return sum(reading.values.numel() for call in readings for reading in call)


def fisher(before: list[list[Reading]], after: list[list[Reading]]) -> float:
    """Return the mean square change of log p(y) over positions."""
    total, positions = 0.0, 0
    for one, other in zip(before, after, strict=True):
        old, new = (torch.log_softmax(call[0].values, dim=-1) for call in (one, other))
        total += float((old.exp() * (new - old).square()).sum())
        positions += len(old)
    return total / positions


def weights(model: torch.nn.Module, start: dict[str, torch.Tensor]) -> float:
    """Return the mean square change of the trained matrices over their mean square.

    Those that stood still do not count in the first, those that were zero not in the second.
    """
    matrices = {n: p for n, p in model.named_parameters() if p.requires_grad and p.dim() > 1}
    moves = [matrices[name].detach() - start[name] for name in matrices]
    means = [
        torch.cat([one.flatten() for one in some if one.any()]).square().mean().item()
        for some in (moves, [start[name] for name in matrices])
    ]
    return means[0] / means[1]


def main() -> None:
    parser = common.parser(__doc__, RESULT)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--settings", help="by default all that were tuned")
    parser.add_argument("--out", type=Path, default=atlas.OUT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    known = common.read(atlas.RESULT)["settings"]
    names = options.settings.split(",") if options.settings else list(known)
    atlas.prepare(names, options.data, options.out)
    result = {}
    for name in names:
        result[name] = measure(name, known[name]["tuned"], options.data, options.out)
        print(name, result[name], flush=True)
    common.finish(result, to_markdown, options.write)


def to_markdown(result: dict[str, dict[str, Any]]) -> str:
    """Return a table with a row for each setting, and the spread of each measure."""
    table = [("setting", *MEASURES)]
    for kind in KINDS:
        rows = {name: row for name, row in result.items() if row["kind"] == kind}
        for name, row in rows.items():
            table.append((name, *(f"{row[key]:.2g}" if key in row else "" for key in MEASURES)))
        spreads = (_spread([row[key] for row in rows.values() if key in row]) for key in MEASURES)
        table.append((f"**spread: {kind}**", *spreads))
    return markdown(table) + "\n"


def _spread(values: list[float]) -> str:
    """Return the geometric standard deviation, in words."""
    if len(values) < 2:
        return ""
    return f"x {math.exp(statistics.stdev(map(math.log, values))):.2f}"


if __name__ == "__main__":
    main()
