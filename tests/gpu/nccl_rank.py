"""One rank of a calibrated run with arms over NCCL, started by torch's launcher.

It writes what it saw into `FOLDER/RANK.json`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments, set_seed

from pulseopt_hf import PulseOptConfig, PulseOptTrainer


def main(folder: Path) -> None:
    set_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=2)
    )
    rows = torch.randint(0, 8, (70, 16))
    arguments = TrainingArguments(
        str(folder / "run"),
        per_device_train_batch_size=4,
        max_steps=80,
        learning_rate=1e-4,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        bf16=True,
    )
    config = PulseOptConfig(
        lr_candidates=[0.5, 1.0, 2.0],
        noise_candidates=[0.0, 1e-3],
        episode_length=3,
        calibration="trust_region",
    )
    data = [{"input_ids": row, "labels": row} for row in rows]
    trainer = PulseOptTrainer(model, arguments, train_dataset=data, pulse=config)
    trainer.train()
    assert trainer.aees is not None
    assert trainer.aees.calibrator is not None
    seen = {
        "backend": dist.get_backend(),
        "world": dist.get_world_size(),
        "wrapped": type(trainer.model_wrapped).__name__,
        "logs": trainer.aees.get_logs(),
        "found": trainer.aees.calibrator.search.learning_rate,
    }
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
