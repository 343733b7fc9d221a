"""The run folder: where it lies, what it says of its run, and what a run is resumed from."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import yaml

from pulseopt_hf.aees.run_record import FILE_NAME
from pulseopt_hf.errors import UsageError
from pulseopt_hf.recipes import catalogue
from pulseopt_hf.recipes.parsing import Resolved, to_yaml_values
from pulseopt_hf.recipes.reading import read_yaml
from pulseopt_hf.report.commands import PAGE, PICTURES
from pulseopt_hf.trainer.checkpoints import checkpoints

RECIPE, RUN, LOG = catalogue.RECIPE, "run.json", "train.log"
_ONCE = ("--overwrite", "--resume")
_PACKAGES = ("pulseopt-hf", "torch", "transformers", "accelerate", "datasets", "evaluate", "peft")
_LIBRARIES = ("tokenizers", "scikit-learn", "scipy", "numpy")


def choose(resolved: Resolved, *, resume: bool, overwrite: bool) -> Path:
    """Return the run folder, which may not be there yet. Nothing is written.

    One that the user named must be free of other runs; else it is the first free one of
    `runs/NAME`, `runs/NAME-2`, ..., or the last one to resume.

    Raises:
        UsageError: the named folder holds a run already, or is no folder.
    """
    named = resolved.training.output_dir
    if named is not None:
        path = Path(named)
        if path.exists() and not path.is_dir():
            raise UsageError(f"`output_dir`: {path} is a file.")
        if not resume and not overwrite and _holds_run(path):
            raise UsageError(
                f"`output_dir`: {path} holds a run already. Go on with it by `--resume`, replace "
                "it by `--overwrite`, or name another folder."
            )
        return path
    stem = resolved.path.parent.name if resolved.path.name == RECIPE else resolved.path.stem
    if resolved.path != Path(resolved.name):
        stem = resolved.name.replace("/", "-")
    candidates = [Path("runs") / stem]
    while candidates[-1].exists():
        candidates.append(Path("runs") / f"{stem}-{len(candidates) + 1}")
    taken = candidates[:-1]
    if resume and taken:
        return next((path for path in reversed(taken) if checkpoints(path)), taken[-1])
    return taken[-1] if overwrite and taken else candidates[-1]


def refuse_unsaid_changes(path: Path, resolved: Resolved) -> None:
    """Check that a run goes on with the settings it had, or with others that the user asks for.

    Raises:
        UsageError: settings differ from the run's, and not by an option of this command.
    """
    if not (path / RECIPE).is_file():
        return
    before, now = read_yaml(path / RECIPE), to_yaml_values(resolved)
    problems = [
        f"`--resume`: `{key}` was {before.get(key, 'not set')} in this run and would be "
        f"{now.get(key, 'not set')} now; name the one you want by `--{key}`."
        for key in {**before, **now}
        if before.get(key) != now.get(key) and key not in resolved.said
    ]
    if problems:
        raise UsageError(*problems)


def command_to_go_on(path: Path, resolved: Resolved, command: Sequence[str]) -> str:
    """Return the command line that goes on with a run that was started by this one."""
    start = ["pulseopt-hf"]
    if resolved.training.world_size > 1:
        start = ["accelerate", "launch", "...", "-m", "pulseopt_hf"]
    words = [word for word in _without_secrets(command[1:]) if word not in _ONCE]
    if "output_dir" not in resolved.said:
        words += ["--output_dir", str(path)]
    return shlex.join([*start, *words, "--resume"])


def clear(path: Path) -> None:
    """Delete what a run before has left: checkpoints, results, records and what shows them."""
    for checkpoint in checkpoints(path):
        shutil.rmtree(checkpoint)
    records = (FILE_NAME, "episodes.json", "trainer_state.json")
    shown = (PAGE, f"{PICTURES}/*.svg", f"{PICTURES}/*.png")
    for pattern in ("*_results.json", RECIPE, RUN, LOG, *records, *shown):
        for file in path.glob(pattern):
            file.unlink()


def write_recipe(path: Path, resolved: Resolved) -> None:
    """Write the recipe that makes the same run again."""
    header = (
        f"# The resolved recipe of the run in this folder. To run it again, in another folder:\n"
        f"#   pulseopt-hf train {path / RECIPE}\n"
    )
    values = yaml.safe_dump(to_yaml_values(resolved), sort_keys=False, allow_unicode=True)
    (path / RECIPE).write_text(header + values, encoding="utf-8")


def write_run(path: Path, resolved: Resolved, command: list[str], resumed: Path | None) -> None:
    """Add this command to the record of what was run here, on what."""
    file = path / RUN
    commands = []
    if resumed is not None and file.exists():
        commands = json.loads(file.read_text(encoding="utf-8"))["commands"]
    training = resolved.training
    commands.append(
        {
            "command": _without_secrets(command),
            "recipe": resolved.name,
            "resumed_from": None if resumed is None else resumed.name,
            "git_commit": git_commit(),
            "versions": versions(),
            "device": str(training.device),
            "processes": training.world_size,
        }
    )
    file.write_text(json.dumps({"commands": commands}, indent=1) + "\n", encoding="utf-8")


def versions() -> dict[str, str]:
    """Return the versions of Python, the platform and the packages that a run uses."""
    result = {"python": platform.python_version(), "platform": platform.platform()}
    for name in (*_PACKAGES, *_LIBRARIES):
        try:
            result[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return result


def git_commit() -> str | None:
    """Return the commit of the working folder, marked where files differ from it, if it has one."""
    try:
        commit = _git("rev-parse", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + (" with changes" if changed else "")


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()


def _holds_run(path: Path) -> bool:
    return (path / RECIPE).exists() or bool(checkpoints(path))


def _without_secrets(command: Sequence[str]) -> list[str]:
    result, hide = [], False
    for word in command:
        secret = re.match(r"(--hub[_-]token)(=.*)?$", word)
        result.append("..." if hide else f"{secret[1]}=..." if secret and secret[2] else word)
        hide = bool(secret and not secret[2])
    return result
