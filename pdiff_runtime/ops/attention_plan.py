"""The masks of a batch and the schedule of its attention tiles, built once per forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, Self

import torch
from torch import Tensor

from pdiff_runtime import _C
from pdiff_runtime.ops._library import Impl, check_tensor, pointer, select_impl


class Layout(Protocol):
    """What a plan needs of a ``SpanLayout``."""

    @property
    def handle(self) -> _C.SpanLayout: ...

    @property
    def num_keys(self) -> int: ...

    def dense_mask(self) -> Tensor: ...


class AttentionPlan:
    """Which row of a batch sees which key, and how the kernels walk it.

    Rows of all sequences lie one after another in ``q``; so do keys, unless a page table says
    where each sequence's keys are. A plan may be used by any number of calls, also at once.
    """

    def __init__(
        self,
        handle: _C.AttentionPlan,
        layouts: tuple[Layout, ...],
        num_heads_q: int,
        num_heads_kv: int,
        head_dim: int,
        page_table: Tensor | None,
        page_size: int | None,
        impl: Impl,
        device: torch.device,
    ) -> None:
        self.layouts = layouts
        self.num_heads_q = num_heads_q
        self.num_heads_kv = num_heads_kv
        self.head_dim = head_dim
        self.page_table = page_table
        self.page_size = page_size
        self.total_q = handle.total_q
        self.total_kv = handle.total_kv
        self.impl = impl
        """Whose schedule of tiles it holds."""
        self.num_tiles = handle.num_tiles
        self.num_slots = handle.num_slots
        """Partial results that the parts of tiles with shared-out keys leave, per KV head."""
        self.num_key_tiles = handle.num_key_tiles
        self.num_pages = handle.num_pages
        """One more than the largest page id; 0 for packed keys."""
        words = torch.frombuffer(handle, dtype=torch.int32)
        if device.type == "cuda":
            words = words.pin_memory()  # or the copy would wait for the device
        self.words = words.to(device, non_blocking=True)
        """The plan as data, int32: what compiled graphs carry and kernels read."""
        self.address = self.words.data_ptr()
        self.num_words = self.words.numel()
        self.device = self.words.device

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
        max_pages = 0
        if page_table is not None:
            shape = (len(layouts), "max_pages")
            check_tensor("page_table", page_table, torch.int32, shape, torch.device("cpu"))
            max_pages = page_table.shape[1]
            if page_size is not None and page_size <= 0:
                raise ValueError(f"page_size: expected > 0, got {page_size}")
        handle = _C.AttentionPlan(
            [layout.handle for layout in layouts],
            num_heads_q,
            num_heads_kv,
            head_dim,
            pointer(page_table),
            max_pages,
            page_size or 0,
            choice in (Impl.CUDA, Impl.TRITON),
            split_keys,
            torch.get_num_threads(),
        )
        return cls(
            handle, tuple(layouts), num_heads_q, num_heads_kv, head_dim, page_table, page_size,
            choice, device,
        )  # fmt: skip

    def __repr__(self) -> str:
        return (
            f"AttentionPlan({len(self.layouts)} sequences, {self.total_q} rows, "
            f"{self.total_kv} keys, heads {self.num_heads_q}/{self.num_heads_kv} x {self.head_dim})"
        )


def _cuda_refuses(num_heads_q: int, num_heads_kv: int, head_dim: int) -> str:
    """Why the CUDA kernels do not take these heads; empty if they do."""
    if head_dim not in (64, 128):
        return f"expected head_dim 64 or 128, got {head_dim}"
    if num_heads_kv > 0 and num_heads_q // num_heads_kv > 128:
        return f"expected at most 128 query heads for a key head, got {num_heads_q}/{num_heads_kv}"
    return ""
