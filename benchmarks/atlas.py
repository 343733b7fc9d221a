"""The atlas: the learning rate that is found against the one that a sweep finds, on many settings.

    python -m benchmarks.atlas --data FOLDER [--settings sst2_short,...] [--quick] [--write]

A setting is a task of `benchmarks/tasks` with its data, model, optimizer, batch and length. On each
the static LR is tuned on a grid of half decades, from a guess to where the eval loss rises on
either side, and the default is run from 5e-5, the LR that `TrainingArguments` has. FOLDER is that
of `compare_tasks.py`, with `glue/cola` and `glue/rte` beside. What was run before is kept in
`--out` and not run again. `--write` puts what is there into `benchmarks/results`.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import compare_tasks
from pulseopt_hf.cli import main as pulseopt_hf
from pulseopt_hf.compare.cells import Cell, run_in_subprocess
from pulseopt_hf.compare.scores import excess, tuned_lr
from pulseopt_hf.recipes.folder import versions

OUT = Path("runs/atlas")
RESULT = Path(__file__).parent / "results" / "atlas.json"
PICTURE = Path(__file__).parents[1] / "docs" / "figures" / "atlas.svg"
WARMUP = 0.05  # of the steps
ARMS = "default_arms"  # the method of `compare`
UNTOUCHED = 5e-5  # the default of `TrainingArguments.learning_rate`
GRID = [float(f"{digit}e{power}") for power in range(-7, 2) for digit in (1, 3)]


@dataclass(frozen=True)
class Setting:
    """What is trained, and how.

    Attributes:
        task: file of `benchmarks/tasks`.
        data: data of that name in the data folder, with `{}` for the split; none is embedded.
        layers: of MiniLM, or the name of a setting whose tuned model is fine-tuned; 0 is from
            scratch.
        guess: where tuning begins, an LR of the grid.
        steps: of a static run.
        batch: rows of a step.
        rows: training rows; `None` is all.
        options: further keys of the recipe.
        seeds: how many runs of each LR there are, of which the mean counts.
    """

    task: str
    data: str | None
    layers: int | str
    guess: float
    steps: int
    batch: int
    rows: int | None = None
    options: tuple[str, ...] = ()
    seeds: int = 1


SIX = "{}.csv"  # made of three others
_SST2, _SUBJ, _MPQA = "glue/sst2/{}.csv", "text/subj/{}.csv", "text/mpqa/{}.csv"
_COLA, _RTE, _WIKI = "glue/cola/{}.csv", "glue/rte/{}.csv", "wikitext2/{}.txt"
_SENTENCES = ("--dataset_name", "embedded:sentences", "--separate_texts", "true")
_SGD = ("--optim", "sgd", "--optim_args", "momentum=0.9")
_LORA = ("--lora_r", "8", "--lora_alpha", "16")
_RMSPROP, _ADAGRAD = ("--optim", "rmsprop"), ("--optim", "adagrad")


def _gpt(width: int, layers: int = 2) -> tuple[str, ...]:
    sizes = f'{{"n_positions": 64, "n_embd": {width}, "n_layer": {layers}, "n_head": 4}}'
    return ("--model_config", sizes)


def _fine_tuned(start: str, data: str | None, guess: float = 1e-2, *options: str) -> Setting:
    """Return a setting that fine-tunes the model of another, on `sentences` or a text file."""
    words = (*_SENTENCES, *options) if data is None else options
    return Setting("gpt", data, start, guess, 300, 16, None, words)


SETTINGS = {
    # Less than one pass, or one.
    "sst2": Setting("sst2", _SST2, 2, 3e-4, 600, 8),
    "sst2_short": Setting("sst2", _SST2, 2, 3e-4, 150, 16, seeds=3),
    "sst2_batch_4": Setting("sst2", _SST2, 2, 3e-4, 600, 4),
    "sst2_batch_64": Setting("sst2", _SST2, 2, 3e-4, 150, 64, seeds=3),
    "sst2_4_layers": Setting("sst2", _SST2, 4, 1e-4, 600, 8),
    "sst2_minilm": Setting("sst2", _SST2, 6, 1e-4, 300, 16),
    "sst2_lora_4": Setting("sst2_lora", _SST2, 4, 1e-3, 600, 8, None, ("--lora_r", "4")),
    "sst2_lora_32": Setting("sst2_lora", _SST2, 4, 1e-3, 600, 8, None, ("--lora_r", "32")),
    "subj": Setting("subj", _SUBJ, 2, 3e-4, 600, 8),
    "subj_short": Setting("subj", _SUBJ, 2, 3e-4, 150, 16, seeds=3),
    "subj_adafactor": Setting("subj", _SUBJ, 2, 1e-3, 600, 8, None, ("--optim", "adafactor")),
    "subj_sgd": Setting("subj", _SUBJ, 2, 3e-2, 600, 8, None, _SGD),
    "subj_schedule_free": Setting(
        "subj",
        _SUBJ,
        2,
        1e-3,
        600,
        8,
        None,
        ("--optim", "schedule_free_adamw", "--lr_scheduler_type", "constant"),
    ),
    "mpqa": Setting("mpqa", _MPQA, 2, 3e-4, 600, 8),
    "mpqa_short": Setting("mpqa", _MPQA, 2, 3e-4, 150, 16, seeds=3),
    "six_classes": Setting("six_classes", SIX, 2, 1e-4, 600, 8),
    # Several passes.
    "sst2_5_passes": Setting("sst2", _SST2, 2, 1e-4, 312, 16, 1000, seeds=3),
    "sst2_3_passes": Setting("sst2", _SST2, 2, 1e-4, 750, 16, 4000),
    "sst2_8_passes": Setting("sst2", _SST2, 2, 1e-4, 2400, 16, 4800),
    "cola_3_passes": Setting("cola", _COLA, 2, 1e-4, 800, 32),
    "rte_3_passes": Setting("rte", _RTE, 6, 3e-5, 468, 16),
    "subj_10_passes": Setting("subj", _SUBJ, 2, 1e-4, 312, 16, 500, seeds=3),
    "mpqa_5_passes": Setting("mpqa", _MPQA, 2, 1e-4, 312, 16, 1000, seeds=3),
    "six_classes_3_passes": Setting("six_classes", SIX, 2, 1e-4, 281, 32, 3000, seeds=3),
    "wikitext2_8_passes": Setting("wikitext2", _WIKI, 0, 3e-3, 600, 16, 600),
    # Language models.
    "wikitext2_64": Setting("wikitext2", _WIKI, 0, 1e-2, 600, 16, None, _gpt(64)),
    "wikitext2_128": Setting("wikitext2", _WIKI, 0, 3e-3, 600, 16, None, _gpt(128)),
    "wikitext2_256": Setting("wikitext2", _WIKI, 0, 3e-3, 300, 16, None, _gpt(256)),
    "wikitext2_64x4": Setting("wikitext2", _WIKI, 0, 3e-3, 600, 16, None, _gpt(64, 4)),
    "wikitext2_64x6": Setting("wikitext2", _WIKI, 0, 3e-3, 600, 16, None, _gpt(64, 6)),
    "wikitext2_short": Setting("wikitext2", _WIKI, 0, 1e-2, 150, 16, None, _gpt(64)),
    "wikitext2_long": Setting("wikitext2", _WIKI, 0, 3e-3, 2400, 8, None, _gpt(64)),
    "wikitext2_sgd": Setting("wikitext2", _WIKI, 0, 3e-1, 300, 16, None, (*_gpt(64), *_SGD)),
    "wikitext2_rmsprop": Setting(
        "wikitext2", _WIKI, 0, 1e-3, 300, 16, None, (*_gpt(64), *_RMSPROP)
    ),
    "wikitext2_adagrad": Setting(
        "wikitext2", _WIKI, 0, 3e-2, 300, 16, None, (*_gpt(64), *_ADAGRAD)
    ),
    "sentences": Setting("sentences", None, 0, 3e-3, 600, 16),
    "sentences_64x6": Setting("sentences", None, 0, 3e-3, 600, 16, None, _gpt(64, 6)),
    # The same models, pretrained.
    "wikitext2_to_sentences": _fine_tuned("wikitext2_64", None),
    "wikitext2_long_to_sentences": _fine_tuned("wikitext2_long", None),
    "wikitext2_128_to_sentences": _fine_tuned("wikitext2_128", None, 3e-3),
    "wikitext2_64x4_to_sentences": _fine_tuned("wikitext2_64x4", None),
    "wikitext2_64x6_to_sentences": _fine_tuned("wikitext2_64x6", None, 3e-3),
    "wikitext2_to_sentences_lora": _fine_tuned("wikitext2_64", None, 1e-2, *_LORA),
    "wikitext2_64x6_to_sentences_lora": _fine_tuned("wikitext2_64x6", None, 1e-2, *_LORA),
    "sentences_to_wikitext2": _fine_tuned("sentences", _WIKI),
    "sentences_64x6_to_wikitext2": _fine_tuned("sentences_64x6", _WIKI),
    "wikitext2_to_itself": _fine_tuned("wikitext2_64", _WIKI, 3e-3),
    "wikitext2_64x6_to_itself": _fine_tuned("wikitext2_64x6", _WIKI, 1e-3),
    # Images.
    "digits": Setting("digits", None, 0, 1e-2, 600, 16),
}
_COMPARED = ("tuned", "untouched", "ours")  # of runs that are compared
# One of each kind, and short.
QUICK = ("sst2_short", "sst2_5_passes", "wikitext2_short", "digits")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--settings", help="by default all")
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}")
    parser.add_argument("--arms", action="store_true", help=f"`{ARMS}` too, beside the default")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--write", action="store_true", help="into benchmarks/results")
    options = parser.parse_args()
    names = options.settings.split(",") if options.settings else list(SETTINGS)
    if options.quick:
        names = list(QUICK)
    torch.set_num_threads(1)
    prepare(names, options.data, options.out)
    measured = partial(measure, data=options.data, out=options.out, arms=options.arms)
    with ProcessPoolExecutor(options.processes) as pool:
        for line in pool.map(measured, names):
            print(line, flush=True)
    result = {"versions": versions(), "settings": summarise(options.out)}
    print(to_markdown(result))
    if options.write:
        draw(result, PICTURE)
        RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def prepare(names: list[str], data: Path, out: Path) -> None:
    """Make the weights and data that several settings share."""
    out.mkdir(parents=True, exist_ok=True)
    for name in names:
        layers = SETTINGS[name].layers
        if isinstance(layers, str):
            pretrain(layers, data, out)
    for name in names:
        options_of(SETTINGS[name], data, out)


def options_of(setting: Setting, data: Path, out: Path) -> tuple[str, ...]:
    """Return the keys of the recipe that a setting sets."""
    words = ["--max_eval_samples", "512", "--warmup_steps", str(round(WARMUP * setting.steps))]
    words += ["--per_device_train_batch_size", str(setting.batch)]
    if setting.data is not None:
        folder = compare_tasks.six_classes(data, out) if setting.data == SIX else data
        for key, split in (("--train_file", "train"), ("--validation_file", "validation")):
            words += [key, str(folder / setting.data.format(split))]
    if isinstance(setting.layers, str):
        words += ["--model_name_or_path", str(out / f"pretrained-{setting.layers}")]
    elif setting.layers:
        words += ["--model_name_or_path", str(compare_tasks.first_layers(setting.layers, out))]
    if setting.rows is not None:
        words += ["--max_train_samples", str(setting.rows)]
    return (*words, *setting.options)


def pretrain(name: str, data: Path, out: Path) -> None:
    """Train the model of a setting at its guess, for others to start from."""
    folder, setting = out / f"pretrained-{name}", SETTINGS[name]
    if (folder / "config.json").exists():
        return
    code = pulseopt_hf(
        [
            *("train", str(compare_tasks.TASKS_FOLDER / f"{setting.task}.yaml")),
            *options_of(setting, data, out),
            *("--max_steps", str(setting.steps), "--learning_rate", str(setting.guess)),
            *("--calibration", "off", "--overwrite", "--quiet", "--output_dir", str(folder)),
        ]
    )
    if code:
        raise SystemExit(code)


def measure(name: str, data: Path, out: Path, *, arms: bool = False) -> str:
    """Run what is missing of a setting, and say in a line how found and tuned LR compare."""
    torch.set_num_threads(1)
    setting, folder = SETTINGS[name], out / name
    folder.mkdir(parents=True, exist_ok=True)
    recipe = str(compare_tasks.TASKS_FOLDER / f"{setting.task}.yaml")
    words = options_of(setting, data, out)

    def run(method: str, learning_rate: float) -> list[dict[str, Any]]:
        cells = (
            Cell(recipe, words, method, learning_rate, seed, setting.steps)
            for seed in range(setting.seeds)
        )
        return [run_in_subprocess(cell, folder) for cell in cells]

    losses = tune(lambda rate: _mean_loss(run("static", rate)), setting.guess)
    run("static", UNTOUCHED)
    found = run("default", UNTOUCHED)
    if arms:
        run(ARMS, UNTOUCHED)
    best = min(losses, key=lambda rate: losses[rate])
    scale = _mean_scale(found)
    return (
        f"{name}: tuned {best:g} ({losses[best]:.4f}), found "
        f"{'nothing' if scale is None else format(scale * UNTOUCHED, '.2e')} "
        f"({_mean_loss(found):.4f})"
    )


def passes_once(name: str) -> bool:
    """Whether a setting goes over its data once at most, or has a new model, to which it is one."""
    return "passes" not in name or SETTINGS[name].layers == 0


def tune(loss: Callable[[float], float], guess: float) -> dict[float, float]:
    """Walk from a guess along the grid to where the loss is higher on either side.

    Returns:
        The losses of the LRs that were tried.
    """
    place = GRID.index(guess)
    known = {guess: loss(guess)}
    while True:
        for near in (place - 1, place + 1):
            known.setdefault(GRID[near], loss(GRID[near]))
        best = min((place - 1, place, place + 1), key=lambda at: known[GRID[at]])
        if best == place:
            return known
        place = best


def summarise(out: Path) -> dict[str, dict[str, Any]]:
    """Return what was measured of every setting whose tuning and whose default are there."""
    return {
        name: found
        for name in SETTINGS
        if (out / name).is_dir() and (found := _summary(name, out / name)) is not None
    }


def _summary(name: str, folder: Path) -> dict[str, Any] | None:
    runs = defaultdict[tuple[str, float], list[dict[str, Any]]](list)
    for file in sorted(folder.glob("*.json")):
        cell = json.loads(file.read_text(encoding="utf-8"))
        runs[cell["cell"]["method"], cell["cell"]["learning_rate"]].append(cell)
    seeds = SETTINGS[name].seeds
    whole = {key: cells for key, cells in runs.items() if len(cells) >= seeds}
    static = {rate: cells for (method, rate), cells in sorted(whole.items()) if method == "static"}
    ours = whole.get(("default", UNTOUCHED))
    if ours is None or UNTOUCHED not in static:
        return None
    losses = {rate: _mean_loss(cells) for rate, cells in static.items()}
    best = min(losses, key=lambda rate: losses[rate])
    before = ours[0]["loss_before"]
    kinds = {"tuned": static[best], "untouched": static[UNTOUCHED], "ours": ours}
    if (ARMS, UNTOUCHED) in whole:
        kinds["arms"] = whole[ARMS, UNTOUCHED]
    scale = _mean_scale(ours)
    gaps = [
        (_loss(one) - _loss(other)) / (before - losses[best])
        for one, other in zip(ours, static[best], strict=True)
    ]
    return {
        "steps": SETTINGS[name].steps,
        "seeds": seeds,
        "tuned": tuned_lr(losses),
        "found": None if scale is None else scale * UNTOUCHED,
        "loss_before": before,
        "losses": {f"{rate:g}": _finite(losses[rate]) for rate in losses},
        "loss": {kind: _finite(_mean_loss(cells)) for kind, cells in kinds.items()},
        "excess": {
            kind: excess(_finite(_mean_loss(cells)), before, losses[best])
            for kind, cells in kinds.items()
        },
        "excess_error": None if seeds == 1 else statistics.stdev(gaps) / math.sqrt(seeds),
        "metric": ours[0]["metric"],
        "score": {
            kind: _mean([cell["evaluations"][-1][2] for cell in cells])
            for kind, cells in kinds.items()
        },
        "best_loss": {
            kind: _mean([_best_loss(cell) for cell in cells]) for kind, cells in kinds.items()
        },
    }


def _mean_loss(cells: list[dict[str, Any]]) -> float:
    return _mean([_loss(cell) for cell in cells])


def _mean_scale(cells: list[dict[str, Any]]) -> float | None:
    """Return the geometric mean of what the LR was multiplied by."""
    scales = [cell["lr_scale"] for cell in cells]
    return None if None in scales else statistics.geometric_mean(scales)


def _finite(loss: float) -> float | None:
    return loss if math.isfinite(loss) else None


def _loss(cell: dict[str, Any]) -> float:
    loss = cell["loss_after"]
    return math.inf if loss is None else float(loss)


def _best_loss(cell: dict[str, Any]) -> float:
    return min(loss for _, loss, _ in cell["evaluations"] if loss is not None)


def to_markdown(result: dict[str, Any]) -> str:
    """Return a table with a row for each setting, and what holds of all."""
    lines = [
        "| setting | seeds | tuned LR | found | found / tuned | excess: untouched 5e-5 | ours "
        "| with arms | score: tuned | untouched | ours |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    settings = result["settings"]
    for name, row in settings.items():
        found, ratio = row["found"], _ratio(row)
        cells = [
            name,
            str(row["seeds"]),
            f"{row['tuned']:.1e}",
            "" if found is None else f"{found:.1e}",
            "" if ratio is None else f"{ratio:.2f}",
            _excess(row, "untouched"),
            _excess(row, "ours") + _error(row),
            _excess(row, "arms"),
            *(_score(row["score"][kind]) for kind in _COMPARED),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    ratios = {name: ratio for name, row in settings.items() if (ratio := _ratio(row)) is not None}
    learned = [row["excess"] for row in settings.values() if learns(row)]
    excesses = [row["ours"] for row in learned]
    untouched = [row["untouched"] for row in learned]
    changes = [row["arms"] - row["ours"] for row in learned if "arms" in row]
    within, left_out = (
        [sum(1 / most <= ratio <= most for ratio in kind.values()) for most in (2, 3)]
        for kind in (ratios, leave_one_out(ratios))
    )
    arms = (
        " Arms 0.5, 1 and 2, played by the conservative bandit, change it by "
        f"{_mean(changes):+.3f} in {len(changes)} of them, by {min(changes):+.3f} to "
        f"{max(changes):+.3f}."
        if changes
        else ""
    )
    return "\n".join(
        [
            *lines,
            "",
            f"Of {len(settings)} settings, the LR found lies within a factor of 2 of the tuned one "
            f"in {within[0]} and within 3 in {within[1]}; with radii fitted to the other settings "
            f"alone, in {left_out[0]} and {left_out[1]}. Mean excess of the {len(learned)} where "
            f"the tuned LR learns anything: {_mean(excesses):.3f} "
            f"(untouched: {_mean(untouched):.3f}).{arms}",
            "",
        ]
    )


def learns(row: dict[str, Any]) -> bool:
    """Whether the best static run ends at least 1 % lower than it began; else excess is noise."""
    return bool(row["loss"]["tuned"] < 0.99 * row["loss_before"])


def _excess(row: dict[str, Any], kind: str) -> str:
    return f"{row['excess'][kind]:.3f}" if learns(row) and kind in row["excess"] else ""


def _error(row: dict[str, Any]) -> str:
    return f" ± {row['excess_error']:.3f}" if learns(row) and row["seeds"] > 1 else ""


def has_new_head(name: str) -> bool:
    """Whether a setting trains MiniLM under a new head; its radius is another one."""
    layers = SETTINGS[name].layers
    return isinstance(layers, int) and layers > 0


def leave_one_out(ratios: dict[str, float]) -> dict[str, float]:
    """Return found over tuned, had the radius been fitted to the other settings of its kind.

    The LR found is in proportion to the radius, so that the one which fits the others best divides
    the ratio by their geometric mean.
    """
    fitted = {}
    for name, ratio in ratios.items():
        kind = has_new_head(name)
        others = [r for other, r in ratios.items() if other != name and has_new_head(other) == kind]
        fitted[name] = ratio / statistics.geometric_mean(others or [1.0])
    return fitted


def to_losses_markdown(result: dict[str, Any]) -> str:
    """Return a table of the final eval losses: tuned by hand, at 5e-5 as it is, and ours."""
    return _losses("setting", {name: [row] for name, row in result["settings"].items()})


def to_short_markdown(result: dict[str, Any]) -> str:
    """Return the same table with a row for each kind of setting: the means over them."""
    kinds = defaultdict[str, list[dict[str, Any]]](list)
    for name, row in result["settings"].items():
        kinds[_kind(name)].append(row)
    return _losses("settings", {f"{kind} ({len(kinds[kind])})": kinds[kind] for kind in kinds})


def _losses(head: str, rows: Mapping[str, list[dict[str, Any]]]) -> str:
    lines = [f"| {head} | tuned by hand | untouched 5e-5 | ours |", "|---|---|---|---|"]
    for name, own in rows.items():
        means = (_mean([row["loss"][kind] for row in own]) for kind in _COMPARED)
        lines.append(f"| {name} | {' | '.join(f'{mean:.3f}' for mean in means)} |")
    return "\n".join(lines) + "\n"


def _kind(name: str) -> str:
    setting = SETTINGS[name]
    if has_new_head(name):
        passes = "one pass" if passes_once(name) else "several passes"
        return f"classifier from pretrained MiniLM, {passes}"
    if setting.task == "digits":
        return "image classifier from scratch"
    return f"language model, {'pretrained' if setting.layers else 'from scratch'}"


def draw(result: dict[str, Any], file: Path) -> None:
    """Draw the LR found over the tuned one, a point for each setting, with the factor-2 band."""
    import altair as alt

    from pulseopt_hf.report.charts import Plot, log_axis, write_chart

    rows = [
        {"setting": name, "tuned": row["tuned"], "found": row["found"]}
        for name, row in result["settings"].items()
        if row["found"] is not None
    ]
    values = [value for row in rows for value in (row["tuned"], row["found"])]
    ends = [min(values) / 3, max(values) * 3]
    band = [{"tuned": end, "low": end / 2, "high": end * 2} for end in ends]
    x = alt.X("tuned:Q", title="tuned learning rate", **log_axis(ends))
    y = alt.Y("found:Q", title="learning rate found", **log_axis(ends))
    limits = alt.Chart(alt.NamedData("band"))
    points = alt.Chart(alt.NamedData("points"))
    layers = (
        limits.mark_area(opacity=0.15).encode(x=x, y=alt.Y("low:Q", **log_axis(ends)), y2="high:Q"),
        limits.mark_line(strokeDash=[2, 2]).encode(x=x, y=alt.Y("tuned:Q", **log_axis(ends))),
        points.mark_point(filled=True, size=60).encode(x=x, y=y),
        points.mark_text(align="left", dx=6, fontSize=9).encode(x=x, y=y, text="setting:N"),
    )
    chart = alt.layer(*layers).properties(width=520, height=420)
    plot = Plot("atlas", "", "", [chart], {"band": band, "points": rows})
    write_chart(plot.picture(), file)


def _ratio(row: dict[str, Any]) -> float | None:
    return None if row["found"] is None else float(row["found"] / row["tuned"])


def _score(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    main()
