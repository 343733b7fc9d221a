"""What the benchmarks share: an option, and what becomes of a result."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def parser(doc: str, result: Path) -> argparse.ArgumentParser:
    """Return a parser that is described by the first line of a docstring, with `--write`."""
    found = argparse.ArgumentParser(description=doc.splitlines()[0])
    about = f"keep the result, by default in {result.relative_to(ROOT)}"
    found.add_argument("--write", metavar="FILE", type=Path, nargs="?", const=result, help=about)
    return found


def read(file: Path) -> Any:
    """Return what a JSON file holds."""
    return json.loads(file.read_text(encoding="utf-8"))


def finish(result: Any, to_markdown: Callable[[Any], str], file: Path | None) -> None:
    """Print a result as a table, and keep it in a file if one is given."""
    print(to_markdown(result))
    if file is not None:
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
