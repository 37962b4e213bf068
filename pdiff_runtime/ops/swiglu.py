"""The activation of gated linear units."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pdiff_runtime import _C
from pdiff_runtime.ops._library import fits_cpu_kernel


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up`` with ``silu(x) = x / (1 + exp(-x))``, in float32 and rounded once.

    On a CPU, where no gradient is wanted, one pass of our own; else torch's two, which round twice.

    Args:
        gate: ``[rows, size]``; rows may be any stride apart.
        up: As ``gate``.

    Returns:
        ``[rows, size]`` in the dtype of ``gate``.

    Raises:
        ValueError: The shapes or dtypes differ: "up: expected torch.float32 [9, 512], got ...".
    """
    if gate.ndim != 2:
        raise ValueError(f"gate: expected [rows, size], got {list(gate.shape)}")
    if up.shape != gate.shape or up.dtype != gate.dtype:
        raise ValueError(
            f"up: expected {gate.dtype} {list(gate.shape)}, got {up.dtype} {list(up.shape)}"
        )
    if not fits_cpu_kernel(gate, up) or up.stride(1) != 1:
        return F.silu(gate) * up
    out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    _C.swiglu(gate, up, out, torch.get_num_threads())
    return out
