"""Put the tables of `benchmarks/results` and the page of knobs into the documentation.

    python -m benchmarks.tables [--write]

Without `--write` it only says which pages would change, and ends with exit code 1 if one would.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import (
    ablation,
    atlas,
    common,
    compare_tasks,
    gpu,
    measures,
    other_kinds,
    overhead,
    planted_bandit,
    regimes,
    small_models,
)
from benchmarks.knobs_page import knobs_page

DOCS = common.ROOT / "docs"
KNOBS, METHOD, BENCHMARK = DOCS / "knobs.md", DOCS / "method.md", DOCS / "benchmark.md"
README = common.ROOT / "README.md"


def put(text: str, mark: str, table: str) -> str:
    """Return `text` with what stands between the marks replaced by `table`."""
    begin, end = f"<!-- {mark} -->\n", f"<!-- end of {mark} -->\n"
    before, rest = text.split(begin)
    return before + begin + table + end + rest.split(end)[1]


# The page of each table, its mark there, the file of its result, and what makes it of that.
TABLES: list[tuple[Path, str, Path, Callable[[Any], str]]] = [
    (METHOD, "planted bandit", planted_bandit.RESULT, planted_bandit.to_markdown),
    (METHOD, "measures", measures.RESULT, measures.to_markdown),
    (METHOD, "ablation", ablation.RESULT, ablation.to_markdown),
    (METHOD, "regimes", regimes.RESULT, regimes.to_short_markdown),
    (BENCHMARK, "regimes", regimes.RESULT, regimes.to_markdown),
    (BENCHMARK, "tasks", compare_tasks.RESULT, compare_tasks.to_markdown),
    (BENCHMARK, "small models", small_models.RESULT, compare_tasks.to_markdown),
    (BENCHMARK, "other kinds", other_kinds.RESULT, other_kinds.to_markdown),
    (BENCHMARK, "atlas", atlas.RESULT, atlas.to_markdown),
    (BENCHMARK, "losses", atlas.RESULT, atlas.to_losses_markdown),
    (BENCHMARK, "overhead", overhead.RESULT, overhead.to_markdown),
    (BENCHMARK, "gpu", gpu.RESULT, gpu.to_markdown),
    (README, "atlas", atlas.RESULT, atlas.to_short_markdown),
]


def pages() -> dict[Path, str]:
    """Return the pages that are made in part or whole, as they should be."""
    found = {KNOBS: knobs_page()}
    for page, mark, result, to_markdown in TABLES:
        text = found.get(page) or page.read_text(encoding="utf-8")
        found[page] = put(text, mark, to_markdown(common.read(result)))
    return found


def main() -> int:
    changed = {p: text for p, text in pages().items() if text != p.read_text(encoding="utf-8")}
    for page, text in changed.items():
        if "--write" in sys.argv:
            page.write_text(text, encoding="utf-8")
        else:
            print(f"{page}: not up to date; run `make readme`.")
    return bool(changed) and "--write" not in sys.argv


if __name__ == "__main__":
    raise SystemExit(main())
