"""What `pulseopt_hf.trainer.upstream` needs of others is still there, and still private.

What it does for a run is seen in runs: that skipped steps do not advance the scheduler in
test_guard.py, and that all ranks write into the checkpoint's folder in engines/test_calibration.py.
"""

from types import SimpleNamespace

import pytest
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper
from transformers import Trainer

from pulseopt_hf.trainer.upstream import GRAD_NORM, SAVE_CHECKPOINT, mark_step_skipped


@pytest.mark.parametrize("name", [SAVE_CHECKPOINT, GRAD_NORM, "_get_output_dir"])
def test_trainer_has_the_method(name: str) -> None:
    assert callable(getattr(Trainer, name))


@pytest.mark.parametrize("wrapper", [AcceleratedOptimizer, DeepSpeedOptimizerWrapper])
def test_the_mark_is_what_accelerate_reports_as_a_skipped_step(wrapper: type) -> None:
    optimizer = wrapper.__new__(wrapper)
    optimizer.optimizer = SimpleNamespace()  # DeepSpeed's optimizers without overflow checks
    for skipped in (True, False):
        mark_step_skipped(optimizer, skipped)
        assert optimizer.step_was_skipped is skipped
    assert wrapper.step_was_skipped.fset is None
