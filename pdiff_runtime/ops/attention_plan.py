"""The masks of a batch and the schedule of its attention tiles, built once per forward pass."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Protocol, Self

import torch
from torch import Tensor

from pdiff_runtime import _C
from pdiff_runtime.ops._library import Impl, check_tensor, cuda_stream, select_impl

_ON_CPU = torch.empty(0, device="cpu")


class Layout(Protocol):
    """What a plan needs of a ``SpanLayout``."""

    @property
    def handle(self) -> _C.SpanLayout: ...

    @property
    def num_rows(self) -> int: ...

    @property
    def num_keys(self) -> int: ...

    def dense_mask(self) -> Tensor: ...


@dataclasses.dataclass(frozen=True)
class _TokenLayout:
    """The layout of a sequence of tokens, where it is not wanted as a ``SpanLayout``."""

    handle: _C.SpanLayout

    @property
    def num_rows(self) -> int:
        return self.handle.num_rows

    @property
    def num_keys(self) -> int:
        return self.handle.num_keys

    def dense_mask(self) -> Tensor:
        return torch.from_numpy(self.handle.dense_mask())


_PLAN_ERRORS = {
    1: "token_ids: expected spans that are not nested, got one opened inside another",
    2: "max_tags: expected at least as many as the tokens have tags, got less",
    3: "token_ids: expected fewer key intervals, got too much text between spans without a sync",
    4: "cu_seqlens: expected ascending from 0 to the number of tokens, got something else",
}
"""`pdiff::PlanError` by value."""


class AttentionPlan:
    """Which row of a batch sees which key, and how the kernels walk it.

    Rows of all sequences lie one after another in ``q``; so do keys, unless a page table says
    where each sequence's keys are. A plan may be used by any number of calls, also at once.
    """

    def __init__(
        self,
        words: Tensor,
        layouts: tuple[Layout, ...] | None,
        num_heads_q: int,
        num_heads_kv: int,
        head_dim: int,
        impl: Impl,
        *,
        num_sequences: int,
        total_q: int,
        total_kv: int,
        num_slots: int = 0,
        num_pages: int = 0,
        page_table: Tensor | None = None,
        page_size: int | None = None,
    ) -> None:
        self._layouts = layouts
        self.num_sequences = num_sequences
        self.num_heads_q = num_heads_q
        self.num_heads_kv = num_heads_kv
        self.head_dim = head_dim
        self.page_table = page_table
        self.page_size = page_size
        self.total_q = total_q
        self.total_kv = total_kv
        self.impl = impl
        """Whose schedule of tiles it holds."""
        self.num_slots = num_slots
        """Partial results that the parts of tiles with shared-out keys leave, per KV head."""
        self.num_pages = num_pages
        """One more than the largest page id; 0 for packed keys."""
        self.words = words
        """The plan as data, int32: what compiled graphs carry and kernels read."""
        self.device = words.device

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """One per sequence.

        Raises:
            ValueError: The plan was built on a GPU, and they are not known here.
        """
        if self._layouts is None:
            raise ValueError("plan: expected one with layouts, got one built on the device")
        return self._layouts

    @classmethod
    def pack(
        cls,
        layouts: Sequence[Layout],
        *,
        num_heads_q: int,
        num_heads_kv: int,
        head_dim: int,
        device: torch.device | str = "cpu",
        page_table: Tensor | None = None,
        page_size: int | None = None,
        split_keys: bool = True,
        impl: Impl | str = Impl.AUTO,
    ) -> Self:
        """Plan attention over a batch of sequences.

        Args:
            layouts: One ``SpanLayout`` per sequence; its rows are the queries of this call, its
                keys all keys of the sequence.
            num_heads_q: A multiple of ``num_heads_kv``.
            num_heads_kv: Heads of keys and values.
            head_dim: 1 to 256; multiples of 16 are fastest.
            device: Where the tensors will be.
            page_table: ``[batch, max_pages]`` int32 on the CPU, -1 past the end; None for packed
                keys.
            page_size: Tokens per page.
            split_keys: On a GPU, let several blocks share the keys of a tile with few rows and many
                keys. Off, every row sums in the same order whatever the rows beside it, so that its
                bits do not depend on how a sequence is split over calls either.
            impl: The implementation that will run the plan: it decides how large tiles are.

        Raises:
            ValueError: An argument is out of range, the page table lacks a page, or the
                implementation is not available on the device.
        """
        device = torch.device(device)
        choice = select_impl(
            impl, device, cuda_refuses=_cuda_refuses(num_heads_q, num_heads_kv, head_dim)
        )
        if (page_table is None) != (page_size is None):
            raise ValueError(
                "page_table, page_size: expected both or neither, "
                f"got {type(page_table).__name__} and {page_size}"
            )
        if page_table is not None:
            shape = (len(layouts), "max_pages")
            check_tensor("page_table", page_table, torch.int32, shape, _ON_CPU)
            if page_size is not None and page_size <= 0:
                raise ValueError(f"page_size: expected > 0, got {page_size}")
        handle = _C.AttentionPlan(
            [layout.handle for layout in layouts],
            num_heads_q,
            num_heads_kv,
            head_dim,
            page_table,
            page_size or 0,
            choice in (Impl.CUDA, Impl.TRITON),
            split_keys,
            torch.get_num_threads(),
        )
        words = torch.frombuffer(handle, dtype=torch.int32)
        if device.type == "cuda":
            words = words.pin_memory()  # or the copy would wait for the device
        return cls(
            words.to(device, non_blocking=True), tuple(layouts), num_heads_q, num_heads_kv,
            head_dim, choice, num_sequences=len(layouts), total_q=handle.total_q,
            total_kv=handle.total_kv, num_slots=handle.num_slots, num_pages=handle.num_pages,
            page_table=page_table, page_size=page_size,
        )  # fmt: skip

    @classmethod
    def from_tokens(
        cls,
        token_ids: Tensor,
        cu_seqlens: Tensor,
        *,
        async_start: int,
        async_end: int,
        sync: int,
        isolate_spans: bool = True,
        num_heads_q: int,
        num_heads_kv: int,
        head_dim: int,
        max_tags: int | None = None,
        impl: Impl | str = Impl.AUTO,
    ) -> Self:
        """Plan attention over whole sequences, as ``SpanLayout.from_tokens`` reads them.

        On a GPU the plan is built there, and nothing waits for it: a graph may capture it, and what
        is wrong with the tokens shows in :meth:`check`. Attention with such a plan in error writes
        nothing: its results are memory as it was allocated. A plan built there has no ``layouts``.

        Args:
            token_ids: ``[total]`` int64, the sequences one after another.
            cu_seqlens: ``[num_sequences + 1]`` int32, from 0 to ``total``.
            async_start, async_end, sync: Ids of the tags.
            isolate_spans: False lets spans that directly follow one another see each other.
            num_heads_q: A multiple of ``num_heads_kv``.
            num_heads_kv: Heads of keys and values.
            head_dim: 1 to 256; multiples of 16 are fastest.
            max_tags: On a GPU, how many tags and syncs there may be; a quarter of the tokens, and
                at least 256, unless told.
            impl: The implementation that will run the plan.

        Raises:
            ValueError: An argument is out of range, or, on the CPU, a span is inside a span.
        """
        device = token_ids.device
        choice = select_impl(
            impl, device, cuda_refuses=_cuda_refuses(num_heads_q, num_heads_kv, head_dim)
        )
        check_tensor("token_ids", token_ids, torch.int64, ("total",), token_ids)
        check_tensor("cu_seqlens", cu_seqlens, torch.int32, ("num_sequences + 1",), token_ids)
        total, num_sequences = len(token_ids), len(cu_seqlens) - 1
        if num_sequences < 0:
            raise ValueError("cu_seqlens: expected at least one element, got none")
        heads = num_heads_q, num_heads_kv, head_dim
        on_gpu = choice is Impl.CUDA or (choice is Impl.TRITON and device.type == "cuda")
        if on_gpu and _C.built_with_cuda:
            max_tags = max(256, total // 4) if max_tags is None else max_tags
            num_words, num_bytes = _C.plan_from_tokens_sizes(total, num_sequences, max_tags, *heads)
            words = torch.empty(num_words, dtype=torch.int32, device=device)
            workspace = torch.empty(num_bytes, dtype=torch.uint8, device=device)
            _C.plan_from_tokens_cuda(
                token_ids, cu_seqlens, max_tags, async_start, async_end, sync, isolate_spans,
                *heads, words, workspace, *cuda_stream(device),
            )  # fmt: skip
            return cls(
                words, None, *heads, choice,
                num_sequences=num_sequences, total_q=total, total_kv=total,
            )  # fmt: skip
        bounds = cu_seqlens.tolist()
        if bounds != sorted(bounds) or bounds[0] != 0 or bounds[-1] != total:
            raise ValueError(_PLAN_ERRORS[4])
        ids = token_ids.cpu().numpy()
        layouts = [
            _TokenLayout(
                _C.SpanLayout.from_tokens(ids[lo:hi], async_start, async_end, sync, isolate_spans)
            )
            for lo, hi in itertools.pairwise(bounds)
        ]
        return cls.pack(
            layouts, num_heads_q=num_heads_q, num_heads_kv=num_heads_kv, head_dim=head_dim,
            device=device, split_keys=False, impl=choice,
        )  # fmt: skip

    def check(self) -> None:
        """Wait for a plan that a GPU builds, and raise what is wrong with its tokens.

        Attention with a plan in error writes nothing, forward or backward: without this call
        results that hold whatever was in their memory go unnoticed.

        Raises:
            ValueError: A span is inside a span, ``max_tags`` is too small, ``cu_seqlens`` does not
                ascend from 0 to the number of tokens, or too many texts lie between spans.
        """
        if error := int(self.words[_C.plan_error_word]):
            raise ValueError(_PLAN_ERRORS[error])

    def __repr__(self) -> str:
        return (
            f"AttentionPlan({self.num_sequences} sequences, {self.total_q} rows, "
            f"{self.total_kv} keys, heads {self.num_heads_q}/{self.num_heads_kv} x {self.head_dim})"
        )


def _cuda_refuses(num_heads_q: int, num_heads_kv: int, head_dim: int) -> str:
    """Why the CUDA kernels do not take these heads; empty if they do."""
    if head_dim not in (64, 128):
        return f"expected head_dim 64 or 128, got {head_dim}"
    if num_heads_kv > 0 and num_heads_q // num_heads_kv > 128:
        return f"expected at most 128 query heads for a key head, got {num_heads_q}/{num_heads_kv}"
    return ""
