"""Pages that mkdocs makes from the code, so that nothing on them is written twice.

The first page is the README, the recipes come from the opening comments of the YAML files, and the
examples from the scripts.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from pulseopt_hf.recipes import catalogue

ROOT = Path(__file__).parents[1]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made here."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    pages = {"index.md": readme, "library.md": library(), "examples.md": examples()}
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """Turn links to files of the repository into links to pages."""
    markdown = re.sub(r"\]\((?:\.\./)?examples/(\w+)\.py\)", r"](examples.md#\1)", markdown)
    markdown = re.sub(r"\]\((?:\.\./)?examples\)", "](examples.md)", markdown)
    return re.sub(r"\]\(docs/", "](", markdown)


def library() -> str:
    """Return the page of recipes and launch profiles."""
    blocks = [
        "# The recipes",
        "These recipes and launch profiles ship with the package. `pulseopt-hf show NAME` prints "
        "one, and `pulseopt-hf cp NAME FILE` makes a copy to change. See [Recipes](recipes.md) for "
        "the format and the run folder.",
    ]
    group = ""
    for name in [*catalogue.names(), *catalogue.profiles()]:
        if name.split("/")[0] != group:
            group = name.split("/")[0]
            blocks.append(f"## {group}")
        comment, content = opening((catalogue.folder() / f"{name}.yaml").read_text("utf-8"))
        body = f"```yaml\n{content}```".replace("\n", "\n    ")
        blocks += [f"### {name}", comment, f'??? abstract "{name}.yaml"\n\n    {body}']
    return "\n\n".join(blocks)


def opening(text: str) -> tuple[str, str]:
    """Split a YAML file into its opening comment, as Markdown, and the rest."""
    lines = text.splitlines(keepends=True)
    end = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    markdown = ""
    in_code = False
    for line in lines[:end]:
        content = line.removeprefix("#").removeprefix(" ")
        is_code = content.startswith("  ")
        if is_code != in_code and content.strip():
            markdown += "\n```bash\n" if is_code else "```\n\n"
            in_code = is_code
        markdown += content[2:] if is_code else content if not in_code else ""
    return markdown + ("```\n" if in_code else ""), "".join(lines[end:])


def examples() -> str:
    """Return the page of example scripts."""
    blocks = ["# Examples", "Short scripts to copy. All of them run offline on a CPU."]
    for file in sorted((ROOT / "examples").glob("*.py")):
        code = file.read_text(encoding="utf-8")
        summary = ast.get_docstring(ast.parse(code))
        command = f"```bash\npython examples/{file.name}\n```"
        heading = f"## {file.name} {{ #{file.stem} }}"
        blocks += [heading, str(summary), command, f"```python\n{code}```"]
    return "\n\n".join(blocks)
