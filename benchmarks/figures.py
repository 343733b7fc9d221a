"""Make the pictures of the documentation from a short run of `quickstart/lm`.

python benchmarks/figures.py [--run runs/figures] [--steps 600] [--out docs/figures]
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--run", type=Path, default=ROOT / "runs" / "figures", help="run folder")
    parser.add_argument("--steps", type=int, default=600, help="optimizer steps")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "figures", help="for pictures")
    options = parser.parse_args()
    command(
        "train",
        "quickstart/lm",
        "--output_dir",
        str(options.run),
        "--overwrite",
        "--quiet",
        "--max_steps",
        str(options.steps),
    )
    command("plot", str(options.run))
    pictures = [p for p in options.run.rglob("*") if p.suffix in (".png", ".svg")]
    if not pictures:
        raise SystemExit(f"`pulseopt-hf plot` left no picture in {options.run}.")
    options.out.mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        shutil.copy(picture, options.out / picture.name)
        print(options.out / picture.name)


def command(*words: str) -> None:
    """Run a command of `pulseopt-hf`, and stop where it fails."""
    done = subprocess.run([sys.executable, "-m", "pulseopt_hf", *words], cwd=ROOT)
    if done.returncode:
        raise SystemExit(done.returncode)


if __name__ == "__main__":
    main()
