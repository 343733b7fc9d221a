"""PEFT LoRA, and TRL's trainers through `with_pulseopt`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from pulseopt_hf import PulseOptConfig, PulseOptTrainer, embedded, with_pulseopt

CONFIG: dict[str, Any] = {
    "lr_candidates": [0.5, 1.0, 2.0],
    "noise_candidates": [0.0, 1e-3],
    "episode_length": 2,
}
SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "max_steps": 12,
    "learning_rate": 3e-3,
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 7,
    "report_to": [],
    "use_cpu": True,
    "disable_tqdm": True,
    "bf16": False,
}


def flat(model: Any) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def lora(model: Any) -> Any:
    peft = pytest.importorskip("peft", reason="install the extra `peft` to run this")
    settings = peft.LoraConfig(r=4, target_modules=["c_attn"], task_type="CAUSAL_LM")
    return peft.get_peft_model(model, settings)


def test_only_the_trainable_parameters_of_lora_get_noise(
    tiny_model: Callable[[], Any], tiny_data: Any, arguments: Callable[..., Any]
) -> None:
    level = 0.1

    class Sgd(PulseOptTrainer):
        def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
            # With frozen parameters in it, which Trainer's own optimizer leaves out.
            assert self.model is not None
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1.0)
            return self.optimizer

    def trained(noise: float) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = lora(tiny_model())
        config = PulseOptConfig(lr_candidates=[1.0], noise_candidates=[noise], episode_length=1)
        settings = arguments(max_steps=1, learning_rate=1.0, lr_scheduler_type="constant")
        trainer = Sgd(model, settings, train_dataset=tiny_data, pulse=config)
        trainer.train()
        assert trainer.aees is not None
        assert trainer.aees.optimizer_steps == 1
        return {name: p.detach().clone() for name, p in model.named_parameters()}

    torch.manual_seed(0)
    before = lora(tiny_model())
    trainable = {name for name, p in before.named_parameters() if p.requires_grad}
    assert trainable
    assert all("lora_" in name for name in trainable)
    clean, noisy = trained(0.0), trained(level)
    differences = []
    for name, parameter in before.named_parameters():
        if name in trainable:
            differences.append((noisy[name] - clean[name]).reshape(-1))
        else:
            assert torch.equal(noisy[name], parameter)
    noise = torch.cat(differences)
    assert noise.std() == pytest.approx(level, rel=4 / (2 * noise.numel()) ** 0.5)


class Interrupt(TrainerCallback):
    """Ends training after a number of steps, as a lost machine would."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.after:
            raise KeyboardInterrupt


def train_and_resume(make: Callable[[Path], Any], folder: Path) -> tuple[Any, Any]:
    """Train once at a stretch, and once with an interruption after the checkpoint at step 7."""
    straight = make(folder / "straight")
    straight.train()
    broken = make(folder / "broken")
    broken.add_callback(Interrupt(after=9))
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    resumed = make(folder / "broken")
    resumed.train(resume_from_checkpoint=True)
    return straight, resumed


def check_logs(trainer: Any) -> None:
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 12
    for entry in logs:
        assert entry["pulse/learning_rate"] == pytest.approx(
            entry["learning_rate"] * entry["pulse/lr_multiplier"]
        )
    names = {
        "pulse/episode",
        "pulse/lr_multiplier",
        "pulse/noise_std",
        "pulse/reward",
        "pulse/skipped_steps",
    }
    assert names <= set(logs[-1])


def check_same(straight: Any, resumed: Any) -> None:
    assert straight.aees.get_logs() == resumed.aees.get_logs()
    assert len(straight.aees.get_logs()["episode_rewards"]) == 6
    assert torch.equal(flat(straight.model), flat(resumed.model))
    check_logs(straight)
    check_logs(resumed)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return embedded.train_tokenizer(300)


def trl_model(tokenizer: Any) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return GPT2LMHeadModel(config)


@pytest.mark.parametrize("adapter", [False, True])
def test_sft_trainer_trains_resumes_and_logs(adapter: bool, tmp_path: Path, tokenizer: Any) -> None:
    trl = pytest.importorskip("trl", reason="install the extra `trl` to run this")
    from datasets import Dataset

    data = Dataset.from_dict({"text": embedded.sentences()[:40]})
    trainer_class = with_pulseopt(trl.SFTTrainer)
    assert issubclass(trainer_class, trl.SFTTrainer)

    def make(folder: Path) -> Any:
        model = trl_model(tokenizer)
        return trainer_class(
            lora(model) if adapter else model,
            trl.SFTConfig(str(folder), max_length=32, **SETTINGS),
            train_dataset=data,
            processing_class=tokenizer,
            pulse=PulseOptConfig(**CONFIG),
        )

    check_same(*train_and_resume(make, tmp_path))


def test_dpo_trainer_trains_resumes_and_logs(tmp_path: Path, tokenizer: Any) -> None:
    trl = pytest.importorskip("trl", reason="install the extra `trl` to run this")
    from datasets import Dataset

    sentences = embedded.sentences()[:40]
    data = Dataset.from_dict(
        {
            "prompt": [sentence[:20] for sentence in sentences],
            "chosen": [sentence[20:50] for sentence in sentences],
            "rejected": [sentence[50:20:-1] for sentence in sentences],
        }
    )
    trainer_class = with_pulseopt(trl.DPOTrainer)

    def make(folder: Path) -> Any:
        return trainer_class(
            trl_model(tokenizer),
            ref_model=trl_model(tokenizer),
            args=trl.DPOConfig(str(folder), max_length=48, **SETTINGS),
            train_dataset=data,
            processing_class=tokenizer,
            pulse=PulseOptConfig(**CONFIG),
        )

    straight, resumed = train_and_resume(make, tmp_path)
    check_same(straight, resumed)
    assert any("rewards/margins" in entry for entry in straight.state.log_history)
