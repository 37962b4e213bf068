"""The words of an AttentionPlan as kernels read them, and the walk of its tiles.

The same relation as csrc/common/tile_walk.h, for all rows of a tile at once. Each row keeps a
cursor into the key intervals of its segment. A run starts at the lowest key under any cursor; the
rows whose cursor is there see a prefix of it, the others nothing, and only those cursors move on.
By keys it is the mirror image: a run ends at the lowest row end under any cursor, and each key is
seen by a suffix of it.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Words of PlanHeader.
TILE_ROWS = tl.constexpr(9)
NUM_TILES = tl.constexpr(10)
NUM_KEY_TILES = tl.constexpr(12)
SEQUENCES = tl.constexpr(15)
TILES = tl.constexpr(17)
SEGMENTS = tl.constexpr(18)
INTERVAL_PTR = tl.constexpr(19)
INTERVALS = tl.constexpr(20)
PAGES = tl.constexpr(21)
KEY_TILES = tl.constexpr(22)
KEY_SEGMENTS = tl.constexpr(23)
RANGE_PTR = tl.constexpr(24)
RANGES = tl.constexpr(25)

# Words per record, and of PlanSequence.
SEQUENCE_WORDS = tl.constexpr(9)
TILE_WORDS = tl.constexpr(7)
KEY_TILE_WORDS = tl.constexpr(4)
SEGMENT_WORDS = tl.constexpr(3)
ROW_BEGIN = tl.constexpr(0)
KEY_BEGIN = tl.constexpr(2)
SEGMENT_BEGIN = tl.constexpr(4)
NUM_SEGMENTS = tl.constexpr(5)
PAGE_BEGIN = tl.constexpr(6)
KEY_SEGMENT_BEGIN = tl.constexpr(7)
NUM_KEY_SEGMENTS = tl.constexpr(8)

CAUSAL = tl.constexpr(0)
NONE = tl.constexpr(2**31 - 1)
"""Instead of a key or a row where there is none."""
MOST_SEGMENTS = tl.constexpr(128)
"""What the rows or keys of one tile can reach: none of them is empty."""
SEARCH_STEPS = tl.constexpr(7)
"""Halvings that find one of them."""


@triton.jit
def task_of(turn, num_programs):
    """The task of this program's turn. Tasks come by falling work, so every second round of turns
    is dealt out backwards: whoever had the longest gets the shortest."""
    program = tl.program_id(0)
    backwards = turn % 2 == 1
    return turn * num_programs + tl.where(backwards, num_programs - 1 - program, program)


@triton.jit
def section(words, offset: tl.constexpr):
    """The records that start where the header says.

    Read anew by each call: so the compiler does not keep what a task needs at its start in
    registers until its end.
    """
    return words + tl.load(words + offset, volatile=True)


@triton.jit
def sequence_of(words, idx):
    return section(words, SEQUENCES) + idx * SEQUENCE_WORDS


@triton.jit
def first_ending_after(ends, stride: tl.constexpr, first, num, item, is_item):
    """For each item the first record from `first` on whose end lies after it; `num` if none.

    No record is empty, so item i of the tile is at most i records away."""
    lo = tl.where(is_item, first, num)
    hi = tl.minimum(num, first + MOST_SEGMENTS - 1) + tl.zeros_like(lo)
    for _ in tl.static_range(SEARCH_STEPS):
        mid = (lo + hi) >> 1
        searching = lo < hi
        before = tl.load(ends + stride * mid, mask=searching, other=0) <= item
        hi = tl.where(searching & ~before, mid, hi)
        lo = tl.where(searching & before, mid + 1, lo)
    return lo


# -- by rows --------------------------------------------------------------------------------------


@triton.jit
def start_rows(words, sequence, first_segment, row, is_row):
    """Cursors into the key intervals, where each row's end, and how many keys of the last interval
    a row does not see."""
    begin = tl.load(sequence + SEGMENT_BEGIN)
    num = tl.load(sequence + NUM_SEGMENTS)
    segments = section(words, SEGMENTS) + begin * SEGMENT_WORDS
    segment = first_ending_after(segments + 1, SEGMENT_WORDS, first_segment, num, row, is_row)
    record = segments + SEGMENT_WORDS * segment
    has = segment < num
    has = has & (tl.load(record, mask=has, other=0) <= row)
    q_hi = tl.load(record + 1, mask=has, other=0)
    kind = tl.load(record + 2, mask=has, other=0)
    ptr = section(words, INTERVAL_PTR) + begin + segment
    cursor = tl.load(ptr, mask=has, other=0)
    end = tl.load(ptr + 1, mask=has, other=0)
    return cursor, end, tl.where(has & (kind == CAUSAL), q_hi - 1 - row, 0)


@triton.jit
def next_run(intervals, cursor, end, behind):
    """The next run's first key (`NONE` after the last), how many of its keys each row sees, and
    the cursors after it."""
    lo = tl.load(intervals + 2 * cursor, mask=cursor < end, other=NONE)
    key_lo = tl.min(lo, axis=0)
    here = (cursor < end) & (lo == key_lo)
    hi = tl.load(intervals + 2 * cursor + 1, mask=here, other=0)
    hi -= tl.where(cursor + 1 == end, behind, 0)
    visible = tl.where(here, tl.maximum(hi - key_lo, 0), 0)
    return key_lo, visible, tl.where(here, cursor + 1, cursor)


# -- by keys --------------------------------------------------------------------------------------


@triton.jit
def start_keys(words, sequence, first_segment, key, is_key):
    """Cursors into the row ranges, where each key's end, and the key's place in its segment."""
    begin = tl.load(sequence + KEY_SEGMENT_BEGIN)
    num = tl.load(sequence + NUM_KEY_SEGMENTS)
    segments = section(words, KEY_SEGMENTS) + 2 * begin
    segment = first_ending_after(segments + 1, 2, first_segment, num, key, is_key)
    has = segment < num
    k_lo = tl.load(segments + 2 * segment, mask=has, other=0)
    has = has & (k_lo <= key)
    ptr = section(words, RANGE_PTR) + begin + segment
    cursor = tl.load(ptr, mask=has, other=0)
    end = tl.load(ptr + 1, mask=has, other=0)
    return cursor, end, key - k_lo


@triton.jit
def next_row_run(ranges, cursor, end, place):
    """One past the next run's last row (`NONE` after the last run), the first row that sees each
    key, and the cursors after it."""
    record = ranges + SEGMENT_WORDS * cursor
    hi = tl.load(record + 1, mask=cursor < end, other=NONE)
    row_hi = tl.min(hi, axis=0)
    here = (cursor < end) & (hi == row_hi)
    lo = tl.load(record, mask=here, other=0)
    kind = tl.load(record + 2, mask=here, other=1)
    lo += tl.where(kind == CAUSAL, place, 0)
    first_row = tl.where(here, tl.minimum(lo, row_hi), row_hi)
    return row_hi, first_row, tl.where(here, cursor + 1, cursor)
