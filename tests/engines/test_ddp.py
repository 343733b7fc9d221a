"""DDP on forked ranks over gloo."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import Trainer

from pulseopt_hf import PulseOptTrainer
from tests.conftest import Make
from tests.engines.engine import assert_ranks_agree


@pytest.mark.parametrize("rows", [70, 67, 9])
def test_unequal_last_batches_and_uneven_data_keep_ranks_together(
    rows: int, on_ranks: Make, tiny_data: Any
) -> None:
    settings = {"max_steps": -1, "num_train_epochs": 6, "gradient_accumulation_steps": 2}
    knobs = {"lr_candidates": [0.5, 2.0], "episode_length": 2}
    end = assert_ranks_agree(
        on_ranks("ddp", pulse=knobs, train_dataset=tiny_data[:rows], **settings), 2
    )
    assert end.steps == len(end.history) == 6 * -(-rows // 16)


def test_a_whole_run_costs_one_broadcast_and_one_all_reduce_of_a_few_bytes_per_episode(
    on_ranks: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    episode_length, steps = 6, 24
    sent: list[tuple[str, int]] = []

    def count(name: str) -> None:
        plain = getattr(dist, name)

        def counting(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            sent.append((name, tensor.numel() * tensor.element_size()))
            return plain(tensor, *args, **kwargs)

        monkeypatch.setattr(dist, name, counting)

    for name in ("all_reduce", "broadcast", "all_gather_into_tensor", "reduce_scatter_tensor"):
        count(name)

    def messages(cls: Any, pulse: Any = None) -> list[tuple[str, int]]:
        ends = on_ranks("ddp", cls, pulse, max_steps=steps, look=lambda _: list(sent))
        return ends[0].seen[-1]

    plain = messages(Trainer)
    ours = messages(
        PulseOptTrainer, {"lr_candidates": [0.5, 2.0], "episode_length": episode_length}
    )
    for message in plain:
        ours.remove(message)
    episodes = steps // episode_length
    all_reduces = [size for name, size in ours if name == "all_reduce"]
    broadcasts = [size for name, size in ours if name == "broadcast"]
    assert all_reduces == [4 * episode_length] * episodes
    assert broadcasts == [3 * 8] * episodes
    assert len(ours) == 2 * episodes
