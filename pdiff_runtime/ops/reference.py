"""The specification: what each op computes, in plain torch, readable before fast.

Every kernel is tested against this file, and ``impl="reference"`` runs it. The row ops compute in
float64, attention in the dtype of its arguments.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pdiff_runtime.ops.attention_plan import AttentionPlan

# -- hybrid attention ----------------------------------------------------------------------------


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


# -- random numbers ------------------------------------------------------------------------------

TOKEN, POSITION = 0, 1
"""What a random number is for; part of its address."""


def philox(counter: tuple[Tensor | int, ...], seed: Tensor) -> tuple[Tensor, ...]:
    """Philox4x32-10: four words (int64 holding uint32) of a counter of four words and a seed."""
    mask = 0xFFFFFFFF
    x0, x1, x2, x3 = (seed.new_tensor(x) if isinstance(x, int) else x.long() for x in counter)
    key0, key1 = seed & mask, (seed >> 32) & mask
    for _ in range(10):
        product0, product1 = 0xD2511F53 * x0, 0xCD9E8D57 * x2  # wraps, which keeps all 64 bits
        x0, x1, x2, x3 = (
            ((product1 >> 32) & mask) ^ x1 ^ key0,
            product1 & mask,
            ((product0 >> 32) & mask) ^ x3 ^ key1,
            product0 & mask,
        )
        key0, key1 = (key0 + 0x9E3779B9) & mask, (key1 + 0xBB67AE85) & mask
    return x0, x1, x2, x3


def gumbel(seed: Tensor, position: Tensor, step_idx: Tensor, ids: Tensor, use: int) -> Tensor:
    """A standard Gumbel number in float64 for each address; all arguments broadcast."""
    words = torch.broadcast_tensors(*philox((ids // 4, position, step_idx, use), seed), ids)
    word = torch.stack(words[:4]).gather(0, words[4][None] % 4)[0]
    return -torch.log(-torch.log1p(-(word + 0.5) * 2.0**-32))


# -- unmask --------------------------------------------------------------------------------------


def keep_prefix(logits: Tensor, top_p: float, top_k: int) -> Tensor:
    """Mask of what top-p, then top-k leave of one row ``[vocab_size]``.

    In the order (logit descending, id ascending), top-p keeps the shortest prefix whose probability
    reaches ``top_p``, and top-k all of it that ties with or comes before the ``top_k``-th; at least
    one token.
    """
    p, order = torch.softmax(logits, -1).sort(descending=True, stable=True)
    ranked = logits[order]
    keep = ranked > -math.inf
    if top_p < 1.0:
        keep &= p.cumsum(0) - p < top_p
    if 0 < top_k < len(keep):
        keep &= ranked >= ranked[top_k - 1]
    keep[0] = True
    return torch.zeros_like(keep).scatter_(0, order, keep)


def written_of_best(rule: str, threshold: float, confidence: Tensor) -> Tensor:
    """Mask of what a rule writes of a span's best, whose confidences ``[num]`` are in their order.

    Always the first; ``factor`` and ``entropy_budget`` end at the first position that is not sure.
    """
    c = confidence.double()
    rank = torch.arange(1, len(c) + 1, device=c.device)
    if rule == "threshold":
        return (rank == 1) | (c >= threshold)
    if rule == "factor":
        sure = (rank + 1) * (1 - c) < threshold
    elif rule == "entropy_budget":
        sure = torch.cat([c.new_zeros(1), -c]).cumsum(0)[:-1] <= threshold  # of the ranks before
    else:
        sure = rank > 0
    return ((rank == 1) | sure).cumprod(0).bool()


def unmask_(
    token_ids: Tensor,
    logits: Tensor,
    row_position: Tensor,
    cu_rows_span: Tensor,
    num_unmask: Tensor,
    *,
    rule: str = "entropy",
    threshold: float | Tensor | None = None,
    temperature: float | Tensor = 0.0,
    top_p: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    alg_temp: float | Tensor = 0.0,
    banned_ids: Tensor | None = None,
    seeds: Tensor | None = None,
    step_idx: int | Tensor = 0,
    positions: Tensor | None = None,
    num_masked: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`pdiff_runtime.ops.unmask_`: confidence, candidate, is_nan, is_written."""
    num_rows, vocab_size = logits.shape
    num_spans = num_unmask.shape[0]
    device = logits.device

    def of_spans(value: float | Tensor | None) -> list[float]:
        return value.tolist() if isinstance(value, Tensor) else [value or 0] * num_spans

    seed = torch.zeros(num_rows, dtype=torch.int64, device=device) if seeds is None else seeds
    position = row_position if positions is None else positions
    ids = torch.arange(vocab_size, device=device)
    confidence = torch.full((num_rows,), math.nan, dtype=torch.float32, device=device)
    candidate = torch.full((num_rows,), -1, dtype=torch.int64, device=device)
    is_written = torch.zeros(num_rows, dtype=torch.bool, device=device)

    x = logits.double()
    if banned_ids is not None:
        x[:, banned_ids] = -math.inf
    largest = x.amax(1)  # NaN where the row holds one
    is_nan = ~torch.isfinite(largest)

    bounds = cu_rows_span.tolist()
    settings = zip(
        *map(of_spans, (num_unmask, temperature, top_p, top_k, alg_temp, threshold, step_idx)),
        strict=True,
    )
    for span, (quota, t, p, k, t_alg, limit, step) in enumerate(settings):
        rows = range(bounds[span], bounds[span + 1])
        live = [row for row in rows if not is_nan[row]]
        step = torch.tensor(step, device=device)
        for row in live:
            scaled = x[row] / t if t > 0 else x[row]
            scaled = scaled.masked_fill(~keep_prefix(scaled, p, int(k)), -math.inf)
            probs = torch.softmax(scaled, -1)
            chosen = scaled.argmax()  # the lowest id on ties
            if t > 0:
                chosen = (scaled + gumbel(seed[row], position[row], step, ids, TOKEN)).argmax()
            candidate[row] = chosen
            if rule in ("entropy", "entropy_budget"):
                confidence[row] = torch.xlogy(probs, probs).sum()
            elif rule == "margin":
                best = torch.cat([probs, probs.new_zeros(1)]).topk(2).values
                confidence[row] = best[0] - best[1]
            else:
                confidence[row] = probs[chosen]

        key = confidence.double()
        if t_alg > 0:
            key = key / t_alg + gumbel(seed, position, step, torch.zeros_like(seed), POSITION)
        ranked = sorted(live, key=lambda row: (-key[row].item(), row))
        ranked = ranked[: max(0, quota)]
        is_chosen = written_of_best(rule, limit, confidence[ranked])
        for row in itertools.compress(ranked, is_chosen):
            token_ids[row_position[row]] = candidate[row]
            is_written[row] = True
            if num_masked is not None:
                num_masked[span] -= 1
    return confidence, candidate, is_nan, is_written


