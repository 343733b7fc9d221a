"""The hand-written loop, the subclass and the callback give one answer."""

from typing import Any

import pytest
import torch
from transformers import Trainer, get_scheduler, set_seed

from pulseopt_hf import AEES
from tests.conftest import ARMS, Make, history, parameters_equal, without_dropout

KNOBS: dict[str, Any] = {
    **{**ARMS, "episode_length": 4, "seed": 5},
    **{"bandit": "scaled_ucb", "reward": "slope"},
}


def hand_written(model: Any, trainer: Trainer) -> AEES:
    """Train in a loop of one's own; only the data's order and the optimizer are Trainer's."""
    args = trainer.args
    set_seed(args.seed)
    # The parameters in Trainer's order, which the noise is a function of.
    optimizer = trainer.create_optimizer()
    scheduler = get_scheduler("linear", optimizer, 0, args.max_steps)
    aees = AEES(optimizer, lr_scheduler=scheduler, **KNOBS)
    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.bf16)
    loader = trainer.get_train_dataloader()
    model.train()
    for step in range(args.max_steps):
        if step % len(loader) == 0:
            loader.set_epoch(step // len(loader))
            batches = iter(loader)
        aees.step_start(step)
        with autocast:
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


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_a_hand_written_loop_agrees_bit_for_bit(train, make_trainer, tiny_model, bf16):
    def plain_mean_model() -> Any:
        model = tiny_model()
        model.accepts_loss_kwargs = False  # the loss is the mean over a batch, as in most loops
        return model

    trainer = train(pulse=KNOBS, model=plain_mean_model(), bf16=bf16)
    assert trainer.accelerator.mixed_precision == ("bf16" if bf16 else "no")
    model = plain_mean_model()
    aees = hand_written(model, make_trainer("stock", model=model, bf16=bf16))
    assert len(set(aees.get_logs()["selected_combined_names"])) > 3
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
