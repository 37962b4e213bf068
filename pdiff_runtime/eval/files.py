"""Result files, which are there as a whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path

from pdiff_runtime.models.files import written_whole


def prepare(path: Path) -> None:
    """Make sure that a result file can be written, before hours go into what comes into it.

    Raises:
        OSError: Its folder can not be made or not be written to, or its name is too long.
        ValueError: It has no name, or something lies there that is no file.
    """
    if not path.name:
        raise ValueError(f"out: expected the name of a file, got {str(path)!r}")
    file, part = _places(path)
    if file.exists() and not file.is_file():
        raise ValueError(f"out: expected a file, got {str(path)!r}, a folder or a device")
    file.parent.mkdir(parents=True, exist_ok=True)
    part.touch()
    part.unlink()


def write_json(path: Path, value: object) -> None:
    """Write a JSON file in one go: whoever reads meanwhile sees the old one or the new one."""
    file, part = _places(path)
    with written_whole(file, part):
        part.write_text(json.dumps(value, indent=1) + "\n", "utf-8")


def _places(path: Path) -> tuple[Path, Path]:
    """The file, behind all links, and the one beside it that is renamed to it when complete."""
    file = Path(os.path.realpath(path))
    return file, file.with_name(f".{file.name}.{os.getpid()}.part")
