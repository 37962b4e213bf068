"""Attention problems: batches of layouts with the shapes that break kernels."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pdiff_runtime.ops import AttentionPlan, Impl
from pdiff_runtime.plan import ControlTokens, SpanLayout

TAGS = ControlTokens(
    topic_start=0, topic_end=1, async_start=2, async_end=3, sync=4, mask=5, pad=6, eos=7,
    digits=tuple(range(10, 20)),
)  # fmt: skip
TEXT = 8


def document(*parts: int | str) -> list[int]:
    """Token ids from a sketch: 5 is five text tokens, "30" a span of 30 tokens, "sync" a sync."""
    token_ids: list[int] = []
    for part in parts:
        if isinstance(part, int):
            token_ids += [TEXT] * part
        elif part == "sync":
            token_ids.append(TAGS.sync)
        else:
            token_ids += [TAGS.async_start, *[TAGS.mask] * (int(part) - 2), TAGS.async_end]
    return token_ids


def layout_of(*parts: int | str) -> SpanLayout:
    """The layout of a whole document; see :func:`document`."""
    return SpanLayout.from_tokens(document(*parts), TAGS)


LAYOUTS: Mapping[str, Sequence[SpanLayout]] = {
    "no_span": [SpanLayout.causal(n, n) for n in (1, 31, 32, 33, 127, 128, 129, 211)],
    "one_span": [layout_of(7, "5"), layout_of("2"), layout_of(61, "70", "sync", 12)],
    "many_spans": [layout_of(45, "30", "17", "64", "3", "sync", 23), layout_of(13, *["9"] * 11)],
    "empty_spans": [layout_of(20, "2", "2", "40", "2", "sync", 5, "2"), layout_of("2", "2")],
    "unsynced_neighbours": [layout_of(10, "20", "25", 40, "31", 3), layout_of("20", "30")],
    "several_syncs": [layout_of(9, "30", "12", "sync", 5, "40", "8", "sync", "sync", 3, "33")],
    "plan_text_between_spans": [layout_of(12, "10", 3, "15", 6, "40", 2, "8", "sync", 50, "20", 1)],
    "fewer_rows_than_keys": [
        SpanLayout.causal(1, 301),
        SpanLayout.from_spans(141, [17, 40, 64]),
        SpanLayout.causal(37, 165),
        SpanLayout.from_spans(97, [23, 30], isolate_spans=False),
        SpanLayout.causal(1, 1),
    ],
    "rows_that_see_nothing": [
        SpanLayout.from_segments(90, [(9, "full", []), (40, "full", [(3, 80)])]),
        SpanLayout.from_segments(0, [(5, "full", [])]),
        SpanLayout.from_segments(70, [(35, "full", [(0, 5), (9, 10), (64, 70)])]),
        SpanLayout.from_segments(4, []),
    ],
}
"""Batches by the shape of their masks: ragged lengths around the tile sizes, primes, 1."""


@dataclasses.dataclass(frozen=True)
class AttentionProblem:
    """One batch with its heads and element type, packed or in pages."""

    layouts: str
    num_heads_q: int = 4
    num_heads_kv: int = 2
    head_dim: int = 64
    dtype: torch.dtype = torch.float32
    page_size: int | None = None

    def __str__(self) -> str:
        names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
        dtype = names[self.dtype]
        pages = f"-page{self.page_size}" if self.page_size else ""
        heads = f"h{self.num_heads_q}_{self.num_heads_kv}x{self.head_dim}"
        return f"{self.layouts}-{heads}-{dtype}{pages}"

    def plan(
        self,
        seed: int = 0,
        *,
        device: torch.device | str = "cpu",
        impl: Impl | str = Impl.AUTO,
    ) -> AttentionPlan:
        """The plan; pages are dealt out in random order with some left over."""
        layouts = LAYOUTS[self.layouts]
        table = None
        if self.page_size is not None:
            counts = [-(-layout.num_keys // self.page_size) for layout in layouts]
            generator = torch.Generator().manual_seed(seed)
            ids = torch.randperm(sum(counts) + 3, generator=generator).tolist()
            table = torch.full((len(layouts), max(counts)), -1, dtype=torch.int32)
            for row, count in zip(table, counts, strict=True):
                for i in range(count):
                    row[i] = ids.pop()
        return AttentionPlan.pack(
            layouts,
            num_heads_q=self.num_heads_q,
            num_heads_kv=self.num_heads_kv,
            head_dim=self.head_dim,
            page_table=table,
            page_size=self.page_size,
            device=device,
            impl=impl,
        )

    def inputs(self, plan: AttentionPlan, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Random q, k, v on the plan's device. Page slots that hold no key are NaN."""
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(self.dtype)

        q = random(plan.total_q, self.num_heads_q, self.head_dim)
        if plan.page_table is None or plan.page_size is None:
            shape = (plan.total_kv, self.num_heads_kv, self.head_dim)
            return q.to(plan.device), random(*shape).to(plan.device), random(*shape).to(plan.device)
        num_pages = int(plan.page_table.max()) + 2
        pages_k, pages_v = (
            torch.full((num_pages, plan.page_size, self.num_heads_kv, self.head_dim), torch.nan).to(
                self.dtype
            )
            for _ in range(2)
        )
        for table, layout in zip(plan.page_table.tolist(), plan.layouts, strict=True):
            for key in range(layout.num_keys):
                slot = table[key // plan.page_size], key % plan.page_size
                pages_k[slot] = random(self.num_heads_kv, self.head_dim)
                pages_v[slot] = random(self.num_heads_kv, self.head_dim)
        return q.to(plan.device), pages_k.to(plan.device), pages_v.to(plan.device)
