"""Make the pictures of the documentation: of a short run of `quickstart/lm`, and of benchmarks.

python benchmarks/figures.py [--run runs/figures] [--steps 300] [--out docs/figures]

The benchmarks are drawn from `benchmarks/results`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

try:
    from benchmarks import atlas, compare_tasks
except ImportError:
    import atlas
    import compare_tasks

from pulseopt_hf.compare.drawing import draw

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--run", type=Path, default=ROOT / "runs" / "figures", help="run folder")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "figures", help="for pictures")
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
    compared = json.loads(compare_tasks.RESULT.read_text(encoding="utf-8"))
    draw(compare_tasks.pictured(compared), options.out / compare_tasks.PICTURE.name)
    settings = json.loads(atlas.RESULT.read_text(encoding="utf-8"))
    atlas.draw(settings, options.out / atlas.PICTURE.name)


def command(*words: str) -> None:
    """Run a command of `pulseopt-hf`, and stop where it fails."""
    done = subprocess.run([sys.executable, "-m", "pulseopt_hf", *words], cwd=ROOT)
    if done.returncode:
        raise SystemExit(done.returncode)


if __name__ == "__main__":
    main()
