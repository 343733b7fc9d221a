"""Gradient accumulation: an episode counts optimizer steps, and the arm is fixed within one."""

from typing import Any

import pytest

from pulseopt_hf import PulseOptTrainer
from tests.conftest import Make


class Counting(PulseOptTrainer):
    """Notes the arm of every micro-batch and the loss that `training_step` returned."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: dict[int, list[tuple[str, float]]] = {}

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().training_step(*args, **kwargs)
        arm = self.aees.current_candidate.name
        self.seen.setdefault(self.state.global_step, []).append((arm, float(loss)))
        return loss


@pytest.mark.parametrize(("accumulation", "rows"), [(2, 64), (4, 64), (4, 70), (3, 70)])
def test_an_episode_counts_optimizer_steps_also_when_the_last_one_of_an_epoch_is_short(
    accumulation: int, rows: int, train: Make, tiny_data: Any
) -> None:
    trainer = train(
        *(Counting, {"lr_candidates": [0.5, 2.0], "episode_length": 2}),
        **{"train_dataset": tiny_data[:rows], "gradient_accumulation_steps": accumulation},
        **{"max_steps": -1, "num_train_epochs": 4},
    )
    assert trainer.accelerator.gradient_accumulation_steps == 1  # Trainer does it itself
    batches = -(-rows // 4)
    steps_in_epoch = -(-batches // accumulation)
    aees = trainer.aees
    assert aees.optimizer_steps == trainer.state.max_steps == 4 * steps_in_epoch

    by_step: dict[int, list[tuple[str, float]]] = trainer.seen
    sizes = [len(by_step[step]) for step in range(steps_in_epoch)]
    assert sizes[:-1] == [accumulation] * (steps_in_epoch - 1)
    assert sizes[-1] == (batches % accumulation or accumulation)
    assert all(len({name for name, _ in micro}) == 1 for micro in by_step.values())

    logs = aees.get_logs()
    lengths = [
        end - start + 1
        for start, end in zip(logs["episode_start_steps"], logs["episode_end_steps"], strict=True)
    ]
    assert set(lengths[:-1]) == {2}
    names = logs["selected_combined_names"]
    for step, micro in by_step.items():
        assert micro[0][0] == names[step // 2]
    for start, loss in zip(logs["episode_start_steps"], logs["episode_start_losses"], strict=True):
        assert loss == pytest.approx(sum(loss for _, loss in by_step[start]), rel=1e-6)


@pytest.mark.parametrize(("rows", "sync_each_batch"), [(70, False), (67, True), (9, False)])
def test_unequal_last_batches_and_uneven_data_keep_ranks_together(
    rows: int, sync_each_batch: bool, agreed: Make, tiny_data: Any
) -> None:
    sync = {"sync_each_batch": sync_each_batch}
    end = agreed(
        *("ddp", PulseOptTrainer, {"lr_candidates": [0.5, 2.0], "episode_length": 2}),
        **{"train_dataset": tiny_data[:rows], "gradient_accumulation_steps": 2},
        **{"accelerator_config": {"gradient_accumulation_kwargs": sync}},
        **{"max_steps": -1, "num_train_epochs": 6},
        look=lambda trainer: trainer.accelerator.gradient_state.plugin_kwargs,
    )
    assert end.seen[-1].get("sync_each_batch", False) == sync_each_batch
    assert end.steps == len(end.history) == 6 * -(-rows // 16)
