"""Calibration under a Trainer: the probe, and the copies that the search asks for."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pulseopt_hf.aees.calibration import SHORTEST_RUN, Calibration, Order
from pulseopt_hf.aees.state import StateDict, StateError, field
from pulseopt_hf.config import PulseOptConfig
from pulseopt_hf.optim import AEES
from pulseopt_hf.optim.snapshot import Snapshot

logger = logging.getLogger("pulseopt_hf")

PROBE_PARTS = 8
PROBE_ROWS = 64  # in all, over all ranks


class Probe:
    """Rows of the training data whose loss is measured now and then, always the same ones.

    They are drawn by a generator of their own and measured in parts, with dropout off; the global
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
        world = trainer.args.world_size
        per_rank = max(1, PROBE_ROWS // PROBE_PARTS // world)
        wanted = per_rank * world * PROBE_PARTS
        rng = random.Random(seed)
        rows = (
            rng.sample(range(size), wanted)
            if size >= wanted
            else rng.choices(range(size), k=wanted)
        )
        part = dataset.select(rows) if hasattr(dataset, "select") else _Rows(dataset, rows)
        with _settings(trainer.args, per_device_eval_batch_size=per_rank), _same_randomness(seed):
            self._batches = list(trainer.get_test_dataloader(part))

    def losses(self) -> list[Tensor]:
        """Measure this rank's loss part by part: `PROBE_PARTS` tensors of shape ().

        Raises:
            ValueError: the model returns no loss for its training data.
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
            raise ValueError(
                "`calibration` measures the loss of training rows outside of a training step, and "
                "this Trainer's `prediction_step` returns none. Set `calibration` to 'off'."
            )
        return [loss.detach().mean().float() for loss in losses]


class Calibrator:
    """Carries out a `Calibration` between the steps of a Trainer.

    Args:
        trainer: the Trainer, when training begins.
        aees: the AEES of the run, whose episodes wait until the search ends.
        seed: seed of the probe.
        max_steps: optimizer steps of the run.
    """

    def __init__(self, trainer: Any, aees: AEES, seed: int, max_steps: int) -> None:
        """See the class."""
        self.search = Calibration(max_steps)
        self._trainer = trainer
        self._aees = aees
        self._probe: Probe | None = Probe(trainer, seed)
        buffers = list(trainer.model.buffers())
        self._start = Snapshot(trainer.optimizer, buffers)
        self._best = Snapshot(trainer.optimizer, buffers)
        self._warmed_up = False
        aees.calibration = self.search
        aees.is_calibrating = True

    @classmethod
    def of(
        cls, trainer: Any, aees: AEES, config: PulseOptConfig, max_steps: int
    ) -> Calibrator | None:
        """Return the calibrator that the knobs ask for, if any.

        Raises:
            ValueError: the engine or the data set does not allow for one.
        """
        if config.calibration == "off":
            return None
        if trainer.is_deepspeed_enabled:
            raise ValueError(
                "`calibration` must be 'off' under DeepSpeed, which keeps parameters and optimizer "
                "state where they cannot be put back. Set it, or train with DDP or FSDP2."
            )
        if not hasattr(trainer.train_dataset, "__len__"):
            raise ValueError(
                "`calibration` draws a probe from the training data and needs a data set with a "
                "length, not a stream. Set `calibration` to 'off'."
            )
        if max_steps < SHORTEST_RUN:
            logger.warning(
                "%d steps are too few to calibrate the learning rate (%d are needed): the base LR "
                "is taken as it is.",
                max_steps,
                SHORTEST_RUN,
            )
            return None
        seed = trainer.args.seed if config.seed is None else config.seed
        return cls(trainer, aees, seed, max_steps)

    def begin_step(self, step: int) -> None:
        """Set the LR of an optimizer step, after ending a segment where one is due."""
        aees, search = self._aees, self.search
        while search.is_due(step):
            assert self._probe is not None
            losses = aees.mean_over_ranks(self._probe.losses())
            self._obey(search.advance(step, losses))
            logger.info("Calibration at step %d: %s at %.3g", step, search.phase, search.scale)
        aees.lr_scale = search.multiplier(step)
        aees.is_calibrating = not search.is_done
        aees.base_lrs = None if self._is_warmed_up() else list(self._peaks())

    def _obey(self, order: Order) -> None:
        if order.keep:
            self._best.take()
        if order.restore == "start":
            self._start.restore()
        elif order.restore == "best":
            self._best.restore()
        if order.mark:
            self._start.take()
        if order.finished:
            self._start.discard()
            self._best.discard()
            self._probe = None

    def _is_warmed_up(self) -> bool:
        """Whether the schedule has reached its peak; until then the peak stands in for it."""
        if not self._warmed_up:
            scheduler = self._trainer.lr_scheduler
            now = [float(lr) for lr in scheduler.get_last_lr()]
            self._warmed_up = all(
                lr >= peak * (1 - 1e-6) for lr, peak in zip(now, self._peaks(), strict=True)
            )
        return self._warmed_up

    def _peaks(self) -> list[float]:
        groups = self._trainer.optimizer.param_groups
        return [float(group.get("initial_lr", group["lr"])) for group in groups]

    def state_dict(self) -> StateDict:
        """Return the search as JSON; its copies are files of their own, see `save`."""
        return {**self.search.state_dict(), "warmed_up": self._warmed_up}

    def load_state_dict(self, saved: object, folder: Path | None) -> None:
        """Continue from a checkpoint.

        Raises:
            StateError: the state or a file of copies is missing or damaged.
        """
        state = field(saved, "calibration", lambda value, name: value)
        self.search.load_state_dict(state)
        self._warmed_up = field(state, "warmed_up", lambda value, name: value is True)
        self._aees.is_calibrating = not self.search.is_done
        if self.search.is_done:
            self._probe = None
            return
        for name, copy in self._copies():
            if self.search.needs(name):
                if folder is None:
                    raise StateError(
                        "The checkpoint's folder is not known, which holds a snapshot."
                    )
                copy.load(folder / self._file(name))

    def save(self, folder: Path) -> None:
        """Write the copies that the search may still ask for into a checkpoint."""
        for name, copy in self._copies():
            if self.search.needs(name):
                folder.mkdir(parents=True, exist_ok=True)
                copy.save(folder / self._file(name))

    def _copies(self) -> Iterator[tuple[str, Snapshot]]:
        yield "start", self._start
        yield "best", self._best

    def _file(self, name: str) -> str:
        return f"pulse_{name}_{self._trainer.args.process_index}.safetensors"


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
