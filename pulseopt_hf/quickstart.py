"""A first run with nothing to download: `python -m pulseopt_hf.quickstart`.

Runs a recipe on the text that ships with CPython: `quickstart/lm` trains a small GPT from scratch.
With the extras `[demo]` and `[recipes]`, `quickstart/order` fine-tunes the pretrained MiniLM to
spot sentences whose words were displaced. On two idle CPU cores either takes one to three minutes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from pulseopt_hf import cli
from pulseopt_hf.embedded import minilm_folder


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, evaluate, say where the run folder is, and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m pulseopt_hf.quickstart", description=str(__doc__).splitlines()[0]
    )
    parser.add_argument(
        "--task",
        choices=("lm", "order"),
        default="lm",
        help="lm: train a language model from scratch; order: fine-tune MiniLM (needs [demo])",
    )
    parser.add_argument("--output_dir", help="run folder; default: runs/quickstart-TASK")
    parser.add_argument("--max_steps", type=int, help="optimizer steps")
    options = parser.parse_args(arguments)
    folder = options.output_dir or f"runs/quickstart-{options.task}"
    words = ["train", f"quickstart/{options.task}", "--output_dir", folder, "--overwrite"]
    if options.max_steps is not None:
        words += ["--max_steps", str(options.max_steps)]
    return cli.main(words)


__all__ = ["main", "minilm_folder"]

if __name__ == "__main__":
    raise SystemExit(main())
