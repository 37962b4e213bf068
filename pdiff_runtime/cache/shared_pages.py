"""Pages that requests have in common, as they begin alike."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from pdiff_runtime.cache.page_table import PageTable
from pdiff_runtime.ops.structures import PageAllocator

KeyOf = Callable[[int], npt.NDArray[np.int64]]
"""What decides the keys and values of page ``idx`` beside the pages before it."""


class SharedPages(PageTable):
    """The pages of one request: first those of the prefix cache, then its own."""

    def __init__(self, allocator: PageAllocator, page_size: int) -> None:
        super().__init__(allocator, page_size)
        self._serial: int | None = 0  # of the last page in the prefix cache; None: no more
        self._num_shared = 0
        self._num_seen = 0

    def adopt_prefix(self, key_of: KeyOf, end: int) -> int:
        """Take what pages the prefix cache has of positions ``0 .. end - 1``, whole ones only.

        Returns:
            How many positions they hold.
        """
        pages: list[int] = []
        serial = 0
        while (len(pages) + 1) * self._page_size <= end:
            found = self._allocator.find(serial, key_of(len(pages)))
            if found is None:
                break
            page, serial = found
            pages.append(page)
        self._allocator.retain(pages)
        self.adopt(pages)
        self._serial, self._num_shared = serial, len(pages)
        return len(pages) * self._page_size

    def publish(self, key_of: KeyOf, end: int) -> None:
        """Enter the pages that lie before position ``end`` into the prefix cache."""
        while self._serial is not None and (self._num_shared + 1) * self._page_size <= end:
            page, key = self.page(self._num_shared), key_of(self._num_shared)
            # 0 where another request was first. This one's pages stay its own from here: who holds
            # a page of the cache must hold those before it.
            self._serial = self._allocator.publish(page, self._serial, key) or None
            self._num_shared += self._serial is not None

    def take_dirty(self) -> list[int]:
        """Pages taken since the last call; they hold what others have left in them."""
        start = max(self._num_seen, self._num_shared)
        self._num_seen = self.num_pages
        return self.held(start)

    def private(self) -> list[int]:
        """Pages that no other request has seen."""
        return self.held(self._num_shared)

    def release(self) -> None:
        """Give all pages back."""
        super().release()
        self._serial, self._num_shared, self._num_seen = 0, 0, 0
