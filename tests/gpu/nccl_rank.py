"""One rank of a calibrated run with arms over NCCL, started by torch's launcher.

It writes what it saw into `FOLDER/RANK.json`.
"""

import json
import sys
from pathlib import Path

import torch.distributed as dist

from pulseopt_hf import PulseOptConfig, PulseOptTrainer
from tests.conftest import ARMS, make_arguments, make_gpt2, make_rows


def main(folder: Path) -> None:
    arguments = make_arguments(
        folder / "run", max_steps=80, learning_rate=1e-4, bf16=True, use_cpu=False
    )
    config = PulseOptConfig(**ARMS, episode_length=3, calibration="trust_region")
    trainer = PulseOptTrainer(make_gpt2(), arguments, train_dataset=make_rows(), pulse=config)
    trainer.train()
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
