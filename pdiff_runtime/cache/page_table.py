"""Where the keys and values of one request lie."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pdiff_runtime.ops.structures import PageAllocator

_NO_PAGE = -1


class PageTable:
    """The pages of one request, in the order of its positions.

    Attributes:
        num_pages: Pages from position 0 on, dropped ones included.
    """

    def __init__(self, allocator: PageAllocator, page_size: int) -> None:
        self._allocator = allocator
        self._page_size = page_size
        self._pages = np.empty(8, np.int32)
        self._has_dropped = False
        self.num_pages = 0

    def grow(self, num_tokens: int, kept: Sequence[tuple[int, int]] | None = None) -> None:
        """Make room for positions ``0 .. num_tokens - 1``.

        Args:
            kept: Intervals of positions ``[lo, hi)``; pages that hold nothing of them are left out.

        Raises:
            OutOfPagesError: Too few pages are free; nothing has changed.
        """
        start, end = self.num_pages, -(-num_tokens // self._page_size)
        if end <= start:
            return
        is_kept = self._holds(kept, end)[start:] if kept is not None else np.ones(end - start, bool)
        pages = np.full(end - start, _NO_PAGE, np.int32)
        pages[is_kept] = self._allocator.allocate(int(is_kept.sum()))
        self.adopt(pages)
        self._has_dropped |= not is_kept.all()

    def adopt(self, pages: Sequence[int] | npt.NDArray[np.int32]) -> None:
        """Append pages on which the caller holds a reference, which is the table's from now on."""
        end = self.num_pages + len(pages)
        if end > len(self._pages):
            self._pages = np.concatenate([self._pages, np.empty(end, np.int32)])
        self._pages[self.num_pages : end] = pages
        self.num_pages = end

    def page(self, page_idx: int) -> int:
        """The page of positions ``page_idx * page_size`` and on."""
        return int(self._pages[page_idx])

    def fill_row(self, row: npt.NDArray[np.int32]) -> None:
        """Write the pages into the row of a batch's page table.

        A dropped page is replaced by the first one: no row looks there, but tables have no gaps.
        """
        pages = self._pages[: self.num_pages]
        if self._has_dropped:
            pages = np.where(pages == _NO_PAGE, pages[0], pages)
        row[: self.num_pages] = pages

    def slot(self, position: int) -> int:
        """Where the key and value of ``position`` lie: page * page_size + offset."""
        page_idx, offset = divmod(position, self._page_size)
        return int(self._pages[page_idx]) * self._page_size + offset

    def slots(self, lo: int, hi: int) -> npt.NDArray[np.int64]:
        """:meth:`slot` of positions ``lo .. hi - 1``."""
        page_idx, offset = np.divmod(np.arange(lo, hi), self._page_size)
        return self._pages[page_idx].astype(np.int64) * self._page_size + offset

    def drop_all_but(self, kept: Sequence[tuple[int, int]], start: int) -> None:
        """Give back the pages from position ``start`` on that hold nothing of the intervals.

        Args:
            kept: Intervals of positions ``[lo, hi)``.
            start: Pages that begin before it stay.
        """
        first = -(-start // self._page_size)
        is_kept = self._holds(kept, self.num_pages)
        pages = self._pages[first : self.num_pages]
        dropped = ~is_kept[first:] & (pages != _NO_PAGE)
        if dropped.any():
            self._allocator.release(pages[dropped].tolist())
            pages[dropped] = _NO_PAGE
            self._has_dropped = True

    def _holds(self, kept: Sequence[tuple[int, int]], num_pages: int) -> npt.NDArray[np.bool_]:
        """Which pages hold something of the intervals."""
        holds = np.zeros(num_pages, bool)
        for lo, hi in kept:
            holds[lo // self._page_size : -(-hi // self._page_size)] = True
        return holds

    def held(self, start: int = 0) -> list[int]:
        """The pages from index ``start`` on that were not dropped."""
        pages = self._pages[start : self.num_pages]
        return pages[pages != _NO_PAGE].tolist()

    def release(self) -> None:
        """Give all pages back."""
        self._allocator.release(self.held())
        self._has_dropped = False
        self.num_pages = 0
