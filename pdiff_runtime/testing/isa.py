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


@contextlib.contextmanager
def use_cuda_kernels(name: str) -> Iterator[bool]:
    """Run the body with one of the two sets of CUDA kernels: ``portable`` or ``sm90a``.

    Yields whether this build and machine have it; if not, the portable ones are in use.
    """
    _C.select_cuda_kernels(name)
    try:
        yield _C.cuda_device_count() > 0 and _C.cuda_kernels(0) == name
    finally:
        _C.select_cuda_kernels(None)
