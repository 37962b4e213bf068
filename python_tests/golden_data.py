"""Access to the recorded behaviour of the published implementation."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

GOLDEN = Path(os.environ.get("PDIFF_GOLDEN", Path(__file__).parent / "golden"))


def load_npz(name: str) -> dict[str, np.ndarray]:
    """All arrays of ``golden/<name>.npz``."""
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        return dict(file)


def load_json(name: str) -> Any:
    """The content of ``golden/<name>.json``."""
    return json.loads((GOLDEN / f"{name}.json").read_text("utf-8"))


def unpack(bits: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A packed boolean array."""
    return np.unpackbits(bits)[: int(np.prod(shape))].reshape(shape).astype(bool)
