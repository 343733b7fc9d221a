"""Calibration under a Trainer: the probe, and the copy that trial steps begin from."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pulseopt_hf.aees.calibration import SHORTEST_RUN, Calibration, Movement, Order
from pulseopt_hf.aees.state import StateDict, StateError, field, integer
from pulseopt_hf.config import PulseOptConfig
from pulseopt_hf.optim import AEES
from pulseopt_hf.optim.snapshot import Snapshot

logger = logging.getLogger("pulseopt_hf")

PROBE_ROWS = 32  # in all, over all ranks
_FILE = "pulse_origin_{}.safetensors"


class NoProbeLoss(ValueError):
    """A Trainer's `prediction_step` returns no loss for rows of its training data."""


class Probe:
    """Rows of the training data whose loss is measured now and then, always the same ones.

    They are drawn by a generator of their own and measured one by one, with dropout off; the global
    generators are left as they were. The validation data is never looked at.

    Args:
        trainer: the Trainer, when training begins.
        seed: seed of the draw.
    """

    def __init__(self, trainer: Any, seed: int) -> None:
        """See the class."""
        self._trainer = trainer
        dataset = trainer.train_dataset
        size = len(dataset)
        self._ranks, self._rank = trainer.args.world_size, trainer.args.process_index
        wanted = max(1, PROBE_ROWS // self._ranks) * self._ranks
        rng = random.Random(seed)
        rows = (
            rng.sample(range(size), wanted)
            if size >= wanted
            else rng.choices(range(size), k=wanted)
        )
        part = dataset.select(rows) if hasattr(dataset, "select") else _Rows(dataset, rows)
        with _settings(trainer.args, per_device_eval_batch_size=1), _same_randomness(seed):
            self._batches = list(trainer.get_test_dataloader(part))

    @property
    def is_of_classes(self) -> bool:
        """Whether every row has one class as its label, so that its loss is a cross-entropy."""
        config = getattr(self._trainer.model, "config", None)
        if getattr(config, "num_labels", None) == 1:
            return False  # whole numbers to be hit, not classes
        batch = self._batches[0]
        if not isinstance(batch, Mapping):
            return False
        labels = [batch[name] for name in self._trainer.label_names if name in batch]
        return bool(labels) and all(
            # Object detectors are given their labels as a list of mappings.
            isinstance(label, Tensor) and label.numel() == 1 and not label.is_floating_point()
            for label in labels
        )

    def losses(self, aees: AEES) -> list[float]:
        """Measure the loss of every row, shape (rows over all ranks,); every rank must call it.

        Raises:
            NoProbeLoss: the model returns no loss for its training data.
        """
        trainer = self._trainer
        model = trainer.model_wrapped
        training = model.training
        model.eval()
        try:
            with _same_randomness(0):
                losses = [
                    trainer.prediction_step(model, batch, prediction_loss_only=True)[0]
                    for batch in self._batches
                ]
        finally:
            model.train(training)
        if any(loss is None for loss in losses):
            raise NoProbeLoss(
                "`calibration` measures the loss of training rows outside of a training step, and "
                "this Trainer's `prediction_step` returns none. Name the columns of the labels in "
                "`label_names`, or set `calibration` to 'off'."
            )
        # Each rank holds rows of its own; with zeros in the others' places a mean joins them.
        joined: list[float | Tensor] = [0.0] * (len(losses) * self._ranks)
        joined[self._rank :: self._ranks] = [loss.detach().mean().float() for loss in losses]
        return [loss * self._ranks for loss in aees.mean_over_ranks(joined)]


class Calibrator:
    """Carries out a `Calibration` between the steps of a Trainer.

    Args:
        trainer: the Trainer, when training begins.
        aees: the AEES of the run, whose episodes wait until the search ends.
        config: the knobs of the run; the probe is drawn with their seed.
        max_steps: optimizer steps of the run.
    """

    def __init__(self, trainer: Any, aees: AEES, config: PulseOptConfig, max_steps: int) -> None:
        """See the class."""
        self._trainer = trainer
        self._aees = aees
        self._is_demanded = config.calibration != "auto"
        self._seed = trainer.args.seed if config.seed is None else config.seed
        self._probe: Probe | None = None
        self._origin = Snapshot(trainer.optimizer, list(trainer.model.buffers()))
        self._steps_before = 0  # optimizer steps that had happened when the trial began
        self.search = Calibration(max(max_steps, SHORTEST_RUN), ramp=not self._warms_up())
        aees.calibration = self.search
        aees.is_calibrating = True

    @classmethod
    def of(
        cls, trainer: Any, aees: AEES, config: PulseOptConfig, max_steps: int
    ) -> Calibrator | None:
        """Return the calibrator that the knobs ask for, if any.

        Raises:
            ValueError: calibration is demanded, and the engine or the data set does not allow it.
        """
        if config.calibration == "off":
            return None
        obstacle = None
        if trainer.is_deepspeed_enabled:
            obstacle = (
                "DeepSpeed keeps parameters and optimizer state where they cannot be put back. "
                "Train with DDP or FSDP2 to calibrate"
            )
        elif not hasattr(trainer.train_dataset, "__len__"):
            obstacle = "it draws a probe from the training data, and a stream has no length"
        if obstacle is not None and config.calibration != "auto":
            raise ValueError(f"`calibration` must be 'off' or 'auto' here: {obstacle}.")
        if obstacle is None and max_steps < SHORTEST_RUN:
            obstacle = f"{max_steps} steps are too few, {SHORTEST_RUN} are needed"
        if obstacle is not None:
            logger.warning(
                "The learning rate is not calibrated and the base LR taken as it is: %s. Set "
                "`calibration` to 'off' if that is what you want.",
                obstacle,
            )
            return None
        return cls(trainer, aees, config, max_steps)

    def begin_step(self, step: int) -> None:
        """Set the LR of an optimizer step, after ending a trial where one is due.

        Raises:
            NoProbeLoss: calibration is demanded, and there is no loss to measure.
        """
        aees, search = self._aees, self.search
        if search.is_due(step):
            if search.phase == "start":
                self._begin(step)
            elif aees.optimizer_steps == self._steps_before:
                search.postpone(step)
            else:
                # Running statistics, as a batch norm's, move with every batch whatever the LR is.
                self._origin.restore_buffers()
                self._obey(search.advance(step, Movement(self._losses(), self._weights())))
                last = search.trials[-1]
                logger.info(
                    "Calibration at step %d: %.3g x the base LR moved losses by %.2g, weights by "
                    "%.2g",
                    *(step, last.scale, last.loss_movement, last.weight_movement),
                )
                if search.failed:
                    logger.warning(
                        "The learning rate could not be calibrated: in %d trial steps the losses "
                        "of training rows did not move in keeping with the LR. The base LR is "
                        "taken as it is.",
                        len(search.trials),
                    )
                elif search.is_done:
                    logger.info("Calibrated: %.3g x the base LR", search.scale)
            self._steps_before = aees.optimizer_steps
        aees.lr_scale = search.multiplier(step)
        aees.is_calibrating = not search.is_done
        # Trials are taken at the peak of the schedule, whose warm-up comes after them.
        aees.base_lrs = None if search.is_done else self._peaks()

    def _begin(self, step: int) -> None:
        try:
            losses = self._losses()
        except NoProbeLoss as error:
            if self._is_demanded:
                raise
            logger.warning("%s The base LR is taken as it is.", error)
            self._probe = None
            self.search.abandon()
        else:
            assert self._probe is not None
            of_classes = self._probe.is_of_classes
            self._obey(self.search.begin(step, losses, of_classes=of_classes))

    def _losses(self) -> list[float]:
        if self._probe is None:
            self._probe = Probe(self._trainer, self._seed)
        return self._probe.losses(self._aees)

    def _weights(self) -> float:
        moved, size = self._aees.mean_over_ranks(self._origin.distance())
        if size == 0.0:
            return 0.0
        return math.sqrt(moved / size) if math.isfinite(moved) else 1e9

    def _obey(self, order: Order) -> None:
        if order.mark:
            self._origin.take()
        if order.restore:
            self._origin.restore()
        if order.finished:
            self._origin.discard()
            self._probe = None

    def _warms_up(self) -> bool:
        """Whether the schedule begins below its peak."""
        now = self._trainer.lr_scheduler.get_last_lr()
        return any(
            float(lr) < peak * (1 - 1e-6) for lr, peak in zip(now, self._peaks(), strict=True)
        )

    def _peaks(self) -> list[float]:
        groups = self._trainer.optimizer.param_groups
        return [float(group.get("initial_lr", group["lr"])) for group in groups]

    def state_dict(self) -> StateDict:
        """Return the search as JSON; the origin is a file of its own, see `save`."""
        return {**self.search.state_dict(), "steps_before": self._steps_before}

    def load_state_dict(self, saved: object, folder: Path | None) -> None:
        """Continue from a checkpoint.

        Raises:
            StateError: the state or the origin is missing or damaged.
        """
        state = field(saved, "calibration", lambda value, name: value)
        self.search.load_state_dict(state)
        self._steps_before = field(state, "steps_before", integer)
        self._aees.is_calibrating = not self.search.is_done
        if self.search.phase == "trials":
            if folder is None:
                raise StateError("The checkpoint's folder is not known, which holds a snapshot.")
            self._origin.load(folder / self._file)

    def save(self, folder: Path) -> None:
        """Write the origin into a checkpoint where the search may still ask for it."""
        if self._origin.is_taken:
            folder.mkdir(parents=True, exist_ok=True)
            self._origin.save(folder / self._file)

    @property
    def _file(self) -> str:
        return _FILE.format(self._trainer.args.process_index)


class _Rows(torch.utils.data.Dataset[Any]):
    def __init__(self, dataset: Any, rows: list[int]) -> None:
        self._dataset, self._rows = dataset, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Any:
        return self._dataset[self._rows[index]]


@contextmanager
def _settings(args: Any, **values: Any) -> Iterator[None]:
    """Make Trainer's data loader one of single-process, fixed-size batches for a moment."""
    values |= {
        "dataloader_num_workers": 0,
        "dataloader_persistent_workers": False,
        "dataloader_prefetch_factor": None,
        "dataloader_drop_last": False,
    }
    before = {name: getattr(args, name) for name in values}
    try:
        for name, value in values.items():
            setattr(args, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(args, name, value)


@contextmanager
def _same_randomness(seed: int) -> Iterator[None]:
    """Seed the global generators for a moment and put them back as they were."""
    import numpy as np

    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.manual_seed(seed)
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
