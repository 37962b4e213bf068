"""One test over every implementation: the instruction sets of the CPU, and the GPU kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest

from pdiff_runtime.ops import Impl
from pdiff_runtime.testing import Backend, use_isa

GPU_IMPLS = (Impl.TRITON,)
"""The GPU kernels of an op, unless its tests say otherwise."""


def isa_fixture(isas: Sequence[str]) -> Callable[..., Iterator[str]]:
    """A fixture that runs a test's CPU kernels with each instruction set."""

    @pytest.fixture(params=list(isas))
    def isa(request: pytest.FixtureRequest) -> Iterator[str]:
        with use_isa(request.param) as available:
            if not available:
                pytest.skip(f"{request.param} is not built or not on this machine")
            yield request.param

    return isa


def backend_fixture(
    isas: Sequence[str], gpu_impls: Sequence[Impl] = GPU_IMPLS
) -> Callable[..., Iterator[Backend]]:
    """A fixture of backends: the CPU once with each instruction set, then the GPU kernels.

    Of a test that takes it, cases whose `dtype` or `problem.dtype` the backend lacks are left out,
    and those marked `exhaustive` where it is not quick.
    """

    @pytest.fixture(params=[*isas, *map(str, gpu_impls)])
    def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
        chosen = backend_of(request.param)
        if chosen.missing:
            pytest.skip(chosen.missing)
        if chosen.impl is not Impl.CPU:
            yield chosen
            return
        with use_isa(request.param) as available:
            if not available:
                pytest.skip(f"{request.param} is not built or not on this machine")
            yield chosen

    return backend


def backend_of(name: str) -> Backend:
    """Of a parameter of the fixture."""
    return Backend(Impl(name) if name in (Impl.CUDA, Impl.TRITON) else Impl.CPU)


def is_left_out(item: pytest.Item) -> bool:
    """Whether a collected case is not for its backend."""
    params = getattr(item, "callspec", None) and item.callspec.params
    if not params or "backend" not in params:
        return False
    backend = backend_of(params["backend"])
    dtype = params.get("dtype") or getattr(params.get("problem"), "dtype", None)
    if dtype is not None and dtype not in backend.dtypes:
        return True
    return item.get_closest_marker("exhaustive") is not None and not backend.is_quick
