"""What `pulseopt_hf.trainer.upstream` needs of others is still there, and still private."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState

from pulseopt_hf.trainer.upstream import (
    SAVE_CHECKPOINT,
    checkpoint_folder,
    mark_step_skipped,
    run_folder,
)


def test_save_checkpoint_is_where_every_rank_takes_part(
    trainer_of: Any, arguments: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But it asks for the state of callbacks on the saving rank alone, which is why we need it."""
    asked: list[str] = []

    class Stateful(TrainerCallback, ExportableState):
        def state(self) -> Any:
            asked.append("state")
            return {"args": {}, "attributes": {}}

    def save(self: Trainer, *args: Any) -> None:
        asked[:] = []
        upstream(self, *args)
        saved.append(list(asked))

    upstream, saved = getattr(Trainer, SAVE_CHECKPOINT), []
    monkeypatch.setattr(Trainer, SAVE_CHECKPOINT, save)
    for saves in (True, False):
        monkeypatch.setattr(TrainingArguments, "should_save", saves)
        args = arguments(save_strategy="steps", save_steps=2, max_steps=2)
        trainer_of(road="stock", args=args, callbacks=[Stateful()]).train()
    assert saved == [["state"], []]


def test_the_checkpoints_folder_is_known_before_it_is_written(
    tiny_model: Any, tiny_data: Any, arguments: Any
) -> None:
    class Watching(Trainer):
        folders: tuple[Path, ...] = ()

        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            folder = checkpoint_folder(self, trial)
            assert not folder.exists()
            super()._save_checkpoint(model, trial)
            assert (folder / "trainer_state.json").is_file()
            self.folders += (folder,)

    args = arguments(save_strategy="steps", save_steps=2, max_steps=4)
    trainer = Watching(tiny_model(), args, train_dataset=tiny_data)
    trainer.train()
    assert [folder.name for folder in trainer.folders] == ["checkpoint-2", "checkpoint-4"]


def test_the_folder_of_a_run_that_has_begun_is_the_trials_own_in_a_search(trainer_of: Any) -> None:
    """`tests/trainer/test_trainer.py` has the search."""
    trainer = trainer_of(road="stock", max_steps=1)
    trainer.train()
    assert run_folder(trainer) == Path(trainer.args.output_dir)


@pytest.mark.parametrize("wrapper", [AcceleratedOptimizer, DeepSpeedOptimizerWrapper])
def test_the_mark_is_what_accelerate_reports_as_a_skipped_step(wrapper: type[Any]) -> None:
    optimizer = wrapper.__new__(wrapper)
    optimizer.optimizer = SimpleNamespace()  # DeepSpeed's optimizers without overflow checks
    for skipped in (True, False):
        mark_step_skipped(optimizer, skipped)
        assert optimizer.step_was_skipped is skipped
    assert wrapper.step_was_skipped.fset is None


def test_trainer_asks_for_the_mark_before_it_steps_the_scheduler(
    trainer_of: Any, tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    skipped = property(lambda self: events.append("asked") or len(events) < 3)
    monkeypatch.setattr(Accelerator, "optimizer_step_was_skipped", skipped)
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    optimizer.register_step_pre_hook(lambda *_: events.append("step"))
    monkeypatch.setattr(scheduler, "step", lambda: events.append("schedule"))
    optimizers = (optimizer, scheduler)
    trainer_of(road="stock", model=model, max_steps=2, optimizers=optimizers).train()
    assert events == ["step", "asked", "step", "asked", "schedule"]
