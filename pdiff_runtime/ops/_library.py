"""What every op shares: the torch library they are registered in, the choice of an implementation,
and argument checks that name the argument, what was expected and what came.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
from collections.abc import Sequence
from enum import StrEnum
from typing import TypeAlias

import torch
from torch import Tensor

from pdiff_runtime import _C

_C.use_tensor_type(Tensor)

library = torch.library.Library("pdiff", "DEF")
"""Ops are added with `library.define`, `library.impl` and `torch.library.register_*`."""


class Impl(StrEnum):
    """How an op is executed.

    `AUTO` takes the device's own kernel, on a GPU Triton's where that one does not fit, and never
    the reference.
    """

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"
    TRITON = "triton"
    REFERENCE = "reference"


ELEMENT_TYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What logits, q, k and v may hold."""

# By their own names: every step of a dotted one is a share of a call that takes microseconds.
_PLAIN_TYPES = (Tensor, torch.nn.Parameter)
_num_dispatch_modes = torch._C._len_torch_dispatch_stack
_tracing_state = torch._C._get_tracing_state
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor

FLOAT32_MAX: float = torch.finfo(torch.float32).max

Size: TypeAlias = int | str | None
"""An exact size, or any size: a name is shown in messages, None is shown as `*`."""


def select_impl(
    impl: Impl | str, device: torch.device, *, cuda_refuses: str = "", triton_refuses: str = ""
) -> Impl:
    """The implementation that runs, for tensors on `device`.

    Args:
        cuda_refuses: Why the CUDA kernel does not take these arguments: `AUTO` then goes to Triton.
        triton_refuses: Why the op has no Triton kernel, where it has none.

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
        choices = (Impl.CPU,) if device.type == "cpu" else (Impl.CUDA, Impl.TRITON)
    else:
        choices = (choice,)
    refusals = {Impl.CUDA: cuda_refuses, Impl.TRITON: triton_refuses}
    reasons = []
    for choice in choices:
        reason = why_not(choice, device) or refusals.get(choice, "")
        if not reason:
            return choice
        reasons.append(f"{choice} is not available on {device}: {reason}")
    raise ValueError("impl: " + "; ".join(reasons))


def why_not(impl: Impl, device: torch.device) -> str:
    """Empty if tensors on `device` can be given to `impl`."""
    if impl is Impl.REFERENCE:
        return ""
    if impl is Impl.CPU:
        return "" if device.type == "cpu" else "it takes tensors on cpu"
    if device.type == "cuda" and not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no CUDA device"
    if impl is Impl.CUDA:
        if not _C.built_with_cuda:
            return "built without CUDA"
        emulated = _C.emulates_cuda and device.type == "cpu"
        return "" if emulated or device.type == "cuda" else "it takes tensors on cuda"
    if not _has_triton():
        return "triton is not installed"
    interpreted = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    if interpreted or device.type == "cuda":
        return ""
    return "it takes tensors on cuda, or with TRITON_INTERPRET=1 on cpu"


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def cuda_stream(device: torch.device) -> tuple[int, int]:
    """Device index and handle of the current stream, for the binding; (0, 0) when emulated."""
    if device.type == "cpu":
        return 0, 0
    index = torch.cuda.current_device() if device.index is None else device.index
    return index, torch.cuda.current_stream(index).cuda_stream


def is_traced() -> bool:
    """Whether someone records or intercepts torch's calls, who would not see one of the core."""
    return (
        torch.compiler.is_compiling()
        or _num_dispatch_modes() > 0  # FakeTensorMode, make_fx
        or _tracing_state() is not None  # torch.jit.trace
    )


def fits_cpu_kernel(x: Tensor, y: Tensor) -> bool:
    """Whether an op that is torch's elsewhere may run its CPU kernel on rows x, with y.

    Their memory is what they hold, and nothing wants a gradient, traces or casts.
    """
    return (
        not is_traced()
        and _is_plain(x)
        and _is_plain(y)
        and x.dtype in ELEMENT_TYPES
        and x.numel() > 0
        and x.stride(1) == 1
        and not torch.is_autocast_enabled("cpu")
        and torch.autograd.forward_ad._current_level < 0
        and not (torch.is_grad_enabled() and (x.requires_grad or y.requires_grad))
    )


def _is_plain(x: Tensor) -> bool:
    return type(x) in _PLAIN_TYPES and x.is_cpu and not x.is_neg() and not _is_wrapped(x)


def check_tensor(
    name: str,
    tensor: Tensor,
    dtype: torch.dtype | tuple[torch.dtype, ...],
    shape: tuple[Size, ...],
    like: Tensor,
    *,
    contiguous: bool = True,
    traced: bool = False,
) -> None:
    """Raise unless `tensor` is what the kernel reads, on the device of `like`.

    Args:
        traced: Ask Python alone, which takes longer: tracers can not follow a call into the core.

    Raises:
        ValueError: For example "num_unmask: expected int32 [3], got int64 [3]".
    """
    if not traced and _C.fits(tensor, dtype, shape, like, contiguous):
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
    if tensor.device != like.device:
        raise ValueError(f"{name}: expected a tensor on {like.device}, got one on {tensor.device}")
    if contiguous and not tensor.is_contiguous():
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


def check_one_number(name: str, tensor: Tensor) -> None:
    """Raise unless `tensor` has exactly one element, of any shape and dtype.

    Raises:
        ValueError: For example "normaliser: expected one number, got float64 [2]".
    """
    if tensor.numel() != 1:
        raise ValueError(
            f"{name}: expected one number, "
            f"got {_dtype_name(tensor.dtype)} {_shape_name(tensor.shape)}"
        )


def check_rows_apart(name: str, tensor: Tensor) -> None:
    """Raise if rows of `tensor`, which are written, share memory; within one, nothing has gaps.

    Raises:
        ValueError: For example "q: expected rows that do not overlap, got strides (0, 16, 1)".
    """
    if len(tensor) > 1 and tensor.stride(0) < math.prod(tensor.shape[1:]):
        raise ValueError(
            f"{name}: expected rows that do not overlap, got strides {tensor.stride()}"
        )


def check_no_grad(op: str, **tensors: Tensor | None) -> None:
    """Raise if autograd would have to go through an op that has no derivative.

    Raises:
        RuntimeError: Grad mode is on and one of the tensors requires grad.
    """
    if torch.is_grad_enabled():
        for name, tensor in tensors.items():
            if tensor is not None and tensor.requires_grad:
                raise RuntimeError(f"{op}: {name} requires grad, but this op has no derivative")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shape_name(shape: Sequence[Size]) -> str:
    return "[" + ", ".join("*" if size is None else str(size) for size in shape) + "]"
