"""The run folder: where it is, what it records, and which checkpoint a run is resumed from."""

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

from pulseopt_hf.aees.record_format import FILE_NAME
from pulseopt_hf.errors import UsageError
from pulseopt_hf.files import write_whole
from pulseopt_hf.recipes import catalogue
from pulseopt_hf.recipes.launching import is_launched
from pulseopt_hf.recipes.parsing import Resolved, to_yaml_values
from pulseopt_hf.recipes.yaml_file import read_yaml
from pulseopt_hf.report.commands import PAGE, PICTURES
from pulseopt_hf.trainer.checkpoints import checkpoints, newest_whole_checkpoint

RECIPE, RUN, LOG = catalogue.RECIPE, "run.json", "train.log"
_PACKAGES = (
    *("pulseopt-hf", "torch", "transformers", "accelerate", "datasets", "evaluate", "peft"),
    *("tokenizers", "scikit-learn", "scipy", "numpy"),
)


def choose(
    resolved: Resolved, *, resume: bool, overwrite: bool
) -> tuple[Path, Path | None, list[str]]:
    """Choose the run folder, and the checkpoint to continue from. Nothing is written.

    The folder is the one that the user named, or the first free one of `runs/NAME`,
    `runs/NAME-2`, ...; to resume or overwrite, the last one that is taken. With it come the
    checkpoint, if any, and a line for each later checkpoint that was passed over.
    """
    path = _folder(resolved, resume=resume, overwrite=overwrite)
    named = resolved.training.resume_from_checkpoint
    if not resume:
        if named is not None and not (Path(named) / "trainer_state.json").is_file():
            raise UsageError(f"`resume_from_checkpoint`: {named} is not a checkpoint.")
        return path, None if named is None else Path(named), []
    checkpoint, passed_over = newest_whole_checkpoint(path)
    if checkpoint is None:
        why = f" ({'; '.join(passed_over)})" if passed_over else ""
        raise UsageError(
            f"`--resume`: there is no whole checkpoint in {path}{why}. Leave it out to start a new "
            "run."
        )
    if (path / RECIPE).is_file():
        before, now = read_yaml(path / RECIPE), to_yaml_values(resolved)
        problems = [
            f"`--resume`: `{key}` was {before.get(key, 'not set')} in this run and would be "
            f"{now.get(key, 'not set')} now; choose one with `--{key}`."
            for key in {**before, **now}
            if before.get(key) != now.get(key) and key not in resolved.overrides
        ]
        if problems:
            raise UsageError(*problems)
    return path, checkpoint, passed_over


def _folder(resolved: Resolved, *, resume: bool, overwrite: bool) -> Path:
    named = resolved.training.output_dir
    if named is not None:
        path = Path(named)
        if path.exists() and not path.is_dir():
            raise UsageError(f"`output_dir`: {path} is a file.")
        if not (resume or overwrite) and ((path / RECIPE).exists() or checkpoints(path)):
            raise UsageError(
                f"`output_dir`: {path} holds a run already. Continue it with `--resume`, replace "
                "it with `--overwrite`, or name another folder."
            )
        return path
    stem = resolved.path.parent.name if resolved.path.name == RECIPE else resolved.path.stem
    if resolved.path != Path(resolved.name):
        stem = resolved.name.replace("/", "-")
    path, taken = Path("runs") / stem, []
    while path.exists():
        taken.append(path)
        path = Path("runs") / f"{stem}-{len(taken) + 1}"
    if resume and taken:
        return next((old for old in reversed(taken) if checkpoints(old)), taken[-1])
    return taken[-1] if overwrite and taken else path


def resume_command(path: Path, resolved: Resolved, command: Sequence[str]) -> str:
    """Return the command line that continues a run which this one started."""
    start = ["pulseopt-hf"]
    if resolved.training.world_size > 1 and not is_launched():
        start = ["accelerate", "launch", "...", "-m", "pulseopt_hf"]
    once = ("--overwrite", "--resume")
    words = [word for word in _without_secrets(command[1:]) if word not in once]
    if "output_dir" not in resolved.overrides:
        words += ["--output_dir", str(path)]
    return shlex.join([*start, *words, "--resume"])


def clear(path: Path) -> None:
    """Delete what an earlier run left: checkpoints, results, records, its page and pictures."""
    for checkpoint in checkpoints(path):
        shutil.rmtree(checkpoint)
    records = ("*_results.json", RECIPE, RUN, LOG, FILE_NAME, "trainer_state.json")
    for pattern in (*records, PAGE, f"{PICTURES}/*.svg", f"{PICTURES}/*.png"):
        for file in path.glob(pattern):
            file.unlink()


def write_start(
    path: Path, resolved: Resolved, command: Sequence[str], resumed: Path | None
) -> None:
    """Write the recipe that repeats the run, and add this command to the record of the folder."""
    path.mkdir(parents=True, exist_ok=True)
    header = (
        f"# The resolved recipe of the run in this folder. To run it again, in another folder:\n"
        f"#   pulseopt-hf train {path / RECIPE}\n"
    )
    values = yaml.safe_dump(to_yaml_values(resolved), sort_keys=False, allow_unicode=True)
    write_whole(path / RECIPE, header + values)
    file, commands = path / RUN, []
    if resumed is not None and file.exists():
        commands = json.loads(file.read_text(encoding="utf-8"))["commands"]
    commands.append(
        {
            "command": _without_secrets(command),
            "recipe": resolved.name,
            "resumed_from": None if resumed is None else resumed.name,
            "git_commit": _git_commit(),
            "versions": versions(),
            "device": str(resolved.training.device),
            "processes": resolved.training.world_size,
        }
    )
    write_whole(file, json.dumps({"commands": commands}, indent=1) + "\n")


def versions() -> dict[str, str]:
    """Return the versions of Python, the platform and the packages that a run uses."""
    result = {"python": platform.python_version(), "platform": platform.platform()}
    for name in _PACKAGES:
        try:
            result[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return result


def _git_commit() -> str | None:
    """Return the commit of the working folder, if any, and whether files differ from it."""
    git = ("git", "describe", "--always", "--no-abbrev", "--exclude=*", "--dirty= with changes")
    try:
        quiet = subprocess.DEVNULL
        return subprocess.check_output(git, text=True, timeout=10, stderr=quiet).strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _without_secrets(command: Sequence[str]) -> list[str]:
    result, hide = [], False
    for word in command:
        secret = re.match(r"(--hub[_-]token)(=.*)?$", word)
        result.append("..." if hide else f"{secret[1]}=..." if secret and secret[2] else word)
        hide = bool(secret and not secret[2])
    return result
