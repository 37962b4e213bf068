"""A request's pages: which of them others share, which are its own, and which are dirty."""

from __future__ import annotations

import numpy as np

from pdiff_runtime.cache import PageAllocator, SharedPages

SIZE = 4


def key_of(page_idx: int) -> np.ndarray:
    return np.arange(page_idx * SIZE, (page_idx + 1) * SIZE)


def test_pages_of_the_prefix_cache_are_neither_dirty_nor_private():
    allocator = PageAllocator(16)
    first, second = SharedPages(allocator, SIZE), SharedPages(allocator, SIZE)
    assert first.adopt_prefix(key_of, 12) == 0
    first.grow(12)
    first.publish(key_of, 11)  # two whole pages
    assert first.private() == first.held(2)
    assert second.adopt_prefix(key_of, 7) == 4
    second.release()
    assert second.adopt_prefix(key_of, 12) == 8
    assert second.held() == first.held()[:2]
    assert second.take_dirty() == []
    second.grow(13)
    assert second.take_dirty() == second.private() == second.held(2)
    assert second.take_dirty() == []
    second.grow(20)
    assert second.take_dirty() == second.held(4)
    second.publish(key_of, 12)
    third = SharedPages(allocator, SIZE)
    assert third.adopt_prefix(key_of, 12) == 12
    assert third.held() == second.held()[:3]
    for table in (first, second, third):
        allocator.check_integrity()
        table.release()
    assert allocator.num_free == allocator.num_pages


def test_a_page_that_another_entered_first_ends_the_shared_ones():
    allocator = PageAllocator(16)
    tables = [SharedPages(allocator, SIZE) for _ in range(2)]
    for table in tables:
        table.adopt_prefix(key_of, 12)
        table.grow(12)
    for table in tables:
        table.publish(key_of, 4)
    tables[1].publish(key_of, 12)
    assert tables[1].private() == tables[1].held()
    tables[0].publish(key_of, 8)
    assert tables[0].private() == tables[0].held(2)


def test_after_release_all_begins_anew():
    allocator = PageAllocator(16)
    pages, other = SharedPages(allocator, SIZE), SharedPages(allocator, SIZE)
    other.grow(8)
    other.publish(key_of, 8)
    pages.grow(8)
    assert pages.take_dirty() == pages.held()
    pages.publish(key_of, 8)  # too late
    assert pages.private() == pages.held()
    pages.release()
    other.release()
    while allocator.num_free > 0:  # the prefix cache is forgotten
        other.grow((other.num_pages + 1) * SIZE)
    other.release()
    pages.grow(8)
    assert pages.take_dirty() == pages.held()
    pages.publish(key_of, 8)
    assert pages.private() == []
    pages.release()
    pages.grow(8)
    assert pages.private() == pages.held()
