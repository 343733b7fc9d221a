"""Writing files. Standard library only."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(file: Path, content: bytes | str) -> None:
    """Write a file completely or not at all: a reader never sees half of it.

    Raises:
        OSError: it cannot be written; what was there stays.
    """
    beside = file.with_name(file.name + ".new")
    try:
        beside.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        os.replace(beside, file)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
