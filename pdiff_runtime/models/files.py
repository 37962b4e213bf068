"""Files of a checkpoint folder: none from outside it, and JSON that cannot harm its reader; and
files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MAX_JSON_BYTES = 64 << 20


def find_file(folder: Path, name: str) -> Path | None:
    """The file of that name, None if there is none.

    The hub's cache keeps a checkpoint as links into the ``blobs`` beside it; these are followed.

    Raises:
        ValueError: The name has a folder in it, cannot be looked up, is a link that leads out of
            the checkpoint, or is there but no file: a device, say, or a link to nothing.
    """
    if not name or name.startswith(".") or any(char in name for char in "/\\\0"):
        raise ValueError(f"model: expected the name of a file in {folder}, got {name[:80]!r}")
    try:
        (folder / name).lstat()
        file = (folder / name).resolve()
        is_file = file.is_file()
    except FileNotFoundError:
        return None
    except (OSError, RuntimeError) as error:  # a name too long, links in a circle
        reason = getattr(error, "strerror", None) or "links in a circle"
        raise ValueError(f"model: cannot look for {name[:80]!r} in {folder} ({reason})") from error
    if not file.is_relative_to(_root(folder.resolve())):
        raise ValueError(f"model: {folder / name} is a link that leads out of its folder")
    if not is_file:
        raise ValueError(f"model: expected a file at {folder / name}")
    return file


def _root(folder: Path) -> Path:
    """What the links of a folder may point into: itself, or its repository in the hub's cache."""
    repository = folder.parent.parent
    is_snapshot = folder.parent.name == "snapshots" and repository.name.startswith("models--")
    return repository if is_snapshot else folder


@contextlib.contextmanager
def written_whole(file: Path, part: Path) -> Iterator[None]:
    """What the body writes to ``part``, beside it, becomes the file; where it raises, nothing does.

    Whoever reads meanwhile sees the old file or the new one.
    """
    try:
        yield
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def read_text(file: Path) -> str:
    """A file's text.

    Raises:
        ValueError: It cannot be read, is too large, or not UTF-8.
    """
    try:
        if file.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"{file}: expected at most {MAX_JSON_BYTES} bytes of text")
        return file.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 ({error.reason} at byte {error.start})") from error
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror})") from error


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: Unreadable, too large, not UTF-8, not JSON, nested too deeply, or no object.
    """
    text = read_text(file)
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:  # also integers of thousands of digits
        raise ValueError(f"{file}: not valid JSON ({error})") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(fields).__name__}")
    return fields
