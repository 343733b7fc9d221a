"""What `pulseopt_hf.trainer.upstream` needs of others is still there, and still private."""

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
from tests.conftest import Make

SAVES = {"save_strategy": "steps", "save_steps": 2}


def test_save_checkpoint_is_where_every_rank_takes_part(
    train: Make, monkeypatch: pytest.MonkeyPatch
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
        train("stock", callbacks=[Stateful()], **SAVES, max_steps=2)
    assert saved == [["state"], []]


def test_the_checkpoints_folder_is_known_before_it_is_written(train: Make) -> None:
    class Watching(Trainer):
        folders: tuple[Path, ...] = ()

        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            folder = checkpoint_folder(self)
            assert not folder.exists()
            super()._save_checkpoint(model, trial)
            assert (folder / "trainer_state.json").is_file()
            self.folders += (folder,)

    trainer = train(Watching, **SAVES, max_steps=4)
    assert [folder.name for folder in trainer.folders] == ["checkpoint-2", "checkpoint-4"]
    # In a search it is the trial's own: tests/trainer/test_trainer.py.
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
    train: Make, tiny_model: Any, monkeypatch: pytest.MonkeyPatch
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
    train("stock", model=model, max_steps=2, optimizers=optimizers)
    assert events == ["step", "asked", "step", "asked", "schedule"]
