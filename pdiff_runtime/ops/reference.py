"""The ops as plain torch: their specification, in whatever dtype the arguments have."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pdiff_runtime.ops.attention_plan import AttentionPlan


def hybrid_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """``softmax(softmax_scale * q @ k^T + mask) @ v`` per sequence, with the mask written out.

    Args:
        q: ``[total_q, num_heads_q, head_dim]``.
        k: ``[total_kv, num_heads_kv, head_dim]``, or
            ``[num_pages, page_size, num_heads_kv, head_dim]`` with a page table.
        v: As ``k``.
        plan: Its layouts and page table say which row sees which key.
        softmax_scale: Factor of the scores.

    Returns:
        ``[total_q, num_heads_q, head_dim]`` and the row's log of sums ``[num_heads_q, total_q]``.
    """
    outs, lses = [q[:0]], [q.new_empty(plan.num_heads_q, 0)]
    row = key = 0
    for idx, layout in enumerate(plan.layouts):
        mask = layout.dense_mask().to(q.device)  # [rows, keys]
        num_rows, num_keys = mask.shape
        if plan.page_table is None or plan.page_size is None:
            keys, values = k[key : key + num_keys], v[key : key + num_keys]
        else:
            num_pages = -(-num_keys // plan.page_size)
            pages = plan.page_table[idx, :num_pages].long().to(k.device)
            keys, values = (x[pages].flatten(0, 1)[:num_keys] for x in (k, v))
        group_size = plan.num_heads_q // plan.num_heads_kv
        keys, values = (x.repeat_interleave(group_size, dim=1) for x in (keys, values))
        scores = softmax_scale * torch.einsum("qhd,khd->hqk", q[row : row + num_rows], keys)
        scores = scores.masked_fill(~mask, float("-inf"))
        lse = scores.logsumexp(-1)
        weights = (scores - lse.masked_fill(lse == float("-inf"), 0.0)[..., None]).exp()
        outs.append(torch.einsum("hqk,khd->qhd", weights, values))
        lses.append(lse)
        row += num_rows
        key += num_keys
    return torch.cat(outs), torch.cat(lses, dim=1)
