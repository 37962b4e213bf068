"""Which page belongs to whom."""

from __future__ import annotations


class OutOfPagesError(RuntimeError):
    """More pages were asked for than are free."""


class PageAllocator:
    """Hands out page numbers ``0 .. num_pages - 1``, last freed first."""

    def __init__(self, num_pages: int) -> None:
        if num_pages < 1:
            raise ValueError(f"num_pages: expected >= 1, got {num_pages}")
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take ``count`` pages.

        Raises:
            OutOfPagesError: Fewer are free; none is taken.
        """
        if count > len(self._free):
            raise OutOfPagesError(f"pages: {count} asked for, {len(self._free)} free")
        return [self._free.pop() for _ in range(count)]

    def free(self, pages: list[int]) -> None:
        """Give pages back.

        Raises:
            ValueError: A page that is already free or does not exist; none is given back.
        """
        if len({*pages, *self._free}) < len(pages) + len(self._free) or any(
            not 0 <= page < self.num_pages for page in pages
        ):
            raise ValueError(f"pages: {pages} are not all held")
        self._free += reversed(pages)


class PageTable:
    """The pages of one request, in the order of its positions."""

    def __init__(self, allocator: PageAllocator, page_size: int) -> None:
        self._allocator = allocator
        self._page_size = page_size
        self.pages: list[int] = []

    def grow(self, num_tokens: int) -> None:
        """Make room for positions ``0 .. num_tokens - 1``."""
        missing = -(-num_tokens // self._page_size) - len(self.pages)
        if missing > 0:
            self.pages += self._allocator.allocate(missing)

    def slot(self, position: int) -> int:
        """Where the key and value of ``position`` lie: page * page_size + offset."""
        return self.pages[position // self._page_size] * self._page_size + (
            position % self._page_size
        )

    def release(self) -> None:
        """Give all pages back."""
        self._allocator.free(self.pages)
        self.pages = []
