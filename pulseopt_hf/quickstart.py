"""A first run that downloads nothing: `python -m pulseopt_hf.quickstart`.

It runs a recipe on text that ships with CPython, with a calibrated learning rate and three arms,
and then again at the learning rate that was set. `quickstart/lm` trains a small GPT from scratch.
With the extras `[demo]` and `[recipes]`, `quickstart/order` fine-tunes the pretrained MiniLM to
spot sentences whose words were displaced. Either takes about two minutes on two idle CPU cores.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from pulseopt_hf import cli
from pulseopt_hf.aees.left_out import ArmTotals
from pulseopt_hf.errors import UsageError
from pulseopt_hf.report.commands import report
from pulseopt_hf.report.record_reader import read_run
from pulseopt_hf.report.wording import counted, described

_ARMS = ("--bandit", "conservative_ucb", "--lr_candidates", "0.5", "1.0", "2.0")
_UNTOUCHED = ("--calibration", "off", "--eval_on_start", "false", "--eval_strategy", "no")
_PYTHON = os.path.relpath(sys.executable)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train twice, say in five lines what came of it, and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m pulseopt_hf.quickstart", description=str(__doc__).splitlines()[0]
    )
    parser.add_argument(
        "--task",
        choices=("lm", "order"),
        default="lm",
        help="lm: train a language model from scratch; order: fine-tune MiniLM (needs [demo])",
    )
    parser.add_argument("--output_dir", help="run folder; default: runs/quickstart-TASK")
    parser.add_argument(
        "--max_steps", type=int, default=300, help="optimizer steps of each run; default: 300"
    )
    options = parser.parse_args(arguments)
    folder = Path(options.output_dir or f"runs/quickstart-{options.task}")
    return cli.guarded(lambda: _show(f"quickstart/{options.task}", folder, options.max_steps))


def _show(recipe: str, folder: Path, steps: int) -> int:
    untouched = folder.with_name(f"{folder.name}-untouched")
    print(f"{recipe}, calibrated and with three arms, {steps} steps:", flush=True)
    if not _train(recipe, folder, steps, _ARMS):
        return cli.FAILED
    print("Now the same with nothing done to the learning rate, for as long again...", flush=True)
    if not _train(recipe, untouched, steps, _UNTOUCHED, quiet=True):
        return cli.FAILED
    run = read_run(folder)
    print(run.outcome or f"The learning rate is not calibrated: {run.base_lr:.3g} is used.")
    print(earned(run.arms()))
    print(won(run.step, run.base_lr, _scores(folder), _scores(untouched)))
    try:
        print(f"The run as a page, for a browser: {report([str(folder)])}")
    except UsageError as error:
        print(f"The run as a page: {error}")
    print(
        "Next: write PulseOptTrainer in place of Trainer in your script, as README.md does, or "
        f"choose a recipe: {_PYTHON} -m pulseopt_hf list"
    )
    return cli.DONE


def _train(
    recipe: str, folder: Path, steps: int, others: Sequence[str], *, quiet: bool = False
) -> bool:
    """Run a recipe without its last lines; return whether it went to its end."""
    from pulseopt_hf.recipes.parsing import resolve
    from pulseopt_hf.recipes.running import run

    words = ["--output_dir", str(folder), "--max_steps", str(steps), *others]
    command = ["pulseopt-hf", "train", recipe, *words, "--overwrite"]
    stopped = run(resolve(recipe, words), command, overwrite=True, quiet=quiet, conclude=False)
    if stopped is not None:
        print(stopped, file=sys.stderr)
    return stopped is None


def _scores(folder: Path) -> dict[str, float]:
    scores: dict[str, float] = json.loads((folder / "eval_results.json").read_text("utf-8"))
    return scores


def earned(totals: Sequence[ArmTotals]) -> str:
    """Say what the arms earned, and whether chance explains that one leads the unchanged LR."""
    said = ", ".join(
        f"x{arm.lr_multiplier:g} {arm.mean:+.4f} in {counted(arm.plays, 'episode')}"
        for arm in totals
    )
    best = max(totals, key=lambda arm: arm.mean)
    plain = next((arm for arm in totals if arm.lr_multiplier == 1.0), None)
    if plain is None or best.spread is None or plain.spread is None:
        verdict = "Too few episodes to compare them."
    elif best is plain:
        verdict = "No arm earned more than x1, so they won nothing."
    else:
        lead = best.mean - plain.mean
        # Two standard errors of the difference of two means.
        chance = 2 * math.sqrt(best.spread**2 / best.plays + plain.spread**2 / plain.plays)
        verdict = (
            f"x{best.lr_multiplier:g} leads x1 by {lead:.4f}, {'' if lead > chance else 'no '}more "
            f"than chance explains ({chance:.4f})."
        )
    return f"Arms, mean reward: {said}. {verdict}"


def won(
    steps: int, set_lr: float, ours: Mapping[str, float], untouched: Mapping[str, float]
) -> str:
    """Say where both runs ended, by the metrics of their last evaluations."""
    difference = untouched["eval_loss"] - ours["eval_loss"]
    return (
        f"After {steps} steps: {described(ours)}. With {set_lr:.3g} untouched: "
        f"{described(untouched)}. That is {abs(difference):.3f} "
        f"{'lower' if difference > 0 else 'higher'}."
    )


if __name__ == "__main__":
    raise SystemExit(main())
