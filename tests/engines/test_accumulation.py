"""Gradient accumulation: an episode counts optimizer steps, and the arm is fixed within one."""

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.utils.data import DataLoader, TensorDataset

from pulseopt_hf import AEES, PulseOptTrainer
from tests.conftest import Make, flat
from tests.engines.engine import End
from tests.engines.ranks import run_ranks


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


@pytest.mark.parametrize("rows", [70, 67, 9])
def test_unequal_last_batches_and_uneven_data_keep_ranks_together(
    rows: int, agreed: Make, tiny_data: Any
) -> None:
    settings = {"max_steps": -1, "num_train_epochs": 6, "gradient_accumulation_steps": 2}
    knobs = {"lr_candidates": [0.5, 2.0], "episode_length": 2}
    end = agreed("ddp", pulse=knobs, train_dataset=tiny_data[:rows], **settings)
    assert end.steps == len(end.history) == 6 * -(-rows // 16)


def test_sync_each_batch_changes_when_ranks_talk_and_not_what_they_learn(agreed: Make) -> None:
    knobs = {"lr_candidates": [0.5, 1.0, 2.0], "episode_length": 2}

    def run(sync: bool) -> End:
        settings = {
            "max_steps": 12,
            "gradient_accumulation_steps": 3,
            "accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": sync}},
        }
        reductions: list[bool] = []  # whether it was the last of a backward pass

        def hook(state, bucket):  # torch inspects annotations
            reductions.append(bucket.is_last())
            return allreduce_hook(state, bucket)

        def look(trainer: Any) -> int:
            if trainer.state.global_step == 0:
                trainer.model_wrapped.register_comm_hook(None, hook)
            return sum(reductions)

        return agreed("ddp", pulse=knobs, look=look, **settings)

    eager, lazy = run(True), run(False)
    assert (eager.seen[-1], lazy.seen[-1]) == (36, 12)
    assert lazy.logs["selected_combined_names"] == eager.logs["selected_combined_names"]
    assert torch.allclose(lazy.parameters, eager.parameters, atol=1e-3)


def test_a_loop_under_accelerate_accumulates_on_two_ranks_as_in_one_process() -> None:
    def loop(world_size: int, batch: int) -> Any:
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        assert accelerator.num_processes == world_size
        torch.manual_seed(0)
        rows = torch.randn(64, 8)
        data = DataLoader(TensorDataset(rows, rows.sum(1)), batch_size=batch)
        model = torch.nn.Linear(8, 1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        model, optimizer, data = accelerator.prepare(model, optimizer, data)
        aees = AEES(optimizer, lr_candidates=[0.5, 2.0], episode_length=2, seed=1)
        step = 0
        for _ in range(3):
            for x, y in data:
                with accelerator.accumulate(model):
                    aees.step_start(step)
                    loss = (model(x).squeeze(1) - y).square().mean()
                    accelerator.backward(loss)
                    aees.step_end(loss)
                    optimizer.zero_grad()
                    step += int(accelerator.sync_gradients)
        aees.finalize()
        return aees.optimizer_steps, aees.get_logs(), flat(model)

    first, second = run_ranks(2, lambda rank: loop(2, 4))
    alone = run_ranks(1, lambda rank: loop(1, 8))[0]
    assert first[0] == second[0] == alone[0] == 12
    assert first[1] == second[1]
    assert torch.equal(first[2], second[2])
    assert first[1]["selected_combined_names"] == alone[1]["selected_combined_names"]
    assert first[1]["episode_rewards"] == pytest.approx(alone[1]["episode_rewards"], abs=1e-4)
    assert torch.allclose(first[2], alone[2], atol=1e-5)
