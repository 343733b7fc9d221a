"""Put the tables of `benchmarks/results` into the documentation.

    python benchmarks/tables.py [--write]

Without `--write` it only says which pages would change, and ends with exit code 1 if one would.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

try:
    from benchmarks import (
        ablation,
        atlas,
        compare_tasks,
        gpu,
        planted_bandit,
        small_models,
        trust_region,
    )
except ImportError:
    import ablation
    import atlas
    import compare_tasks
    import gpu
    import planted_bandit
    import small_models
    import trust_region

ROOT = Path(__file__).parents[1]
METHOD, BENCHMARK = ROOT / "docs" / "method.md", ROOT / "docs" / "benchmark.md"
README = ROOT / "README.md"


def put(text: str, mark: str, table: str) -> str:
    """Return `text` with what stands between the marks replaced by `table`."""
    begin, end = f"<!-- {mark} -->\n", f"<!-- end of {mark} -->\n"
    before, rest = text.split(begin)
    return before + begin + table + end + rest.split(end)[1]


# The page of each table, its mark there, the file of its result, and what makes it of that.
TABLES: list[tuple[Path, str, Path, Callable[[Any], str]]] = [
    (METHOD, "planted bandit", planted_bandit.RESULT, planted_bandit.to_markdown),
    (METHOD, "trust region", trust_region.RESULT, trust_region.to_markdown),
    (METHOD, "ablation", ablation.RESULT, ablation.to_markdown),
    (BENCHMARK, "tasks", compare_tasks.RESULT, compare_tasks.to_markdown),
    (BENCHMARK, "small models", small_models.RESULT, compare_tasks.to_markdown),
    (BENCHMARK, "atlas", atlas.RESULT, atlas.to_markdown),
    (BENCHMARK, "gpu", gpu.RESULT, gpu.to_markdown),
    (README, "atlas", atlas.RESULT, atlas.to_short_markdown),
]


def with_table(page: Path, mark: str, result: Path, to_markdown: Callable[[Any], str]) -> str:
    """Return a page with one of its tables as it should be."""
    table = to_markdown(json.loads(result.read_text(encoding="utf-8")))
    return put(page.read_text(encoding="utf-8"), mark, table)


def main() -> int:
    changed = []
    for page, mark, *source in TABLES:
        text = with_table(page, mark, *source)
        if text != page.read_text(encoding="utf-8"):
            changed.append(f"{page}, {mark}")
            if "--write" in sys.argv:
                page.write_text(text, encoding="utf-8")
    if "--write" in sys.argv:
        return 0
    for place in changed:
        print(f"{place}: not up to date; run `make readme`.")
    return bool(changed)


if __name__ == "__main__":
    raise SystemExit(main())
