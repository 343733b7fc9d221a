"""A run's folder to one plain object. Loads neither torch nor Transformers, and draws nothing."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pulseopt_hf.aees.calibration import Outcome, Trial, outcome_from_json, trial_from_json
from pulseopt_hf.aees.records import EpisodeRecord, records_from_json, records_from_logs
from pulseopt_hf.aees.run_record import FILE_NAME, Log, loggable
from pulseopt_hf.aees.state import StateError, field, integer, list_of
from pulseopt_hf.errors import UsageError
from pulseopt_hf.recipes.catalogue import RECIPE
from pulseopt_hf.recipes.yaml_file import read_yaml
from pulseopt_hf.report.data import RunData
from pulseopt_hf.report.record_file import RecordFile

_STATE, _EPISODES = "trainer_state.json", "episodes.json"


def read_run(folder: str | Path, *, now: float | None = None) -> RunData:
    """Read what a run has written so far.

    A run of this release has a record, `pulse.jsonl`. Of any other run, a plain Trainer's too,
    what its `trainer_state.json`, checkpoints and `episodes.json` hold is read.

    Args:
        folder: the run's `output_dir`.
        now: seconds since 1970, to tell a run that goes on from one that fell silent; by default
            the clock's.

    Raises:
        UsageError: the folder is no run, its files are damaged or of a newer format version.
    """
    path = Path(folder)
    require_folder(path)
    if (path / FILE_NAME).is_file():
        record = RecordFile(path)
        record.read()
        return record.data(time.time() if now is None else now)
    states = _states(path)
    if not states:
        raise UsageError(
            f"{path}: is not a run: it has no {FILE_NAME}, no {_STATE} and no checkpoint. Name "
            "the `output_dir` of a run that has logged something."
        )
    return _from_states(path, states)


def require_folder(path: Path) -> None:
    """Refuse what is no folder.

    Raises:
        UsageError: there is nothing, or a file.
    """
    if not path.exists():
        raise UsageError(f"{path}: there is no such folder.")
    if not path.is_dir():
        raise UsageError(f"{path}: is a file; name the run's folder, its `output_dir`.")


def require_episodes(run: RunData) -> None:
    """Refuse a run whose arms have not been played yet.

    Raises:
        UsageError: no episode and no trial of a calibration has ended.
    """
    if not run.episodes and not run.trials:
        since = f" at step {run.step} of {run.max_steps}" if run.max_steps else ""
        raise UsageError(
            f"{run.folder}: has no finished episode{since}. Look again when one has ended and been "
            "logged; `logging_steps` says how often that is."
        )


def _states(path: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Read the `trainer_state.json` of a folder and of its latest checkpoint."""
    found = []
    for file in path.glob(f"checkpoint-*/{_STATE}"):
        match = re.fullmatch(r"checkpoint-(\d+)", file.parent.name)
        if match:
            found.append((int(match[1]), file))
    files = [path / _STATE, *(file for _, file in sorted(found)[-1:])]
    return [(file, _json(file)) for file in files if file.is_file()]


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{file}: cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{file}: is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise UsageError(f"{file}: must hold a mapping, got {type(content).__name__}.")
    return content


def _from_states(path: Path, states: list[tuple[Path, dict[str, Any]]]) -> RunData:
    """Put a run together from what Trainer itself saved."""
    file, state = max(states, key=lambda item: _step(*item))
    try:
        step, max_steps = field(state, "global_step", integer), field(state, "max_steps", integer)
        logs = field(state, "log_history", list_of(_log))
        episodes, trials = _saved_episodes(path, state)
    except StateError as error:
        raise UsageError(f"{file}: {error}") from error
    return RunData(
        folder=path,
        name=path.resolve().name,
        status="finished" if step >= max_steps else "stopped",
        step=step,
        max_steps=max_steps,
        base_lr=_base_lr(path),
        knobs=_saved_knobs(state),
        versions={},
        resumed_from=None,
        logs=logs,
        episodes=episodes,
        trials=trials,
        outcome=_saved_outcome(state),
        error=None,
        updated=None,
    )


def _base_lr(path: Path) -> float | None:
    """Return what a run from a recipe says; the first LR that Trainer logs is already lower."""
    with contextlib.suppress(UsageError):  # nothing there, or not our file
        value = read_yaml(path / RECIPE).get("learning_rate")
        if isinstance(value, int | float):
            return float(value)
    return None


def _step(file: Path, state: dict[str, Any]) -> int:
    try:
        return field(state, "global_step", integer)
    except StateError as error:
        raise UsageError(f"{file}: {error}") from error


def _log(value: object, name: str) -> Log:
    step = field(value, "step", integer)
    assert isinstance(value, Mapping)
    return Log(step, loggable({key: v for key, v in value.items() if key != "step"}))


def _saved_episodes(path: Path, state: object) -> tuple[list[EpisodeRecord], list[Trial]]:
    """Take the record of episodes from `episodes.json`, or else from the checkpoint."""
    if (path / _EPISODES).is_file():
        logs = _json(path / _EPISODES)
        try:
            trials = logs.get("calibration_trials", [])
            return records_from_logs(logs), list_of(trial_from_json)(trials, "calibration_trials")
        except StateError as error:
            raise UsageError(f"{path / _EPISODES}: {error}") from error
    saved = _saved_state(state)
    if saved is None:
        return [], []
    controller = field(saved, "controller", lambda value, name: value)
    records = field(controller, "records", records_from_json)
    search = saved.get("calibration")
    trials = [] if search is None else field(search, "trials", list_of(trial_from_json))
    return records, trials


def _saved_outcome(state: object) -> Outcome | None:
    saved = (_saved_state(state) or {}).get("calibration")
    outcomes = [] if saved is None else field(saved, "outcomes", list_of(outcome_from_json))
    return outcomes[-1] if outcomes else None


def _saved_knobs(state: object) -> dict[str, Any]:
    value: object = _saved_state(state)
    for name in ("controller", "settings"):
        value = value.get(name) if isinstance(value, Mapping) else None
    return dict(value) if isinstance(value, Mapping) else {}


def _saved_state(state: object) -> Mapping[str, Any] | None:
    """Return what PulseOptCallback keeps in a `trainer_state.json`, if anything."""
    value = state
    for name in ("stateful_callbacks", "PulseOptCallback", "attributes", "saved_state"):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value if isinstance(value, Mapping) else None
