"""The hand-written loop, the subclass and the callback give one answer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import Trainer, default_data_collator, get_scheduler, set_seed

from pulseopt_hf import AEES
from tests.conftest import ARMS, Make, history, parameters_equal, without_dropout

KNOBS: dict[str, Any] = {
    **{**ARMS, "episode_length": 4, "seed": 5},
    **{"bandit": "scaled_ucb", "reward": "slope"},
}


def hand_written(model: Any, trainer: Trainer, data: Any) -> AEES:
    """Train in a loop of one's own; only the data's order and the optimizer are Trainer's."""
    args = trainer.args
    set_seed(args.seed)
    # The parameters in Trainer's order, which the noise is a function of.
    optimizer = trainer.create_optimizer()
    scheduler = get_scheduler("linear", optimizer, 0, args.max_steps)
    aees = AEES(optimizer, lr_scheduler=scheduler, **KNOBS)
    loader = trainer.get_train_dataloader()
    model.train()
    for step in range(args.max_steps):
        if step % len(loader) == 0:
            loader.set_epoch(step // len(loader))
            batches = iter(loader)
        aees.step_start(step)
        loss = model(**next(batches)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        aees.step_end(loss)
        model.zero_grad()
    aees.finalize()
    return aees


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_subclass_and_callback_agree_bit_for_bit(train: Make, bf16: bool) -> None:
    settings = {"gradient_accumulation_steps": 3, "bf16": bf16}
    one, other = (train(road, KNOBS, **settings) for road in ("subclass", "attached"))
    assert one.aees.get_logs() == other.aees.get_logs()
    assert len(one.aees.get_logs()["episode_rewards"]) == 6
    assert len(set(one.aees.get_logs()["selected_combined_names"])) > 3
    assert parameters_equal(one.model, other.model)
    assert history(one) == history(other)


def test_a_hand_written_loop_agrees_bit_for_bit(
    train: Make, make_trainer: Make, tiny_model: Any, tiny_data: Any
) -> None:
    def plain_mean_model() -> Any:
        model = tiny_model()
        model.accepts_loss_kwargs = False  # the loss is the mean over a batch, as in most loops
        return model

    trainer = train(pulse=KNOBS, model=plain_mean_model())
    model = plain_mean_model()
    aees = hand_written(model, make_trainer(Trainer, model=model), tiny_data)
    assert aees.get_logs() == trainer.aees.get_logs()
    assert parameters_equal(model, trainer.model)


def test_accumulation_4_of_2_equals_1_of_8(train: Make, tiny_model: Any, tiny_data: Any) -> None:
    runs = [
        train(
            pulse=KNOBS,
            model=without_dropout(tiny_model()),  # whose masks follow the shape of a batch
            train_dataset=tiny_data[:64],
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            learning_rate=1e-3,
        )
        for batch, accumulation in ((8, 1), (2, 4))
    ]
    one, other = (run.aees.get_logs() for run in runs)
    assert one["selected_combined_names"] == other["selected_combined_names"]
    assert one["episode_end_losses"] == pytest.approx(other["episode_end_losses"], rel=1e-4)
    for a, b in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=2e-4)


def test_an_accelerate_loop_counts_optimizer_steps_and_averages_micro_batches(
    tiny_model: Any, tiny_data: Any
) -> None:
    """Sixteen micro-batches accumulated by four are four steps, and so two episodes of two."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    loader = DataLoader(tiny_data[:64], batch_size=4, collate_fn=default_data_collator)
    model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)
    aees = AEES(optimizer, lr_scheduler=scheduler, lr_candidates=[2.0], episode_length=2)
    losses = []
    for step, batch in enumerate(loader):
        with accelerator.accumulate(model):
            aees.step_start(step)
            loss = model(**batch).loss
            losses.append(loss.item())
            accelerator.backward(loss)
            aees.step_end(loss)
            optimizer.zero_grad()
    logs = aees.get_logs()
    assert logs["episode_end_steps"] == [7, 15]
    means = [sum(losses[i : i + 4]) / 4 for i in range(0, 16, 4)]
    assert logs["episode_start_losses"] == pytest.approx(means[0::2])
    assert logs["episode_end_losses"] == pytest.approx(means[1::2])
    assert scheduler.get_last_lr() == [0.1 / 16]
