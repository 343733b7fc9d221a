"""AEES through Accelerate's own checkpoints: `register_for_checkpointing`, `save_state`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

from pulseopt_hf import AEES
from tests.conftest import ARMS

MODES = {"structured_control_mode": "conditional", "context_mode": "trend"}
KNOBS: dict[str, Any] = {**ARMS, **MODES, "episode_length": 3, "seed": 0}


class Loop:
    """A hand-written loop under Accelerate, that can stop at any micro-batch and go on."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 30)
        rows = torch.randn(60, 4, generator=torch.Generator().manual_seed(1))
        data = DataLoader(TensorDataset(rows), batch_size=2)
        self.model, self.optimizer, self.data, self.scheduler = self.accelerator.prepare(
            model, optimizer, data, scheduler
        )
        self.aees = AEES(self.optimizer, lr_scheduler=self.scheduler, **KNOBS)
        self.accelerator.register_for_checkpointing(self.aees)
        self.losses: list[float] = []

    def run(self, first: int, last: int, folder: Path | None = None) -> None:
        """Run micro-batches `first` to `last`; save before each where a folder is given."""
        for index, (rows,) in enumerate(self.data):
            if not first <= index < last:
                continue
            if folder is not None:
                self.accelerator.save_state(str(folder / str(index)))
            with self.accelerator.accumulate(self.model):
                self.aees.step_start(index)
                loss = (self.model(rows) - rows.sum(1, keepdim=True)).square().mean() + 0.1
                self.accelerator.backward(loss)
                self.aees.step_end(loss)
                self.losses.append(loss.item())
                self.optimizer.zero_grad()


def test_from_every_optimizer_step(tmp_path: Path) -> None:
    whole = Loop()
    whole.run(0, 30, tmp_path)
    # Thirty micro-batches accumulated by two are fifteen steps, and so five episodes of three.
    logs = whole.aees.get_logs()
    assert logs["episode_end_steps"] == [5, 11, 17, 23, 29]
    means = [sum(whole.losses[i : i + 2]) / 2 for i in range(0, 30, 2)]
    assert logs["episode_start_losses"] == pytest.approx(means[0::3])
    assert logs["episode_end_losses"] == pytest.approx(means[2::3])
    assert whole.scheduler.get_last_lr() == pytest.approx([0.05 * 0.55])
    for index in range(2, 30, 2):  # between optimizer steps: gradients are in no checkpoint
        resumed = Loop()
        resumed.accelerator.load_state(str(tmp_path / str(index)))
        resumed.run(index, 30)
        assert resumed.aees.state_dict() == whole.aees.state_dict()
        for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
            assert torch.equal(ours, theirs)


def test_what_accelerate_hands_back_is_checked(tmp_path: Path) -> None:
    loop = Loop()
    loop.run(0, 8)
    loop.accelerator.save_state(str(tmp_path / "state"))
    other = Loop()
    other.aees.config.lr_candidates.append(4.0)
    with pytest.raises(ValueError, match="`lr_candidates` was"):
        other.accelerator.load_state(str(tmp_path / "state"))