# -- rope_kv_write -------------------------------------------------------------------------------


def rope_kv_write_(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slots: Tensor | None,
    k_cache: Tensor | None,
    v_cache: Tensor | None,
) -> None:
    """See :func:`pdiff_runtime.ops.rope_kv_write_`."""
    c, s = (table[positions.long()][:, None, :].double() for table in (cos, sin))
    for x in (q, k):
        a, b = x.double().chunk(2, dim=-1)
        x.copy_(torch.cat([a * c - b * s, b * c + a * s], dim=-1))
    if k_cache is not None and v_cache is not None and v is not None and slots is not None:
        rows = (slots >= 0).nonzero()[:, 0]
        k_cache.flatten(0, 1)[slots[rows]] = k[rows]
        v_cache.flatten(0, 1)[slots[rows]] = v[rows]


# -- weighted cross-entropy ----------------------------------------------------------------------


def weighted_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor,
    kind: Tensor,
    normaliser: float,
    dlogits: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`pdiff_runtime.ops.weighted_cross_entropy`; `dlogits` receives the gradient."""
    counted = labels != -100
    target = labels.where(counted, 0)[:, None]
    log_probs = torch.log_softmax(logits.double(), -1)
    ce = torch.where(counted, -log_probs.gather(1, target)[:, 0], 0.0)

    by_kind = [(kind == i) & counted for i in range(2)]
    weighted = torch.stack([(weight * ce)[rows].sum() for rows in by_kind])
    unweighted = torch.stack([ce[rows].sum() for rows in by_kind])
    counts = torch.stack([rows.sum() for rows in by_kind])
    loss = weighted.sum() / normaliser if normaliser != 0 else weighted.new_zeros(())
    if dlogits is not None:
        scale = torch.where(counted, weight, 0.0) / normaliser if normaliser != 0 else weight * 0
        one_hot = torch.zeros_like(log_probs).scatter_(1, target, 1.0)
        dlogits.copy_(scale[:, None] * (log_probs.exp() - one_hot))
    return loss.float(), weighted.float(), unweighted.float(), counts
