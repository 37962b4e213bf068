"""Result files, which are there as a whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path


def prepare(path: Path) -> None:
    """Make the folder of a result file, before hours go into what comes into it.

    Raises:
        OSError: It can not be made or not be written to.
        ValueError: The file has no name.
    """
    if not path.name:
        raise ValueError(f"out: expected the name of a file, got {str(path)!r}")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(13, "no permission to write there", str(path.parent))


def write_json(path: Path, value: object) -> None:
    """Write a JSON file in one go: whoever reads meanwhile sees the old one or the new one."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(json.dumps(value, indent=1) + "\n", "utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
