"""How the rows of a training batch attend: packed documents, no cache."""

from __future__ import annotations

import torch
from torch import Tensor

from pdiff_runtime import ops


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-split rotary embedding.

    Args:
        x: ``[rows, heads, head_dim]``.
        cos, sin: ``[rows, head_dim / 2]``.
    """
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class PackedAttention:
    """Hybrid attention over packed documents, differentiable.

    Args:
        plan: The packed layouts; see :class:`pdiff_runtime.ops.AttentionPlan`.
        cos, sin: The decoder's rotary tables.
        positions: ``[rows]`` int64, restarting at 0 in each document.
    """

    def __init__(
        self, plan: ops.AttentionPlan, cos: Tensor, sin: Tensor, positions: Tensor
    ) -> None:
        self.plan = plan
        self.cos, self.sin = cos[positions], sin[positions]

    def __call__(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See :data:`pdiff_runtime.models.decoder.Attend`."""
        q, k = rotate(q, self.cos, self.sin), rotate(k, self.cos, self.sin)
        return ops.hybrid_attention(q, k, v, self.plan)
