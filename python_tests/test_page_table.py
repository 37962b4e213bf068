"""The pages of one request: growing, dropping what nobody reads, giving back."""

from __future__ import annotations

import numpy as np
import pytest

from pdiff_runtime.cache import OutOfPagesError, PageAllocator, PageTable


@pytest.fixture
def allocator() -> PageAllocator:
    return PageAllocator(40)


def row_of(table: PageTable) -> list[int]:
    row = np.full(table.num_pages + 1, -1, np.int32)
    table.fill_row(row)
    assert row[-1] == -1
    return row[:-1].tolist()


def test_a_page_table_grows_and_gives_back():
    allocator = PageAllocator(4)
    table, other = PageTable(allocator, 16), PageTable(allocator, 16)
    table.grow(16)
    other.grow(1)
    table.grow(33)
    table.grow(5)
    assert row_of(table) == [0, 2, 3]
    assert [table.slot(position) for position in (0, 15, 16, 32)] == [0, 15, 32, 48]
    with pytest.raises(OutOfPagesError, match="pages: 1 asked for, 0 free"):
        table.grow(49)
    assert row_of(table) == [0, 2, 3]
    table.release()
    table.release()
    assert table.num_pages == 0
    assert allocator.num_free == 3


def test_slots_are_those_of_each_position(allocator):
    table = PageTable(allocator, 16)
    table.grow(20 * 16)
    assert table.slots(5, 300).tolist() == [table.slot(p) for p in range(5, 300)]
    assert table.slots(7, 7).tolist() == []


def test_adopted_pages_come_first_and_are_given_back(allocator):
    pages = allocator.allocate(2)
    table = PageTable(allocator, 16)
    table.adopt(pages)
    table.grow(33)
    assert row_of(table)[:2] == pages
    assert len(table.held()) == 3
    assert table.held(2) == [table.page(2)]
    table.release()
    assert allocator.num_free == 40


def test_only_pages_that_hold_nothing_kept_are_dropped(allocator):
    table = PageTable(allocator, 16)
    table.grow(160)
    before = row_of(table)
    # Page 1 begins before the start, 3 and 4 hold kept positions, 9 is the end of the last.
    table.drop_all_but([(50, 70), (150, 160)], start=20)
    assert table.held() == [before[i] for i in (0, 1, 3, 4, 9)]
    assert row_of(table) == [before[i] if i in (0, 1, 3, 4, 9) else before[0] for i in range(10)]
    assert allocator.num_free == 35
    table.drop_all_but([(150, 160)], start=20)
    assert table.held() == [before[i] for i in (0, 1, 9)]
    table.grow(200)
    assert len(table.held()) == 6
    table.release()
    assert allocator.num_free == 40
