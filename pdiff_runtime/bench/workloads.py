"""The shapes that kernel benches share, by name."""

from __future__ import annotations

import dataclasses
import random

from pdiff_runtime.plan import SpanLayout
from pdiff_runtime.testing.problems import layout_of


@dataclasses.dataclass(frozen=True)
class AttentionWorkload:
    """A batch of layouts with its heads; ``page_size`` puts the keys into pages."""

    layouts: tuple[SpanLayout, ...]
    num_heads_q: int
    num_heads_kv: int
    head_dim: int
    page_size: int | None = None

    @property
    def num_visible_pairs(self) -> int:
        return sum(layout.num_visible_pairs for layout in self.layouts)

    @property
    def num_rows(self) -> int:
        return sum(layout.num_rows for layout in self.layouts)

    @property
    def density(self) -> float:
        """Visible pairs as a share of all pairs of a sequence."""
        return self.num_visible_pairs / sum(n.num_rows * n.num_keys for n in self.layouts)

    @property
    def forward_flops(self) -> int:
        """Of the visible (query, key) pairs alone."""
        return 4 * self.num_heads_q * self.head_dim * self.num_visible_pairs


def long_document(
    num_tokens: int, context: int = 512, num_rounds: int = 4, num_spans: int = 8
) -> SpanLayout:
    """A context, then rounds of some plan text, spans of one length, and a sync: 45 % visible."""
    round_len = (num_tokens - context) // num_rounds
    span_len = round_len // (num_spans + 1)
    plan = round_len - num_spans * span_len - 1
    rounds: list[int | str] = [plan, *[str(span_len)] * num_spans, "sync"] * num_rounds
    return layout_of(context + (num_tokens - context) % num_rounds, *rounds)


def paper_documents(num_tokens: int) -> tuple[SpanLayout, ...]:
    """Documents of about 700 tokens with 2 to 6 spans of 30 to 150, together `num_tokens`."""
    draw = random.Random(0)
    layouts, left = [], num_tokens
    while left > 0:
        spans = [draw.randint(30, 150) for _ in range(draw.randint(2, 6))]
        while sum(spans) > 600:
            spans.pop()
        size = min(left, draw.randint(600, 800))
        if left - size < 300:
            size = left
        text = max(2, size - 1 - sum(spans))
        layouts.append(layout_of(text // 2, *map(str, spans), "sync", text - text // 2))
        left -= layouts[-1].num_rows
    return tuple(layouts)


def long_documents(num_tokens: int, scale: int = 1) -> tuple[SpanLayout, ...]:
    """Documents of two rounds of 4 to 12 spans of 200 to 800, together `num_tokens`.

    Everything is `scale` times shorter.
    """
    draw = random.Random(0)
    layouts, left = [], num_tokens
    while left > 0:
        parts: list[int | str] = []
        size = 0
        for _ in range(2):
            parts.append(draw.randint(200, 600) // scale)
            parts += [str(draw.randint(200, 800) // scale) for _ in range(draw.randint(4, 12))]
            parts.append("sync")
        while (size := sum(1 if part == "sync" else int(part) for part in parts)) > left:
            parts.pop()
        parts.append(left - size if left - size < 2000 // scale else 100 // scale)
        layouts.append(layout_of(*parts))
        left -= layouts[-1].num_rows
    return tuple(layouts)


def gpu_attention(
    scale: int = 1, heads: tuple[int, int, int] = (28, 4, 128)
) -> dict[str, AttentionWorkload]:
    """Shapes of a model of 7 billion parameters; lengths and batches are `scale` times smaller."""
    num_tokens, context, requests = 32_768 // scale, 2048 // scale, max(2, 32 // scale)
    span = max(4, context // 32)
    step = SpanLayout.from_spans(context, [span] * 4)
    return {
        "long": AttentionWorkload(long_documents(num_tokens, min(scale, 32)), *heads),
        "paper": AttentionWorkload(paper_documents(num_tokens), *heads),
        "denoise": AttentionWorkload((step,) * requests, *heads, page_size=64),
        "answers": AttentionWorkload(
            (SpanLayout.causal(1, 2 * context),) * (4 * requests), *heads, page_size=64
        ),
        "prompts": AttentionWorkload(
            (SpanLayout.causal(context // 4, context),) * 2, *heads, page_size=64
        ),
    }


def cpu_attention(scale: int = 1) -> dict[str, AttentionWorkload]:
    """What a CPU is measured with; lengths and batches are `scale` times smaller.

    long      one document of 4096 tokens, 8 spans in each of 4 rounds after a context of 512
    paper     documents as the method's authors train on, packed to 4096
    training  many documents of 100 tokens, as the bundled model trains on
    denoise   one step of 8 spans of 60 over a shared context of 736, keys in pages
    answers   one new token for each of 8 requests over 2048 keys, keys in pages
    mixed     denoise steps, new tokens and a chunk of a prompt in one batch, keys in pages
    """
    heads = 8, 2, 128
    spans = SpanLayout.from_spans(736 // scale, [max(2, 60 // scale)] * 8)
    answer = SpanLayout.causal(1, 2048 // scale)
    chunk = SpanLayout.causal(256 // scale, 1024 // scale)
    return {
        "long": AttentionWorkload((long_document(4096 // scale, 512 // scale),), *heads),
        "paper": AttentionWorkload(paper_documents(max(700, 4096 // scale)), *heads),
        "training": AttentionWorkload(
            (layout_of(30, "20", "25", "sync", 24),) * max(2, 41 // scale), 3, 1, 64
        ),
        "denoise": AttentionWorkload((spans,), *heads, page_size=64),
        "answers": AttentionWorkload((answer,) * 8, *heads, page_size=64),
        "mixed": AttentionWorkload((spans, spans, *[answer] * 8, chunk), *heads, page_size=64),
    }


def documents_of(num_tokens: int) -> AttentionWorkload:
    """Documents as the method's authors train on, packed to `num_tokens`."""
    return AttentionWorkload(paper_documents(num_tokens), 8, 2, 128)


def document_of_spans(num_tokens: int, num_spans: int) -> AttentionWorkload:
    """One document of a context and `num_spans` spans: the more, the fewer pairs are visible."""
    layout = long_document(num_tokens, num_tokens // 8, num_rounds=1, num_spans=num_spans)
    return AttentionWorkload((layout,), 8, 2, 128)


def denoise_step(context: int, num_rows: int, num_spans: int) -> AttentionWorkload:
    """`num_rows` rows in spans of one length over a shared context, keys in pages."""
    layout = SpanLayout.from_spans(context, [num_rows // num_spans] * num_spans)
    return AttentionWorkload((layout,), 8, 2, 128, page_size=64)
