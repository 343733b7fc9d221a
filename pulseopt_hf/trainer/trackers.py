"""Shows the trials of a calibration in the trackers that a Trainer reports to."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pkgutil import resolve_name
from typing import Any

from transformers import TrainerCallback
from transformers.integrations.integration_utils import (
    TensorBoardCallback,
    TrackioCallback,
    WandbCallback,
)

from pulseopt_hf.aees.calibration import Trial

logger = logging.getLogger("pulseopt_hf")

KEY = "pulse/trials"
COLUMNS = ["trial", "step", "learning rate", "outputs moved", "weights moved"]
# What makes a table of columns and rows for each; TensorBoard shows Markdown.
_TABLES: dict[type[TrainerCallback], str] = {
    TensorBoardCallback: "pulseopt_hf.trainer.card:table",
    TrackioCallback: "trackio:Table",
    WandbCallback: "wandb:Table",
}


def show_trials(trainer: Any, trials: Sequence[Trial]) -> None:
    """Log the trials as a table, once, through those callbacks of a Trainer that have tables.

    Outputs are in units of what dropout of a tenth does, weights are shares. A tracker that fails
    gets no table, and a warning says so.
    """
    rows = [
        [number, trial.step]
        + [float(f"{x:.4g}") for x in (trial.learning_rate, trial.movement, trial.weight_movement)]
        for number, trial in enumerate(trials, 1)
    ]
    for callback in trainer.callback_handler.callbacks:
        for kind, maker in _TABLES.items():
            if not isinstance(callback, kind):
                continue
            try:
                values = {KEY: resolve_name(maker)(COLUMNS, rows)}
                # The callback has the writer, and logs it at the step as it does other values.
                callback.on_log(trainer.args, trainer.state, trainer.control, logs=values)
            except Exception as error:
                # Whatever a tracker does, training goes on.
                logger.warning(
                    "%s did not take the trials: %s: %s", kind.__name__, type(error).__name__, error
                )
