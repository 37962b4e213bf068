"""All kernel cases of this build, to JSON and pictures."""

from __future__ import annotations

import datetime
import functools
import gc
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pdiff_runtime.bench import (
    attention_plan,
    hybrid_attention,
    row_kernels,
    unmask,
    weighted_cross_entropy,
)
from pdiff_runtime.bench.case import Case
from pdiff_runtime.bench.measure import machine

KERNELS: Mapping[str, Callable[[int], list[Case]]] = {
    hybrid_attention.FORWARD: hybrid_attention.forward_cases,
    hybrid_attention.BACKWARD: hybrid_attention.backward_cases,
    unmask.KERNEL: unmask.cases,
    weighted_cross_entropy.KERNEL: weighted_cross_entropy.cases,
    attention_plan.KERNEL: attention_plan.cases,
    **{
        kernel: functools.partial(row_kernels.cases, kernel)
        for kernel in (row_kernels.RMS_NORM, row_kernels.SWIGLU, row_kernels.ROPE)
    },
}
"""The cases of each kernel, with lengths a given number of times smaller."""

SMOKE_SCALE = 64
FILE = "kernels.json"


def header() -> dict[str, Any]:
    """What the numbers are taken with."""
    now = datetime.datetime.now(datetime.UTC)
    return {"machine": machine(), "date": now.strftime("%Y-%m-%d %H:%M UTC")}


def measure(kernel: str, *, smoke: bool = False) -> Iterator[dict[str, Any]]:
    """A record of each case of a kernel, as soon as it is measured; see :meth:`Case.measure`.

    Args:
        kernel: Key of :data:`KERNELS`.
        smoke: Tiny shapes and few rounds: numbers that say nothing but that it runs.
    """
    for case in KERNELS[kernel](SMOKE_SCALE if smoke else 1):
        seconds = 0.0 if smoke else 10.0 if case.at is None else 4.0
        yield case.measure(case.prepare(), max_seconds=seconds)
        gc.collect()  # gigabytes of logits


def prepare(folder: Path) -> None:
    """Make the folder, and raise ValueError unless results can be written to it later."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / FILE
    if not file.exists():
        file.touch()
        file.unlink()
    elif not os.access(file, os.W_OK):
        raise ValueError(f"{file}: expected a file that can be written")
    _read(file)


def _read(file: Path) -> dict[str, Any]:
    """What each kernel measured; nothing if there is no file."""
    if not file.exists():
        return {}
    try:
        kernels = json.loads(file.read_text())["kernels"]
        return {kernel: kernels[kernel] for kernel in KERNELS if kernel in kernels}
    except (ValueError, TypeError, KeyError, UnicodeDecodeError):
        raise ValueError(f"{file}: expected what `pdiff bench kernels` has written") from None


def write(
    folder: Path, taken_with: Mapping[str, Any], records: Sequence[Mapping[str, Any]]
) -> Path:
    """Write ``kernels.json`` with the :func:`header`; records of other kernels in it are kept.

    Returns:
        The file.
    """
    file = folder / FILE
    kernels = _read(file)
    for kernel in KERNELS:
        rows = [dict(record) for record in records if record["kernel"] == kernel]
        if rows:
            kernels[kernel] = {**taken_with, "records": rows}
    ordered = {kernel: kernels[kernel] for kernel in KERNELS if kernel in kernels}
    file.write_text(json.dumps({"kernels": ordered}, indent=1) + "\n")
    return file
