"""A checkpoint is resumed on another number of ranks: arms and rewards are kept and go on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pulseopt_hf import PulseOptConfig, PulseOptTrainer
from tests.engines.ranks import run_ranks
from tests.versions import needs

CONFIG = PulseOptConfig(
    lr_candidates=[0.5, 1.0, 2.0], noise_candidates=[0.01], episode_length=4, seed=0
)


@needs("transformers", "5.24", "hands torch a device `cpu:0`, where some torch can load nothing")
def test_from_one_rank_to_two_and_back(
    tiny_model: Callable[[], Any],
    tiny_data: Any,
    arguments: Callable[..., Any],
    tmp_path: Path,
) -> None:
    def train(first: Any, world_size: int, folder: str, steps: int) -> list[Any]:
        def body(rank: int) -> Any:
            args = arguments(
                output_dir=str(tmp_path / folder),
                max_steps=steps,
                per_device_train_batch_size=4 // world_size,
                save_strategy="steps",
                save_steps=6,
            )
            trainer = PulseOptTrainer(tiny_model(), args, train_dataset=tiny_data, pulse=CONFIG)
            trainer.train(resume_from_checkpoint=first)
            assert trainer.args.world_size == world_size
            assert trainer.aees is not None
            weights = torch.cat([p.detach().reshape(-1) for p in trainer.model.parameters()])
            return trainer.aees.get_logs(), weights

        return run_ranks(world_size, body)

    [(one, _)] = train(None, 1, "one", 12)
    on_two = train(str(tmp_path / "one/checkpoint-6"), 2, "two", 18)
    logs, weights = on_two[0]
    assert on_two[1][0] == logs
    assert torch.equal(on_two[1][1], weights)
    assert logs["episode_rewards"][0] == one["episode_rewards"][0]
    assert logs["episode_start_steps"] == [0, 4, 8, 12, 16]
    [(back, _)] = train(str(tmp_path / "two/checkpoint-12"), 1, "back", 18)
    assert back["episode_rewards"][:3] == logs["episode_rewards"][:3]
    assert back["episode_start_steps"] == [0, 4, 8, 12, 16]
