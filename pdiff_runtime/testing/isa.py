"""The instruction sets of this build, and how a test or bench asks for one of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from pdiff_runtime import _C

ISAS = ("generic", "avx2", "avx512", "avx512_bf16", "amx")


@contextlib.contextmanager
def use_isa(name: str) -> Iterator[bool]:
    """Run the body with the CPU kernels of one instruction set.

    Yields whether this build and machine have it; if not, a lower one is in use.
    """
    _C.select_isa(name)
    try:
        yield _C.isa_selected() == name
    finally:
        _C.select_isa(None)
