"""Log-likelihoods by plain causal attention, as of an autoregressive model."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pdiff_runtime import ops
from pdiff_runtime.models import Decoder
from pdiff_runtime.models.attention import PackedAttention
from pdiff_runtime.plan import SpanLayout

_MAX_ROWS = 2048  # of a forward, if one pair alone has no more
_MAX_LOGITS_ROWS = 256

Pair = tuple[Sequence[int], Sequence[int]]
"""Token ids of a context, at least one, and of what continues it."""


@torch.no_grad()
def causal_log_likelihoods(
    model: Decoder, pairs: Sequence[Pair], *, banned_ids: Sequence[int] = ()
) -> list[tuple[float, bool]]:
    """How likely each continuation is after its context.

    Args:
        model: Every row sees all rows before it, whatever tags they hold.
        pairs: At most ``max_position`` tokens each, less the last one, which is only predicted.
        banned_ids: Tokens that no continuation may hold; the others share out what they had.

    Returns:
        For each pair the natural logarithm of the continuation's probability, and whether each of
        its tokens is the likeliest one in its place.

    Raises:
        ValueError: A pair without a context, or one that is too long.
    """
    longest = model.config.max_position
    for context, continuation in pairs:
        if not context or len(context) + len(continuation) - 1 > longest:
            raise ValueError(
                f"pairs: expected a context and up to {longest + 1} tokens, "
                f"got {len(context)} and {len(continuation)}"
            )
    banned = torch.tensor(banned_ids, dtype=torch.int64, device=model.lm_head.weight.device)
    return [result for batch in _batches(pairs) for result in _of_batch(model, batch, banned)]


def _batches(pairs: Sequence[Pair]) -> Iterator[list[Pair]]:
    """Runs of pairs that fit into one forward."""
    batch: list[Pair] = []
    num_rows = 0
    for pair in pairs:
        num_rows += sum(map(len, pair))
        if batch and num_rows > _MAX_ROWS:
            yield batch
            batch, num_rows = [], sum(map(len, pair))
        batch.append(pair)
    if batch:
        yield batch


def _of_batch(model: Decoder, pairs: list[Pair], banned: Tensor) -> list[tuple[float, bool]]:
    config, device = model.config, banned.device
    inputs = [[*context, *continuation[:-1]] for context, continuation in pairs]
    lengths = [len(token_ids) for token_ids in inputs]
    ends = list(itertools.accumulate(lengths))
    plan = ops.AttentionPlan.pack(
        [SpanLayout.causal(n, n) for n in lengths], num_heads_q=config.num_heads_q,
        num_heads_kv=config.num_heads_kv, head_dim=config.head_dim, device=device,
    )  # fmt: skip
    positions = torch.cat([torch.arange(n, device=device) for n in lengths])
    attend = PackedAttention(plan, model.cos, model.sin, positions)
    hidden = model(torch.tensor(list(itertools.chain(*inputs)), device=device), attend)
    scored = [
        hidden[end - len(continuation) : end]
        for end, (_, continuation) in zip(ends, pairs, strict=True)
    ]
    labels = torch.tensor(
        [i for _, continuation in pairs for i in continuation], dtype=torch.int64, device=device
    )
    log_probs, is_likeliest = [], []
    for rows, wanted in zip(
        torch.cat(scored).split(_MAX_LOGITS_ROWS), labels.split(_MAX_LOGITS_ROWS), strict=True
    ):
        logits = model.logits(rows).float().index_fill(-1, banned, -torch.inf)
        log_probs.append(logits.log_softmax(-1).gather(-1, wanted[:, None])[:, 0])
        is_likeliest.append(logits.argmax(-1) == wanted)
    sizes = [len(continuation) for _, continuation in pairs]
    return [
        (float(values.double().sum()), bool(flags.all()))
        for values, flags in zip(
            torch.cat(log_probs).split(sizes), torch.cat(is_likeliest).split(sizes), strict=True
        )
    ]
