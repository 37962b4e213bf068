"""What every op shares: the torch library they are registered in, the choice of an implementation,
and argument checks that name the argument, what was expected and what came.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import TypeAlias

import torch
from torch import Tensor

library = torch.library.Library("pdiff", "DEF")
"""Ops are added with `library.define`, `library.impl` and `torch.library.register_*`."""


class Impl(StrEnum):
    """How an op is executed. `AUTO` takes the device's kernel and never the reference."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"
    TRITON = "triton"
    REFERENCE = "reference"


DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}
"""`pdiff::DType` by torch dtype."""

Size: TypeAlias = int | str | None
"""An exact size, or any size: a name is shown in messages, None is shown as `*`."""


def select_impl(
    impl: Impl | str, device: torch.device, available: Sequence[Impl] = (Impl.CPU, Impl.REFERENCE)
) -> Impl:
    """The implementation that runs, for tensors on `device`.

    Raises:
        ValueError: The name is unknown, or this build has no such kernel for the device.
    """
    if impl is Impl.AUTO and device.type == "cpu":  # spared the enum's cost on every call
        return Impl.CPU
    try:
        choice = Impl(impl)
    except ValueError:
        names = ", ".join(Impl)
        raise ValueError(f"impl: expected one of {names}, got {impl!r}") from None
    if choice is Impl.AUTO:
        choice = Impl(device.type) if device.type in ("cpu", "cuda") else Impl.AUTO
    fits = choice in (Impl.REFERENCE, Impl.TRITON) or choice == device.type
    if choice not in available or not fits:
        names = ", ".join(available)
        raise ValueError(f"impl: {impl!s} is not available on {device}; this build has {names}")
    return choice


def check_tensor(
    name: str,
    tensor: Tensor,
    dtype: torch.dtype | Sequence[torch.dtype],
    shape: Sequence[Size],
    device: torch.device,
    *,
    contiguous: bool = True,
) -> None:
    """Raise unless `tensor` is what the kernel reads.

    Raises:
        ValueError: For example "num_unmask: expected int32 [3], got int64 [3]".
    """
    if (
        isinstance(tensor, Tensor)
        and (
            tensor.dtype is dtype or (not isinstance(dtype, torch.dtype) and tensor.dtype in dtype)
        )
        and _fits(tensor.shape, shape)
        and tensor.device == device
        and (not contiguous or tensor.is_contiguous())
    ):
        return
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    dtypes = (dtype,) if isinstance(dtype, torch.dtype) else dtype
    if tensor.dtype not in dtypes or not _fits(tensor.shape, shape):
        names = " or ".join(_dtype_name(d) for d in dtypes)
        raise ValueError(
            f"{name}: expected {names} {_shape_name(shape)}, "
            f"got {_dtype_name(tensor.dtype)} {_shape_name(tensor.shape)}"
        )
    if tensor.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got one on {tensor.device}")
    raise ValueError(f"{name}: expected a contiguous tensor, got strides {tensor.stride()}")


def _fits(actual: Sequence[int], expected: Sequence[Size]) -> bool:
    if actual == expected:
        return True
    if len(actual) != len(expected):
        return False
    for size, wanted in zip(actual, expected, strict=True):
        if isinstance(wanted, int) and size != wanted:
            return False
    return True


def check_no_grad(op: str, **tensors: Tensor | None) -> None:
    """Raise if autograd would have to go through an op that has no derivative.

    Raises:
        RuntimeError: Grad mode is on and one of the tensors requires grad.
    """
    if torch.is_grad_enabled():
        for name, tensor in tensors.items():
            if tensor is not None and tensor.requires_grad:
                raise RuntimeError(f"{op}: {name} requires grad, but this op has no derivative")


def pointer(tensor: Tensor | None) -> int:
    """Address of the first element for the binding; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shape_name(shape: Sequence[Size]) -> str:
    return "[" + ", ".join("*" if size is None else str(size) for size in shape) + "]"
