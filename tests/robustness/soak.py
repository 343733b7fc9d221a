"""Kill runs a thousand times and throw a million spoiled files at the package: `make soak`.

    python -m tests.robustness.soak --out FOLDER [--kills N] [--ddp-kills N] [--examples N]

Runs of a script (Trainer, accumulation, calibration and arms), of the command line and of two DDP
ranks are killed and started again until they are done, ten kills each; every run has to end bit for
bit as one that was never killed. Meanwhile, on the other core, spoiled states and recipes are read.
The folder keeps every result as soon as it is there. Started again with the same options, the soak
goes on from there; a failure is not kept, and is tried again. The last line sums up what the folder
holds.
"""

import argparse
import json
import logging
import os
import random
import shutil
import signal
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from tests.conftest import make_gpt2, make_rows
from tests.recipes.tiny import files_of, write_bert
from tests.robustness import fuzz
from tests.robustness.kills import FORK, Run, command, script

KILLS_PER_RUN, EXAMPLES_PER_BATCH = 10, 1000
STEPS = {"script": 120, "two ranks": 90, "command": 90}
OWN_PROCESSES = 0.02  # share of kills of a new interpreter, whose start takes as long as ten kills
COMMANDS = 0.4


class Results:
    """What is done, a JSON object a line, which outlives the process that did it."""

    def __init__(self, file: Path) -> None:
        self._file = file
        text = file.read_text() if file.exists() else ""
        self.lines: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines()]

    def add(self, **line: Any) -> None:
        self.lines.append(line)
        with self._file.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def total(self, key: str, **where: Any) -> int:
        chosen = [x for x in self.lines if where.items() <= x.items()]
        return sum(line.get(key, 0) for line in chosen)

    @property
    def seconds(self) -> float:
        return sum(line["seconds"] for line in self.lines)


def shares(kills: int, ddp_kills: int) -> dict[str, int]:
    """Divide the kills among kinds of runs."""
    alone = kills - ddp_kills
    own, commands = round(OWN_PROCESSES * alone), round(COMMANDS * alone)
    rest = alone - own - commands
    return {"script": rest, "command": commands, "process": own, "two ranks": ddp_kills}


def make_runs(folder: Path) -> dict[str, Run]:
    """Return a run of each kind."""
    rows = make_rows()
    bert = write_bert(folder / "bert")
    words = ["glue/cola", *files_of("cola", folder / "data"), "--model_name_or_path", bert]
    return {
        "script": script(make_gpt2, rows, STEPS["script"]),
        "two ranks": script(make_gpt2, rows, STEPS["two ranks"], ranks=2),
        "command": command(words, STEPS["command"]),
        "process": command(words, STEPS["command"], own_process=True),
    }


def kill_all(results: Results, wanted: dict[str, int], seed: int, out: Path) -> None:
    """Kill runs until each kind has as many kills as wanted.

    Raises:
        AssertionError: a run failed or did not end as the one that was never killed; its folder
            stays.
    """
    scratch = _emptied(out / "runs")
    runs = make_runs(scratch)
    while left := {k: n for k, n in wanted.items() if results.total("kills", kind=k) < n}:
        # All kinds get on alike, so that what is done so far stands for the whole.
        kind = min(left, key=lambda k: results.total("kills", kind=k) / wanted[k])
        start = time.monotonic()
        run, done = runs[kind], results.total("kills", kind=kind)
        whole = scratch / f"whole {'command' if kind == 'process' else kind}"
        if not whole.exists():
            run.survive(whole, 0, random.Random())
        kills = min(KILLS_PER_RUN, wanted[kind] - done)
        killed = scratch / f"killed {kind}"
        taken = run.survive(killed, kills, random.Random(f"{seed} {kind} {done}"))
        run.assert_equal(whole, killed)
        shutil.rmtree(killed)
        results.add(
            kind=kind,
            kills=len(taken),
            saves=sum(kill.place == "save" for kill in taken),
            left_half=sum(kill.left_half for kill in taken),
            places=dict(Counter(kill.place for kill in taken)),
            seconds=round(time.monotonic() - start, 1),
        )
        done, saves = results.total("kills"), results.total("saves")
        _say(f"{done:,} kills, {saves:,} amid a save; {kind}: the run ended equal")
    shutil.rmtree(scratch)


def throw_all(results: Results, wanted: int, seed: int, out: Path) -> None:
    """Throw spoiled states and recipes until there were as many as wanted.

    Raises:
        Exception: what an example raised, with the smallest example that raises it.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    examples = fuzz.all_examples(_emptied(out / "files"))
    while (done := results.total("examples")) < wanted:
        start, number = time.monotonic(), len(results.lines)
        kind = list(examples)[number % len(examples)]
        count = min(EXAMPLES_PER_BATCH, wanted - done)
        seen = fuzz.throw(examples[kind], count, seed * 1_000_000 + number)
        results.add(
            kind=kind,
            examples=seen.total(),
            **seen,
            seconds=round(time.monotonic() - start, 1),
        )
        if number % 20 == 0:
            _say(f"{results.total('examples'):,} states and recipes")


def summary(kills: Results, examples: Results) -> str:
    """Sum up what is done; the two go side by side, so the longer one is the duration."""
    minutes = round(max(kills.seconds, examples.seconds) / 60)
    duration = f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
    return (
        f"{kills.total('kills'):,} kills ({kills.total('kills', kind='two ranks'):,} of two ranks, "
        f"{kills.total('saves'):,} amid a save): every run ended bit-equal. "
        f"{examples.total('examples'):,} states and recipes: no traceback. "
        f"{duration} on {len(os.sched_getaffinity(0))} cores."
    )


def _emptied(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def _say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {line}", flush=True)


def soak(out: Path, *, kills: int, ddp_kills: int, examples: int, seed: int = 0) -> str:
    """Do what the results in a folder lack, and return the line that sums them up.

    Raises:
        AssertionError: something failed.
    """
    out.mkdir(parents=True, exist_ok=True)
    killed, thrown = out / "kills.jsonl", out / "examples.jsonl"
    arguments = (Results(thrown), examples, seed, out)
    fuzzing = FORK.Process(target=throw_all, args=arguments, daemon=True)
    fuzzing.start()
    kill_all(Results(killed), shares(kills, ddp_kills), seed, out)
    fuzzing.join()
    assert fuzzing.exitcode == 0, "an example raised what it may not; see above"
    return summary(Results(killed), Results(thrown))


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="keeps the results")
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--ddp-kills", type=int, default=100, help="how many of them of two ranks")
    parser.add_argument("--examples", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    options = vars(parser.parse_args())
    # Python's exit, which a plain SIGTERM leaves out, takes the other process along.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    print(soak(options.pop("out").resolve(), **options))


if __name__ == "__main__":
    main()
