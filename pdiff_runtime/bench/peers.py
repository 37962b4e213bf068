"""What a torch user would write instead of our ops, and inputs in the shape it needs."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from pdiff_runtime.bench.workloads import AttentionWorkload
from pdiff_runtime.ops import AttentionPlan, Impl

Inputs: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""q, k, v."""

# -- hybrid attention ----------------------------------------------------------------------------


def pages_of(workload: AttentionWorkload) -> Tensor | None:
    """``[batch, max_pages]``: pages dealt out at random; None for packed keys."""
    if workload.page_size is None:
        return None
    counts = [-(-layout.num_keys // workload.page_size) for layout in workload.layouts]
    generator = torch.Generator().manual_seed(0)
    pages = torch.randperm(sum(counts), generator=generator).int().split(counts)
    return torch.nn.utils.rnn.pad_sequence(list(pages), batch_first=True, padding_value=-1)


def plan_of(
    workload: AttentionWorkload,
    *,
    impl: Impl = Impl.AUTO,
    device: torch.device | str = "cpu",
    page_table: Tensor | None = None,
) -> AttentionPlan:
    """The plan of a workload, with pages as in :func:`pages_of` where no others are given."""
    return AttentionPlan.pack(
        workload.layouts,
        num_heads_q=workload.num_heads_q,
        num_heads_kv=workload.num_heads_kv,
        head_dim=workload.head_dim,
        device=device,
        page_table=pages_of(workload) if page_table is None else page_table,
        page_size=workload.page_size,
        impl=impl,
    )


def inputs_of(plan: AttentionPlan, dtype: torch.dtype) -> Inputs:
    """Random q, k, v where the plan is."""
    rows = (plan.total_q,)
    keys: tuple[int, ...] = (plan.total_kv,)
    if plan.page_table is not None and plan.page_size is not None:
        keys = (int(plan.page_table.max()) + 1, plan.page_size)
    shapes = [(*rows, plan.num_heads_q), (*keys, plan.num_heads_kv), (*keys, plan.num_heads_kv)]
    q, k, v = (torch.randn(*s, plan.head_dim, device=plan.device).to(dtype) for s in shapes)
    return q, k, v


def gathered(plan: AttentionPlan, pool: Tensor) -> Tensor:
    """``[total_kv, num_heads_kv, head_dim]``: the keys of all sequences, out of their pages."""
    if plan.page_table is None or plan.page_size is None:
        return pool
    return torch.cat(
        [
            pool[table[: -(-layout.num_keys // plan.page_size)].long().to(pool.device)]
            .flatten(0, 1)[: layout.num_keys]
            for table, layout in zip(plan.page_table, plan.layouts, strict=True)
        ]
    )  # fmt: skip


def peers_of(plan: AttentionPlan, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Inputs]:
    """``[1, heads, tokens, head_dim]`` q, k, v for SDPA: keys gathered and repeated."""
    group_size = plan.num_heads_q // plan.num_heads_kv
    tensors = (q, gathered(plan, k), gathered(plan, v))
    q, k, v = (x.transpose(0, 1).contiguous()[None] for x in tensors)
    repeated = q, k.repeat_interleave(group_size, 1), v.repeat_interleave(group_size, 1)
    return {"grouped": (q, k, v), "repeated": repeated}


def dense_bias(plan: AttentionPlan, dtype: torch.dtype) -> Tensor:
    """``[total_q, total_kv]``: 0 where the row sees the key, else -inf."""
    bias = torch.full((plan.total_q, plan.total_kv), -torch.inf, dtype=dtype, device=plan.device)
    row = key = 0
    for layout in plan.layouts:
        mask = layout.dense_mask().to(plan.device)
        bias[row : row + layout.num_rows, key : key + layout.num_keys].masked_fill_(mask, 0.0)
        row, key = row + layout.num_rows, key + layout.num_keys
    return bias


# -- unmask --------------------------------------------------------------------------------------


def filtered_logits(logits: Tensor, top_p: float = 1.0, top_k: int = 0) -> Tensor:
    """Top-p, then top-k, by sorting."""
    if top_p < 1.0:
        ranked, order = logits.sort(dim=-1, descending=True)
        probs = ranked.softmax(-1)
        is_out = probs.cumsum(-1) - probs >= top_p
        logits = logits.masked_fill(is_out.scatter(1, order, is_out), -torch.inf)
    if top_k > 0:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    return logits


def score_rows(
    logits: Tensor, temperature: float = 0.0, top_p: float = 1.0, top_k: int = 0
) -> tuple[Tensor, Tensor]:
    """Confidence and candidate of each row, in plain torch."""
    logits = logits.float()
    if temperature > 0:
        logits = logits / temperature
    logits = filtered_logits(logits, top_p, top_k)
    probs = logits.softmax(-1)
    confidence = (probs * torch.log(probs + 1e-10)).sum(-1)
    if temperature > 0:
        return confidence, probs.multinomial(1)[:, 0]
    return confidence, logits.argmax(-1)


def torch_step(
    score: Callable[..., tuple[Tensor, Tensor]],
    token_ids: Tensor,
    logits: Tensor,
    row_position: Tensor,
    cu_rows_span: list[int],
    quota: int,
    **settings: Any,
) -> None:
    """What `unmask_` does, span by span, `quota` positions each."""
    confidence, candidate = score(logits, **settings)
    for lo, hi in itertools.pairwise(cu_rows_span):
        best = lo + confidence[lo:hi].topk(quota).indices
        token_ids[row_position[best].long()] = candidate[best]
