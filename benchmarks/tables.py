"""Put the tables of `benchmarks/results` into the documentation.

    python benchmarks/tables.py [--write]

Without `--write` it only says which pages would change, and ends with exit code 1 if one would.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

try:
    from benchmarks import ablation, compare_tasks, planted_bandit, small_models, trust_region
except ImportError:
    import ablation
    import compare_tasks
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


def pages() -> dict[Path, str]:
    """Return the pages as they should be."""
    tasks, small, bandits, region, parts = (
        json.loads(module.RESULT.read_text(encoding="utf-8"))
        for module in (compare_tasks, small_models, planted_bandit, trust_region, ablation)
    )
    method = METHOD.read_text(encoding="utf-8")
    method = put(method, "planted bandit", planted_bandit.to_markdown(bandits))
    method = put(method, "trust region", trust_region.to_markdown(region))
    method = put(method, "ablation", ablation.to_markdown(parts))
    benchmark = BENCHMARK.read_text(encoding="utf-8")
    benchmark = put(benchmark, "tasks", compare_tasks.to_markdown(tasks))
    benchmark = put(benchmark, "small models", compare_tasks.to_markdown(small))
    readme = README.read_text(encoding="utf-8")
    readme = put(readme, "tasks", compare_tasks.to_short_markdown(tasks))
    return {METHOD: method, BENCHMARK: benchmark, README: readme}


def main() -> int:
    changed = [path for path, text in pages().items() if path.read_text("utf-8") != text]
    if "--write" in sys.argv:
        for path, text in pages().items():
            path.write_text(text, encoding="utf-8")
        return 0
    for path in changed:
        print(f"{path} is not up to date; run `make readme`.")
    return bool(changed)


if __name__ == "__main__":
    raise SystemExit(main())
