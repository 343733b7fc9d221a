"""TRL's supervised trainers are calibrated, the others left alone, and no metric is touched.

That they resume and log, tests/recipes/test_trl.py shows.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
)

from pulseopt_hf import PulseOptConfig, embedded, with_pulseopt
from pulseopt_hf.aees.calibration import TRUSTED
from tests.conftest import flat, messages, stop_after
from tests.engines.engine import slow

trl = pytest.importorskip("trl", reason="install the extra `trl` to run these")

STEPS = 60


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return embedded.train_tokenizer(300)


@pytest.fixture(scope="module")
def folders(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Save a tiny language model and a tiny reward model, each with its tokenizer."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=256,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        num_labels=1,
    )
    made = {}
    for name, cls in (("causal", GPT2LMHeadModel), ("reward", GPT2ForSequenceClassification)):
        folder = str(tmp_path_factory.mktemp(name))
        cls(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        made[name] = folder
    return made


def rows(kind: str) -> Any:
    from datasets import Dataset

    texts = [sentence for sentence in embedded.sentences() if len(sentence) > 60][:200]
    prompt, good, bad = zip(*((t[:20], t[20:50], t[50:20:-1]) for t in texts), strict=True)
    return Dataset.from_dict(
        {
            "SFT": {"text": texts},
            "DPO": {"prompt": prompt, "chosen": good, "rejected": bad},
            "KTO": {
                "prompt": prompt,
                "completion": [(bad, good)[i % 2][i] for i in range(len(texts))],
                "label": [bool(i % 2) for i in range(len(texts))],
            },
            "Reward": {"chosen": good, "rejected": bad},
            "GRPO": {"prompt": prompt},
            "RLOO": {"prompt": prompt},
            "Distillation": {"prompt": prompt},
        }[kind]
    )


def reward(completions: list[str], **kwargs: Any) -> list[float]:
    return [float(len(set(completion))) for completion in completions]


@pytest.fixture
def make(folders: dict[str, str], tokenizer: Any) -> Callable[..., Any]:
    """Return a maker of Trainers of TRL's, on a CPU, as they are or with this package's knobs."""

    def make(kind: str, out: Path, *, ours: bool = True, **own: Any) -> Any:
        settings: dict[str, Any] = {
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "max_steps": STEPS,
            **{"report_to": [], "use_cpu": True, "bf16": False, "disable_tqdm": True},
        }
        if kind in ("GRPO", "RLOO", "Distillation"):
            settings["max_completion_length"] = 8
        if kind in ("GRPO", "RLOO"):
            settings["num_generations"] = 4
            own["reward_funcs"] = reward
        if kind in ("DPO", "KTO"):
            own["ref_model"] = AutoModelForCausalLM.from_pretrained(folders["causal"])
        if kind == "Distillation":
            own["teacher_model"] = AutoModelForCausalLM.from_pretrained(folders["causal"])
        if kind == "Reward":
            model = AutoModelForSequenceClassification.from_pretrained(folders["reward"])
        else:
            model = AutoModelForCausalLM.from_pretrained(folders["causal"])
        cls, config = getattr(trl, f"{kind}Trainer"), getattr(trl, f"{kind}Config")
        data = rows(kind)
        return (with_pulseopt(cls) if ours else cls)(
            model,
            args=config(str(out), **settings),
            train_dataset=data.select(range(160)),
            eval_dataset=data.select(range(160, 176)),
            processing_class=tokenizer,
            **own,
        )

    return make


def scores(metrics: dict[str, float]) -> dict[str, float]:
    clocks = ("runtime", "per_second", "epoch", "step_time", "preparation_time")
    return {key: value for key, value in metrics.items() if not key.endswith(clocks)}


@pytest.mark.parametrize("kind", ["SFT", "Reward", "DPO", "KTO", "GRPO", "RLOO", "Distillation"])
def test_a_trainer_with_its_default_knobs_trains_and_evaluates_as_the_stock_one(
    kind: str, make: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    supervised = kind in ("SFT", "Reward")
    trainer = make(kind, tmp_path / "ours")
    last = STEPS
    if not supervised:  # trials would be the first steps
        last = 2 * (TRUSTED + 1)
        trainer.add_callback(stop_after(last))
    trainer.train()
    assert trainer.state.global_step == last
    trials = trainer.aees.get_logs().get("calibration_trials", [])
    assert len({trial["step"] for trial in trials}) == (TRUSTED + 1 if supervised else 0)
    (said,) = messages(caplog)
    about = "Learning rate calibrated: " if supervised else f"not calibrated: {kind}Trainer"
    assert about in said

    stock = make(kind, tmp_path / "stock", ours=False)
    stock.model.load_state_dict(trainer.model.state_dict())
    stock.state.global_step = trainer.state.global_step
    torch.manual_seed(7)
    ours = trainer.evaluate()
    torch.manual_seed(7)
    theirs = stock.evaluate()
    assert scores(ours).keys() == scores(theirs).keys()
    for key, value in scores(ours).items():
        assert value == theirs[key] or key == "eval_num_tokens", key  # which training has seen


@pytest.mark.parametrize("kind", ["DPO", "GRPO", slow("KTO"), slow("RLOO")])
def test_asked_for_by_name_calibration_works_there_too(kind, make, tmp_path):
    trainer = make(kind, tmp_path, pulse=PulseOptConfig(calibration="trust_region"))
    before = flat(trainer.model)
    trainer.train()
    calibrator = trainer.aees.calibrator
    assert calibrator.search.learning_rate is not None
    assert trainer.lr_scheduler.base_lrs[0] == pytest.approx(calibrator.outcome.learning_rate)
    assert not torch.equal(flat(trainer.model), before)
