"""Which of a run's checkpoints are whole. Looks at files; loads and unpickles none."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator
from os import PathLike
from pathlib import Path

from safetensors import SafetensorError, safe_open

_WEIGHTS = ("*.safetensors", "pytorch_model*", "adapter_model*", "global_step*")
_OPTIMIZER = ("optimizer*", "global_step*")
_OWN = "pulse_"  # begins the names of snapshots, which are not the model's weights


def checkpoints(folder: str | PathLike[str]) -> list[Path]:
    """Return the folders of checkpoints in a run's folder, latest step first, whole or not."""
    found = []
    for child in Path(folder).glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", child.name)
        if match and child.is_dir():
            found.append((int(match[1]), child))
    return [child for _, child in sorted(found, reverse=True)]


def newest_whole_checkpoint(folder: str | PathLike[str]) -> tuple[Path | None, list[str]]:
    """Find the newest checkpoint that a run can resume from after a kill or a damaged save.

        checkpoint, passed_over = newest_whole_checkpoint(args.output_dir)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))

    Args:
        folder: the run's `output_dir`.

    Returns:
        The newest whole checkpoint, or `None`; and for each newer one that was passed over, a line
        that says what is wrong with it.
    """
    passed_over: list[str] = []
    for checkpoint in checkpoints(folder):
        damage = next(_damage(checkpoint), None)
        if damage is None:
            return checkpoint, passed_over
        passed_over.append(f"passed over {checkpoint.name}: {damage}")
    return None, passed_over


def has_optimizer(checkpoint: Path) -> bool:
    """Whether a checkpoint holds an optimizer's state, which `save_only_model` leaves out."""
    return any(any(checkpoint.glob(pattern)) for pattern in _OPTIMIZER)


def _damage(checkpoint: Path) -> Iterator[str]:
    """Say what keeps a run from being resumed from here."""
    state = checkpoint / "trainer_state.json"
    try:
        content = json.loads(state.read_text(encoding="utf-8"))
    except FileNotFoundError:
        yield "it has no trainer_state.json"
        return
    except (OSError, ValueError, RecursionError):
        yield "its trainer_state.json is cut short"
        return
    step = content.get("global_step") if isinstance(content, dict) else None
    if step != int(checkpoint.name.rpartition("-")[2]):
        yield f"its trainer_state.json is of step {step}"
    weights = [file for pattern in _WEIGHTS for file in checkpoint.glob(pattern)]
    if all(file.name.startswith(_OWN) for file in weights):
        yield "it has no weights"
    if not has_optimizer(checkpoint):
        yield "it has no optimizer state (`save_only_model` saves none)"
    if not any(checkpoint.glob("rng_state*")):
        yield "it has no random state"
    if not any(any(checkpoint.glob(pattern)) for pattern in ("scheduler.pt", "global_step*")):
        yield "it has no scheduler state"
    for file in sorted(checkpoint.iterdir()):
        if file.suffix == ".safetensors":
            try:
                with safe_open(file, framework="pt") as opened:
                    opened.keys()
            except (OSError, SafetensorError):
                yield f"its {file.name} is cut short"
        elif file.suffix in (".pt", ".pth", ".bin") and not _is_whole_archive(file):
            yield f"its {file.name} is cut short"


def _is_whole_archive(file: Path) -> bool:
    """Whether torch wrote the file to its end; small arguments are plain pickles in no archive."""
    return file.name == "training_args.bin" or zipfile.is_zipfile(file)
