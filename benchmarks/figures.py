"""Make the pictures of the documentation: of a short run of `quickstart/lm`, and of benchmarks.

    python -m benchmarks.figures [--run runs/figures] [--steps 300] [--out docs/figures]

The benchmarks are drawn from `benchmarks/results`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from benchmarks import atlas, common, compare_tasks
from pulseopt_hf.compare.drawing import draw


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument(
        "--run", type=Path, default=common.ROOT / "runs" / "figures", help="run folder"
    )
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps")
    parser.add_argument(
        "--out", type=Path, default=common.ROOT / "docs" / "figures", help="for pictures"
    )
    options = parser.parse_args()
    command(
        "train",
        "quickstart/lm",
        "--output_dir",
        str(options.run),
        "--overwrite",
        "--quiet",
        *("--max_steps", str(options.steps)),
        *("--lr_candidates", "0.5", "1", "2"),  # so that there are arms to be seen
    )
    command("plot", str(options.run), "--out", str(options.out))
    compared = compare_tasks.pictured(common.read(compare_tasks.RESULT))
    draw(compared, options.out / compare_tasks.PICTURE.name)
    atlas.draw(common.read(atlas.RESULT), options.out / atlas.PICTURE.name)


def command(*words: str) -> None:
    """Run a command of `pulseopt-hf`, and stop where it fails."""
    done = subprocess.run([sys.executable, "-m", "pulseopt_hf", *words], cwd=common.ROOT)
    if done.returncode:
        raise SystemExit(done.returncode)


if __name__ == "__main__":
    main()
