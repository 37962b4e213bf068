"""Root-mean-square normalisation of rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pdiff_runtime import _C
from pdiff_runtime.ops._library import fits_cpu_kernel


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x ** 2) + eps) * weight``, row by row, in float32 and rounded once.

    On a CPU, where no gradient is wanted, one pass of our own; else torch's.

    Args:
        x: ``[rows, size]``; rows may be any stride apart.
        weight: ``[size]``, taken in the dtype of ``x``.
        eps: Added to the mean square.

    Returns:
        ``[rows, size]`` in the dtype of ``x``.

    Raises:
        ValueError: The shapes do not fit: "weight: expected [192], got [191]".
    """
    if x.ndim != 2:
        raise ValueError(f"x: expected [rows, size], got {list(x.shape)}")
    if weight.dtype is not x.dtype:
        weight = weight.to(x.dtype)
    size = x.shape[1]
    if weight.shape != (size,):
        raise ValueError(f"weight: expected [{size}], got {list(weight.shape)}")
    if not fits_cpu_kernel(x, weight) or weight.stride(0) != 1:
        return F.rms_norm(x, (size,), weight, eps)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _C.rms_norm(x, weight, out, eps, torch.get_num_threads())
    return out
