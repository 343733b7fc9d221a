"""Pages that mkdocs makes from the code, so that nothing on them is written twice.

The knobs come from the config's metadata, the recipes from the opening comments of the YAML files,
the examples from the scripts, and the first page takes its chapters from the README.
"""

from __future__ import annotations

import ast
import dataclasses
import re
import typing
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

from pulseopt_hf.config import OPERATIONAL_KNOBS, PulseOptConfig
from pulseopt_hf.recipes import catalogue

ROOT = Path(__file__).parents[1]
CHAPTER = re.compile(r"<!-- README: (.+) -->\n")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made here."""
    pages = {"knobs.md": knobs(), "library.md": library(), "examples.md": examples()}
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """Put in the README's chapters, and turn links to files of the repository into pages."""
    markdown = CHAPTER.sub(lambda found: chapter(found[1]), markdown)
    markdown = re.sub(r"\]\((?:\.\./)?examples/(\w+)\.py\)", r"](examples.md#\1)", markdown)
    markdown = re.sub(r"\]\((?:\.\./)?examples\)", "](examples.md)", markdown)
    return re.sub(r"\]\(docs/", "](", markdown)


def chapter(heading: str) -> str:
    """Return a chapter of the README with its heading, up to the next of the same level."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(rf"^## {re.escape(heading)}\n.*?(?=^## |\Z)", readme, re.M | re.S)
    if found is None:
        raise PluginError(
            f"docs/index.md names a chapter of the README that is not there: {heading}"
        )
    return found[0]


def knobs() -> str:
    """Return the page of knobs."""
    fields = dataclasses.fields(PulseOptConfig)
    method = [field for field in fields if field.name not in OPERATIONAL_KNOBS]
    watch = [field for field in fields if field.name in OPERATIONAL_KNOBS]
    return "\n\n".join(
        [
            "# Knobs",
            "Each knob is a field of `PulseOptConfig`. `PulseOptTrainingArguments` has them too, "
            "beside Trainer's own arguments and with Trainer's `seed`. A recipe takes them as "
            "keys, and `pulseopt-hf train` as flags. Bad values raise `ValueError`, all of them "
            "in one message.",
            "`PulseOptConfig.published()` is the method of `pulseopt` 0.3.0. Where its default "
            "differs, it is given beside the recommended one.",
            "## What the method does",
            "A resumed run must have the values of the run that it continues.",
            *map(_knob, method),
            "## How a run is watched over",
            "A run may be resumed with other values of these.",
            *map(_knob, watch),
        ]
    )


def _knob(field: dataclasses.Field[Any]) -> str:
    default = getattr(PulseOptConfig(), field.name)
    published = getattr(PulseOptConfig.published(), field.name)
    hint = typing.get_type_hints(PulseOptConfig)[field.name]
    facts = f"Default `{default}`"
    if published != default:
        facts += f", published `{published}`"
    if typing.get_origin(hint) is typing.Literal:
        facts += ". One of " + ", ".join(f"`{choice}`" for choice in typing.get_args(hint))
    return f"### `{field.name}` {{ #{field.name} }}\n\n{facts}.\n\n{field.metadata['help']}"


def library() -> str:
    """Return the page of recipes and launch profiles."""
    blocks = [
        "# The recipes",
        "What the package ships, as each file introduces itself. `pulseopt-hf show NAME` prints a "
        "file, and `pulseopt-hf cp NAME FILE` makes a copy to change. "
        "[Running a recipe](recipes.md) has the format and the run folder.",
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
    blocks = ["# Examples", "Short scripts to copy. All of them run offline, on a CPU."]
    for file in sorted((ROOT / "examples").glob("*.py")):
        code = file.read_text(encoding="utf-8")
        summary = ast.get_docstring(ast.parse(code))
        command = f"```bash\npython examples/{file.name}\n```"
        heading = f"## {file.name} {{ #{file.stem} }}"
        blocks += [heading, str(summary), command, f"```python\n{code}```"]
    return "\n\n".join(blocks)
