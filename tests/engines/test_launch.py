"""The same script through `torchrun` and `accelerate launch`, as a user starts it."""

import json
import re
import sys
from pathlib import Path

import pytest

from tests.cli.processes import HERE, command
from tests.engines.engine import slow
from tests.engines.ranks import free_port

ROOT = Path(__file__).parents[2]
SCRIPT = f"{ROOT}/examples/launch_anywhere.py"
STEPS = ["--use_cpu", "true", "--max_steps", "12", "--episode_length", "3"]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("launcher", "ranks", "engine"),
    [
        ("ddp", 2, "DistributedDataParallel"),
        slow("torchrun", 2, "DistributedDataParallel"),
        slow("single", 1, "GPT2LMHeadModel"),
        slow("zero2", 2, "DeepSpeedEngine"),
        slow("zero3", 2, "DeepSpeedEngine"),
    ],
)
def test_a_launcher_starts_ranks_that_run_the_same_arms(
    launcher: str, ranks: int, engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(HERE, "DS_ACCELERATOR", "cpu")
    if launcher == "torchrun":
        words = ["torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    else:
        words = [
            "accelerate.commands.launch",
            f"--config_file={ROOT}/recipes/launch/{launcher}.yaml",
        ]
        words += [f"--main_process_port={free_port()}"] if ranks > 1 else []
    steps, precision = STEPS, "no"
    if launcher.startswith("zero"):
        pytest.importorskip("deepspeed", reason="install the extra `deepspeed` to run this")
        steps, precision = [*STEPS, "--bf16", "true"], "bf16"
    done = command(*words, SCRIPT, *steps, by=[sys.executable, "-m"])
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in re.findall(r'\{"rank".*\}', done.stdout)]
    assert sorted(summary.pop("rank") for summary in found) == list(range(ranks))
    assert all(summary == found[0] for summary in found)
    assert (found[0]["world_size"], found[0]["engine"]) == (ranks, engine)
    assert found[0]["precision"] == precision
    assert len(found[0]["arms"]) == 4
