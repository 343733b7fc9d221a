"""Arms where a calibration is blind: many passes, no known end, other data, a wrong base LR.

    python -m benchmarks.regimes --data FOLDER [--tasks ...] [--methods ...] [--seeds 0,1,2]
                                 [--write]

FOLDER is that of `compare_tasks.py`. A run's excess is how far its eval loss ends above that of the
reference of its task and seed, as a share of what the reference learned: -0.1 is a tenth better.
The reference is the default with one arm or, where the base LR is wrong on purpose and calibration
is off, the tuned static LR. What was run before is kept in `--out` and not run again. `--write`
puts what is there into `benchmarks/results`.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from benchmarks import common, compare_tasks, held_out
from pulseopt_hf.compare.cells import Cell, result_of, run_in_subprocess
from pulseopt_hf.compare.methods import METHODS, Method
from pulseopt_hf.compare.scores import DIVERGED, interval
from pulseopt_hf.compare.summary import markdown
from pulseopt_hf.embedded import language_modelling
from pulseopt_hf.recipes.folder import versions

OUT = Path("runs/regimes")
RESULT = common.RESULTS / "regimes.json"
CALIBRATED, TUNED = "calibrated", "tuned"  # what others are measured against

_SST2, _SUBJ, _WIKI = "glue/sst2/{}.csv", "text/subj/{}.csv", "wikitext2/{}.txt"
_LORA = ("--lora_r", "4")
_CONSTANT = ("--lr_scheduler_type", "constant_with_warmup")
_IN_ORDER = ("--train_sampling_strategy", "sequential")


@dataclass(frozen=True)
class Task:
    """What is trained.

    Attributes:
        recipe: file of `benchmarks/tasks`.
        data: where its data lies in the data folder, with `{}` for the split, or in that of the
            results.
        layers: of MiniLM; 0 is a GPT from scratch.
        steps: of a static run.
        batch: rows of a step.
        options: further keys of the recipe.
        learning_rate: base LR.
        tuned: the LR that the reference has, instead of a calibrated one.
        designs: methods of `held_out.py` and the like that are tried on it.
        judged: steps whose evaluation is scored; the last one by default.
    """

    recipe: str
    data: str
    layers: int
    steps: int
    batch: int
    options: tuple[str, ...] = ()
    learning_rate: float = 5e-5
    tuned: float | None = None
    designs: tuple[str, ...] = ("held_out",)
    judged: tuple[int, ...] = ()

    @property
    def reference(self) -> str:
        """Name of the method that the others are measured against."""
        return CALIBRATED if self.tuned is None else TUNED


REGIMES = {
    "few rows, many passes": ("sst2_10_passes", "subj_20_passes"),
    "no known end": ("wikitext2_constant",),
    "the data changes": ("sentences_then_wikitext2", "subj_then_mpqa"),
    "calibration off": (
        *("sst2_too_low", "sst2_too_high", "wikitext2_too_low", "wikitext2_too_high"),
        *("lora_too_low", "lora_too_high"),
    ),
}
_OVERFIT = ("lower", "noise", "random_noise", "constant_noise", "held_out", "held_out_drop")
_AVERAGES = ("held_out", "held_out_average")


def _few(recipe: str, data: str, rows: int) -> Task:
    return Task(recipe, data, 2, 320, 32, ("--max_train_samples", str(rows)), designs=_OVERFIT)


TASKS = {
    "sst2_10_passes": _few("sst2", _SST2, 1024),
    "subj_20_passes": _few("subj", _SUBJ, 512),
    "wikitext2_constant": Task(
        "wikitext2", _WIKI, 0, 2400, 8, _CONSTANT, designs=_AVERAGES, judged=(600, 1200, 2400)
    ),
    "sentences_then_wikitext2": Task("wikitext2", "changing/{}.txt", 0, 600, 8, _IN_ORDER),
    "subj_then_mpqa": Task("subj", "changing/{}.csv", 2, 600, 8, _IN_ORDER),
    "sst2_too_low": Task("sst2", _SST2, 2, 300, 16, (), 3e-5, 3e-4),
    "sst2_too_high": Task("sst2", _SST2, 2, 300, 16, (), 3e-3, 3e-4),
    "wikitext2_too_low": Task("wikitext2", _WIKI, 0, 300, 16, (), 1e-3, 1e-2),
    "wikitext2_too_high": Task("wikitext2", _WIKI, 0, 300, 16, (), 1e-1, 1e-2),
    "lora_too_low": Task("sst2_lora", _SST2, 4, 300, 16, _LORA, 1e-4, 1e-3),
    "lora_too_high": Task("sst2_lora", _SST2, 4, 300, 16, _LORA, 1e-2, 1e-3),
}
CHANGING_ROWS = 300 * 8  # of each kind of data
EVALUATIONS = 12  # of a run, where the method steers by them or several are scored

_PLATEAU = (
    '--lr_scheduler_type reduce_lr_on_plateau --lr_scheduler_kwargs {"patience":0,"factor":0.5}'
)
_GREEDY = (
    "--lr_scheduler_type greedy --lr_scheduler_kwargs "
    '{"patience":0,"factor":0.7,"min_lr":1e-7,"max_lr":1.0}'
)
_ARMS = "--lr_candidates 0.5 1.0 2.0"
_PLAYED = {
    "random": "--control_mode random",
    "published": "--bandit discounted_ucb --reward smoothed",
    "scaled_ucb": "--bandit scaled_ucb",
    "conservative_ucb": "--bandit conservative_ucb",
}
_DESIGNS = {*_OVERFIT, *_AVERAGES}
_ABOUT = {
    "static": "the base LR",
    "random": "arms at random",
    "published": "arms by the published bandit and reward",
    "scaled_ucb": "arms by the scaled bandit",
    "conservative_ucb": "arms by the conservative bandit",
    "lower": "one arm of 0.7",
    "noise": "noise of 0, 0.3 and 1 times a gradient's RMS by the conservative bandit",
    "random_noise": "the same noise at random",
    "constant_noise": "noise of 1 times a gradient's RMS",
    "plateau": "ReduceLROnPlateau, halved at the first evaluation that is no better",
    "greedy": "GreedyLR, with a patience of 0 and a factor of 0.7",
    "held_out": "arms by the conservative bandit, rewarded by the loss of rows held out",
    "held_out_average": "the same, with the weights averaged over some 10 steps",
    "held_out_drop": "the LR falls to 0.3 of it where the loss of rows held out rises",
}


def methods_of(task: Task) -> dict[str, Method]:
    """Return the methods that are compared on a task, by name."""
    off = task.tuned is not None
    one = "--calibration off --lr_candidates 1.0" if off else ""
    arms = "--calibration off --lr_candidates 0.1 1.0 10.0" if off else _ARMS
    noise = "--noise_mode relative --noise_candidates"
    played = {name: f"{arms} {words}" for name, words in _PLAYED.items()}
    words = {
        **{"static": "--calibration off", task.reference: one, **played},
        **{"plateau": f"{one} {_PLATEAU}", "greedy": f"{one} {_GREEDY}"},
        "lower": f"{one} --lr_candidates 0.7",
        **{"noise": f"{one} {noise} 0.0 0.3 1.0 {_PLAYED['conservative_ucb']}"},
        **{"random_noise": f"{one} {noise} 0.0 0.3 1.0 {_PLAYED['random']}"},
        **{"constant_noise": f"{one} {noise} 1.0", "held_out": played["conservative_ucb"]},
        **{"held_out_average": played["conservative_ucb"], "held_out_drop": one},
    }
    changes = {
        "held_out": partial(held_out.reward, average=False),
        "held_out_average": partial(held_out.reward, average=True),
        "held_out_drop": held_out.drop,
    }
    return {
        name: Method(
            words[name],
            _ABOUT.get(name, ""),
            change=changes.get(name),
            calibrates=not off and name != "static",
            evaluations=2 if off and name not in ("plateau", "greedy") else EVALUATIONS,
        )
        for name in words
        if name not in _DESIGNS or name in task.designs
    }


def main() -> None:
    parser = common.parser(str(__doc__), RESULT)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--methods", help="by default all")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    make_changing(options.data, options.out)
    seeds = [int(seed) for seed in options.seeds.split(",")]
    for seed, name in product(seeds, options.tasks.split(",")):
        methods = methods_of(TASKS[name])
        for method in options.methods.split(",") if options.methods else methods:
            if method in methods:
                METHODS[method] = methods[method]
                (options.out / name).mkdir(exist_ok=True)
                found = run_in_subprocess(cell_of(name, method, seed, options), options.out / name)
                print(name, method, seed, found["loss_after"], found["seconds"], flush=True)
    common.finish(summarise(options), to_markdown, options.write)


def cell_of(name: str, method: str, seed: int, options: Any) -> Cell:
    """Return the run of a method on a task."""
    task, data = TASKS[name], options.data
    if task.data.startswith("changing/"):
        data = options.out
    words = ["--max_eval_samples", "512" if task.layers else "256"]
    words += ["--warmup_steps", str(task.steps // 20)]
    words += ["--per_device_train_batch_size", str(task.batch)]
    for key, split in (("--train_file", "train"), ("--validation_file", "validation")):
        words += [key, str(data / task.data.format(split))]
    if task.layers:
        folder = compare_tasks.first_layers(task.layers, options.out)
        words += ["--model_name_or_path", str(folder)]
    recipe = str(compare_tasks.TASKS_FOLDER / f"{task.recipe}.yaml")
    learning_rate = task.learning_rate
    if method == TUNED:
        assert task.tuned is not None
        learning_rate = task.tuned
    return Cell(recipe, (*words, *task.options), method, learning_rate, seed, task.steps)


def make_changing(data: Path, out: Path) -> None:
    """Save training data whose second part is of another kind, and validation data of that kind."""
    folder = out / "changing"
    folder.mkdir(parents=True, exist_ok=True)
    first = " ".join(language_modelling()["train"]["text"])
    for split, before in (("train", f"{first}\n"), ("validation", "")):
        text = (data / _WIKI.format(split)).read_text(encoding="utf-8")
        (folder / f"{split}.txt").write_text(before + text, encoding="utf-8")
    for split, sources in (("train", ("subj", "mpqa")), ("validation", ("mpqa",))):
        rows = []
        for source in sources:
            path = data / "text" / source / f"{split}.csv"
            with path.open(encoding="utf-8", newline="") as file:
                own = list(csv.DictReader(file))[:CHANGING_ROWS]
            shift = 2 * (source == "mpqa")
            rows += [(row["sentence"], int(row["label"]) + shift) for row in own]
        with (folder / f"{split}.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("sentence", "label"), *rows])


def summarise(options: Any) -> dict[str, Any]:
    """Return, for every task and method, what each seed scored beside its reference."""
    tasks: dict[str, Any] = {}
    for name, task in TASKS.items():
        rows: dict[str, list[dict[str, Any]]] = {}
        for method, seed in product(methods_of(task), map(int, options.seeds.split(","))):
            both = [
                result_of(cell_of(name, one, seed, options), options.out / name)
                for one in (method, task.reference)
            ]
            if both[0] is not None and both[1] is not None:
                rows.setdefault(method, []).append(_scores(task, both[0], both[1]))
        if rows:
            tasks[name] = rows
    return {"versions": versions(), "tasks": tasks}


def _scores(task: Task, run: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    judged = task.judged or (task.steps,)
    before, learned = reference["loss_before"], reference["loss_after"]
    ends = [(_loss_at(run, step), _loss_at(reference, step)) for step in judged]
    best, their_best = _best(run), _best(reference)
    return {
        "excess": [_excess(loss, other, before - other) for loss, other in ends if other],
        "metric": run["evaluations"][-1][2],
        "best_excess": _excess(best[1], their_best[1], before - learned),
        "best_metric": best[2],
        "lr_scale": run["lr_scale"],
    }


def _excess(loss: float | None, other: float, learned: float) -> float:
    return DIVERGED if loss is None else min(DIVERGED, (loss - other) / learned)


def _loss_at(run: dict[str, Any], step: int) -> float | None:
    """Return the loss of the evaluation nearest to a step."""
    loss: float | None = min(run["evaluations"], key=lambda one: abs(one[0] - step))[1]
    return loss


def _best(run: dict[str, Any]) -> Any:
    """Return step, loss and metric of the evaluation with the lowest loss."""
    known = [one for one in run["evaluations"] if one[1] is not None]
    return min(known, key=lambda one: one[1], default=(0, None, None))


def to_markdown(result: dict[str, Any]) -> str:
    """Return a table with a row for each task and method."""
    head = ("task", "method", "seeds", "excess", "95 %", "score", "excess at the best evaluation")
    rows = [(*head, "its score")]
    for task, methods in result["tasks"].items():
        for method, runs in methods.items():
            rows.append((task, method, *_row(runs)))
    return markdown(rows) + "\n"


def _row(runs: list[dict[str, Any]]) -> tuple[str, ...]:
    judged = [fmean(values) for values in zip(*(run["excess"] for run in runs), strict=True)]
    return (
        str(len(runs)),
        ", ".join(f"{value:+.3f}" for value in judged),
        _ends([_means(runs)]),
        _mean([run["metric"] for run in runs]),
        f"{fmean(run['best_excess'] for run in runs):+.3f}",
        _mean([run["best_metric"] for run in runs]),
    )


def _ends(tasks: list[list[float]]) -> str:
    low, high = interval(tasks)
    return f"{low:+.3f} to {high:+.3f}" if min(map(len, tasks)) > 1 else ""


def _means(runs: list[dict[str, Any]]) -> list[float]:
    """Return the excess of each seed, mean over the steps that were judged."""
    return [fmean(run["excess"]) for run in runs]


def _mean(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{fmean(known):.3g}" if len(known) == len(values) else ""


def to_short_markdown(result: dict[str, Any]) -> str:
    """Return a table of the mean excess over the tasks of each regime, with its interval."""
    tasks = result["tasks"]
    rows = [("method", *REGIMES)]
    for method, about in _ABOUT.items():
        cells = []
        for names in REGIMES.values():
            own = [_means(tasks[name][method]) for name in names if method in tasks.get(name, {})]
            whole = len(own) == len([name for name in names if name in tasks])
            ends = f" ({_ends(own)})" if whole and own and _ends(own) else ""
            cells.append(f"{fmean(map(fmean, own)):+.3f}{ends}" if whole and own else "")
        rows.append((f"`{method}`: {about}", *cells))
    return markdown(rows) + "\n"


if __name__ == "__main__":
    main()
