"""What the attention layout and plan cost on the host: time to build, bytes they take.

The peer is the block mask that FlexAttention wants of the same document, from a dense mask.
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.attention.flex_attention import create_block_mask

from pdiff_runtime.bench.case import Call, Case, Prepared
from pdiff_runtime.ops import AttentionPlan
from pdiff_runtime.plan import ControlTokens, SpanLayout

KERNEL = "attention_plan"
TAGS = ControlTokens(
    topic_start=0, topic_end=1, async_start=2, async_end=3, sync=4, mask=5, pad=6, eos=7,
    digits=tuple(range(8, 18)),
)  # fmt: skip
TEXT = 18


def cases(scale: int = 1) -> list[Case]:
    """A document of 4k tokens with 100 segments, then 32k tokens and ever more segments."""
    del scale  # milliseconds as it is
    alone = [
        Case(KERNEL, name, "int64", functools.partial(_build, name, 4096, 100))
        for name in ("layout", "layout and twin", "plan")
    ]
    return alone + [
        Case(
            KERNEL, name, "int64", functools.partial(_build, name, 32_768, num_segments),
            num_segments, "segments of 32k tokens",
        )
        for name in ("layout", "layout and twin", "plan")
        for num_segments in (10, 30, 100, 300, 1000, 3000)
    ]  # fmt: skip


def rounds_of_spans(
    num_tokens: int, num_segments: int, num_spans: int = 8
) -> npt.NDArray[np.int64]:
    """``[num_tokens]``: rounds of a plan, ``num_spans`` spans and a sync, and text to the end."""
    num_rounds = max(1, num_segments // (num_spans + 1))
    round_len = num_tokens // num_rounds
    span_len = round_len * 9 // (10 * num_spans)
    span = [TAGS.async_start, *[TEXT] * (span_len - 2), TAGS.async_end]
    plan = [TEXT] * (round_len - num_spans * span_len - 1)
    token_ids = [*plan, *span * num_spans, TAGS.sync] * num_rounds
    token_ids += [TEXT] * (num_tokens - len(token_ids))
    return np.array(token_ids)


def mask_by_rule(token_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """``[n, n]`` for well-formed ids: a span sees itself, others see it in a later round."""
    is_start, is_end = token_ids == TAGS.async_start, token_ids == TAGS.async_end
    span_idx = np.cumsum(is_start)
    is_span = span_idx > np.cumsum(is_end) - is_end
    round_idx = np.cumsum(token_ids == TAGS.sync)
    own_span = is_span & is_span[:, None] & (span_idx == span_idx[:, None])
    is_open = ~is_span | (round_idx < round_idx[:, None])
    return own_span | (np.tri(len(token_ids), dtype=bool) & is_open)


def _build(name: str, num_tokens: int, num_segments: int) -> Prepared:
    token_ids = rounds_of_spans(num_tokens, num_segments)
    # Whole rounds of the first 2048 tokens: the dense mask of all of it would take a gigabyte.
    syncs = np.flatnonzero(token_ids[:2048] == TAGS.sync)
    head = token_ids[: syncs[-1] + 1] if len(syncs) else token_ids[:0]
    assert np.array_equal(SpanLayout.from_tokens(head, TAGS).dense_mask(), mask_by_rule(head))

    def layout() -> SpanLayout:
        return SpanLayout.from_tokens(token_ids, TAGS)

    def layout_and_twin() -> SpanLayout:
        built = layout()
        _ = built.key_major
        return built

    def plan() -> AttentionPlan:
        return AttentionPlan.pack([layout()], num_heads_q=8, num_heads_kv=2, head_dim=128)

    calls: dict[str, tuple[Call, int]] = {
        "layout": (layout, layout().nbytes),
        "layout and twin": (layout_and_twin, layout_and_twin().nbytes),
        "plan": (plan, plan().words.nbytes),
    }
    ours, num_bytes = calls[name]
    notes = {"segments": layout().num_segments, "bytes": num_bytes}
    if num_tokens > 4096 or name != "plan":
        return Prepared(ours, notes=notes)
    mask = torch.from_numpy(mask_by_rule(token_ids))

    def block_mask() -> object:
        return create_block_mask(
            lambda b, h, row, key: mask[row, key], None, None, len(mask), len(mask), device="cpu"
        )

    return Prepared(ours, {"create_block_mask": block_mask}, notes=notes)
