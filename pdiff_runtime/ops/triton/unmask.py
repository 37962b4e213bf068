"""unmask_ in three launches, one more for bans, one for some rules: nothing is read back.

score   one program per row and segment of the vocabulary. Each lane carries what its logits add up
        to, the maximum, the sums of 2^d and d 2^d with d = (logit - max) / temperature * log2(e),
        and the best of Gumbel-max; the lanes meet once, at the end.
finish  one program per row, in turns: joins the segments, finds what top-p and top-k keep, and
        gives confidence, candidate and is_nan. The kept set is everything above a logit, found by
        halving the range of float32 bit patterns over a list of the few tokens that can be in it.
limit   one program per block of rows, for a rule that ends at the first position which is not sure:
        lowers the quota of the span to those before it.
select  one program per block of rows: a row's rank is the number of rows of its span before it.
Bits    segments are of fixed length, so a row's result depends on no other row.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pdiff_runtime.ops.triton.gumbel import POSITION, TOKEN, gumbel, random_words
from pdiff_runtime.ops.triton.launch import launches_on_its_device, multiprocessors

ENTROPY, PROBABILITY, MARGIN = (tl.constexpr(code) for code in range(3))
"""What a position may be ranked by, and the rules that write all of the quota."""
THRESHOLD, FACTOR, ENTROPY_BUDGET = (tl.constexpr(code) for code in range(3, 6))
CONFIDENCE_OF_RULE = (ENTROPY, PROBABILITY, MARGIN, PROBABILITY, PROBABILITY, ENTROPY)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
FLOAT_MAX = tl.constexpr(3.4028234663852886e38)
MIN_TEMPERATURE = tl.constexpr(1e-20)
NO_ID = tl.constexpr(2**31 - 1)

LANES = 256
SEGMENT = 32768
"""Logits that one program of `score` reads."""
LIST_BLOCK = 2048
SPAN_BLOCK = 256
SELECT_ROWS = 64

# What a segment leaves: floats, then ids.
MAX, SECOND, SUM, WEIGHTED, DRAW = (tl.constexpr(i) for i in range(5))
NUM_FLOATS = tl.constexpr(5)
ARGMAX, DRAW_ID = (tl.constexpr(i) for i in range(2))
NUM_IDS = tl.constexpr(2)


# -- settings --------------------------------------------------------------------------------------


@triton.jit
def _span_of(cu_rows_span, num_spans, row, BLOCK: tl.constexpr):
    """The span of a row: how many end at or before it. `num_spans` for a row of none."""
    count = tl.zeros([BLOCK], tl.int32)
    for first in range(0, num_spans, BLOCK):
        span = first + tl.arange(0, BLOCK)
        end = tl.load(cu_rows_span + 1 + span, mask=span < num_spans, other=NO_ID)
        count += (end <= row).to(tl.int32)
    return tl.sum(count, axis=0)


@triton.jit
def _setting(values, value, span, num_spans):
    """Of one span: `value` unless every span has its own; 0 for a row of none."""
    if values is not None:
        value = tl.load(values + span, mask=span < num_spans, other=0)
    return value


@triton.jit
def _seed_of(seeds, row):
    """0 without seeds."""
    seed = row * 0
    if seeds is not None:
        seed = tl.load(seeds + row)
    return seed


@triton.jit
def _inverse(temperature):
    """1 at temperature 0."""
    return tl.where(temperature > 0, 1.0 / tl.maximum(temperature, MIN_TEMPERATURE), 1.0)


# -- sums relative to a maximum --------------------------------------------------------------------


@triton.jit
def _distance(x, largest, scale):
    """(x - largest) * scale, where neither may be finite; NaN stays NaN."""
    d = (x - tl.maximum(largest, -FLOAT_MAX)) * scale
    return tl.where(d < -1000.0, -1000.0, d)


@triton.jit
def _raised(total, weighted, largest, new_largest, scale):
    """The two sums relative to a larger maximum."""
    d = _distance(largest, new_largest, scale)
    factor = tl.exp2(d)
    return total * factor, (weighted + d * total) * factor


@triton.jit
def _ordered(x):
    """float32 as int32 of the same order, and back."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _float_of(ordered):
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _second_of(largest, second):
    """The second largest of all that several lanes saw, each with its two largest."""
    best = tl.max(largest, axis=0)
    num = tl.sum((largest == best).to(tl.int32), axis=0)
    others = tl.max(tl.where(largest == best, float("-inf"), largest), axis=0)
    return tl.maximum(tl.where(num > 1, best, others), tl.max(second, axis=0))


# -- bans ------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["num_banned", "vocab_size"])
def ban_kernel(banned_ids, bans, num_banned, vocab_size, BLOCK: tl.constexpr):
    """Sets the bits of banned ids; ids out of range have none."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    idx = tl.load(banned_ids + i, mask=i < num_banned, other=-1)
    is_id = (idx >= 0) & (idx < vocab_size)
    bit = (1 << (idx % 32)).to(tl.int32)
    tl.atomic_or(bans + tl.where(is_id, idx // 32, 0), bit, mask=is_id)


# -- score -----------------------------------------------------------------------------------------


@triton.jit
def _load_lanes(logits, bans, lane_first, idx, end):
    """``[LANES, VEC]`` logits at `idx`; a lane's are within one word of bans."""
    x = tl.load(logits + idx, mask=idx < end, other=float("-inf")).to(tl.float32)
    if bans is not None:
        word = tl.load(bans + lane_first // 32, mask=lane_first < end, other=0)
        x = tl.where(((word[:, None] >> (idx % 32)) & 1) != 0, float("-inf"), x)
    return x


@triton.jit(do_not_specialize=["num_spans", "top_k", "step_idx"])
def score_kernel(
    logits, cu_rows_span, bans, seeds, random_position, floats, ids, lane_max,
    temperatures, temperature, top_ps, top_p, top_ks, top_k, step_idxs, step_idx,
    logits_stride, vocab_size, num_spans,
    DRAWS: tl.constexpr, FILTERS: tl.constexpr, NEEDS_SECOND: tl.constexpr, LANES: tl.constexpr,
    VEC: tl.constexpr, SEGMENT: tl.constexpr, SPAN_BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes floats and ids ``[rows, segments, ...]`` and, to filter, lane_max ``[..., LANES]``."""
    row = tl.program_id(0).to(tl.int64)
    segment = tl.program_id(1)
    span = _span_of(cu_rows_span, num_spans, row, SPAN_BLOCK)
    t = _setting(temperatures, temperature, span, num_spans)
    inverse = _inverse(t)
    scale = inverse * LOG2_E
    draws = False
    if DRAWS:
        draws = t > 0
        if FILTERS:  # a row that is filtered draws from what is left
            draws = draws & (_setting(top_ps, top_p, span, num_spans) >= 1.0)
            k = _setting(top_ks, top_k, span, num_spans)
            draws = draws & ((k <= 0) | (k >= vocab_size))
        step = _setting(step_idxs, step_idx, span, num_spans)
        seed = _seed_of(seeds, row)
        position = tl.load(random_position + row)

    lane = tl.arange(0, LANES)
    element = tl.arange(0, VEC)
    largest = tl.full([LANES], float("-inf"), tl.float32)
    second = tl.full([LANES], float("-inf"), tl.float32)
    total = tl.zeros([LANES], tl.float32)
    weighted = tl.zeros([LANES], tl.float32)
    where_largest = tl.zeros([LANES], tl.int32)
    draw = tl.full([LANES], float("-inf"), tl.float32)
    draw_id = tl.full([LANES], NO_ID, tl.int32)
    begin = segment * SEGMENT
    end = tl.minimum(begin + SEGMENT, vocab_size)
    base = logits + row * logits_stride
    for first in tl.range(begin, end, LANES * VEC, loop_unroll_factor=2):
        lane_first = first + lane * VEC
        idx = lane_first[:, None] + element[None, :]
        x = _load_lanes(base, bans, lane_first, idx, end)
        block_max = tl.max(x, axis=1)
        if NEEDS_SECOND:
            is_max = x == block_max[:, None]
            rest = tl.max(tl.where(is_max, float("-inf"), x), axis=1)
            several = tl.sum(is_max.to(tl.int32), axis=1) > 1
            rest = tl.where(several, block_max, rest)
            second = tl.maximum(tl.maximum(second, rest), tl.minimum(largest, block_max))
        where_largest = tl.where(block_max > largest, lane_first, where_largest)
        new_largest = tl.maximum(largest, block_max)
        total, weighted = _raised(total, weighted, largest, new_largest, scale)
        largest = new_largest
        d = _distance(x, largest[:, None], scale)
        p = tl.exp2(d)
        total += tl.sum(p, axis=1)
        weighted += tl.sum(p * d, axis=1)
        if DRAWS:  # noqa: SIM102 (one is decided when compiling, the other by the row)
            if draws:
                group = (lane_first // 4)[:, None] + tl.arange(0, VEC // 4)[None, :]
                w0, w1, w2, w3 = random_words(seed, position, step, TOKEN, group)
                words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
                key = x * inverse + gumbel(words)
                best = tl.max(key, axis=1)
                best_id = tl.min(tl.where(key == best[:, None], idx, NO_ID), axis=1)
                draw_id = tl.where(best > draw, best_id, draw_id)
                draw = tl.maximum(draw, best)

    num_segments = tl.num_programs(1)
    if FILTERS:
        slot = (row * num_segments + segment) * LANES + lane
        tl.store(lane_max + slot, largest)
    # the first id of the maximum, read again where it was seen
    row_max = tl.max(largest, axis=0)
    idx = where_largest[:, None] + element[None, :]
    x = _load_lanes(base, bans, where_largest, idx, end)
    holds = (largest == row_max)[:, None] & (idx < end)
    argmax = tl.min(tl.min(tl.where(holds & (x == row_max), idx, NO_ID), axis=1), axis=0)
    total, weighted = _raised(total, weighted, largest, row_max, scale)
    to = floats + (row * num_segments + segment) * NUM_FLOATS
    tl.store(to + MAX, row_max)
    if NEEDS_SECOND:
        tl.store(to + SECOND, _second_of(largest, second))
    tl.store(to + SUM, tl.sum(total.to(tl.float64), axis=0).to(tl.float32))
    tl.store(to + WEIGHTED, tl.sum(weighted.to(tl.float64), axis=0).to(tl.float32))
    to_ids = ids + (row * num_segments + segment) * NUM_IDS
    tl.store(to_ids + ARGMAX, argmax)
    if DRAWS:
        best = tl.max(draw, axis=0)
        tl.store(to + DRAW, best)
        best_id = tl.where((draw == best) & (draw > float("-inf")), draw_id, NO_ID)
        tl.store(to_ids + DRAW_ID, tl.min(best_id, axis=0))


# -- finish ----------------------------------------------------------------------------------------


@triton.jit
def _kept_bound(
    lane_max, num_lanes, vocab_size, row_max, total, scale, top_p, top_k, BLOCK: tl.constexpr
):
    """A logit below which no kept token lies: what keeps the list short."""
    bound = tl.full([], -FLOAT_MAX, tl.float32)
    if top_p < 1.0:
        # Tokens with 2^d < (1 - top_p) sum / vocab_size weigh less than 1 - top_p together. One bit
        # of slack for rounding.
        tail = (1.0 - top_p) * total / vocab_size
        bound = tl.maximum(bound, row_max + (tl.log2(tail) - 1.0) / scale)
    if (top_k > 0) & (top_k <= num_lanes):
        # Lane maxima are tokens too: the k-th largest of them is at most the k-th largest of all.
        lane = tl.arange(0, BLOCK)
        x = tl.load(lane_max + lane, mask=lane < num_lanes, other=float("-inf"))
        lo = _ordered(bound).to(tl.int64)
        hi = _ordered(row_max).to(tl.int64)
        for _ in range(20):
            mid = (lo + hi + 1) >> 1
            reached = tl.sum((x >= _float_of(mid.to(tl.int32))).to(tl.int32), axis=0) >= top_k
            lo = tl.where(reached, mid, lo)
            hi = tl.where(reached, hi, tl.maximum(mid - 1, lo))
        bound = _float_of(lo.to(tl.int32))
    return bound


@triton.jit
def _collect(kept, logits, bans, bound, vocab_size, BLOCK: tl.constexpr):
    """Lists the ids of logits that reach the bound, ascending; returns how many."""
    num = 0
    for first in range(0, vocab_size, BLOCK):
        idx = first + tl.arange(0, BLOCK)
        x = tl.load(logits + idx, mask=idx < vocab_size, other=float("-inf")).to(tl.float32)
        if bans is not None:
            word = tl.load(bans + idx // 32, mask=idx < vocab_size, other=0)
            x = tl.where(((word >> (idx % 32)) & 1) != 0, float("-inf"), x)
        chosen = (x >= bound).to(tl.int32)
        tl.store(kept + num + tl.cumsum(chosen, axis=0) - chosen, idx, mask=chosen != 0)
        num += tl.sum(chosen, axis=0)
    tl.debug_barrier()  # what some threads listed, others read
    return num


@triton.jit
def _load_kept(kept, logits, first, num, BLOCK: tl.constexpr):
    """Ids and logits of one block of the list."""
    i = first + tl.arange(0, BLOCK)
    idx = tl.load(kept + i, mask=i < num, other=0)
    x = tl.load(logits + idx, mask=i < num, other=float("-inf")).to(tl.float32)
    return idx, x


@triton.jit
def _above(kept, logits, num, pivot, row_max, scale, BLOCK: tl.constexpr):
    """How many of the list reach the pivot, and their mass."""
    count = tl.zeros([BLOCK], tl.int32)
    mass = tl.zeros([BLOCK], tl.float32)
    for first in range(0, num, BLOCK):
        _, x = _load_kept(kept, logits, first, num, BLOCK)
        count += (x >= pivot).to(tl.int32)
        mass += tl.where(x >= pivot, tl.exp2(_distance(x, row_max, scale)), 0.0)
    return tl.sum(count, axis=0), tl.sum(mass.to(tl.float64), axis=0)


@triton.jit
def _filtered(
    kept, logits, bans, lane_max, num_lanes, vocab_size, row_max, argmax, total, scale, inverse,
    top_p, top_k, seed, position, step, draws,
    DRAWS: tl.constexpr, BLOCK: tl.constexpr, LANES_BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum, weighted sum, second largest logit and drawn id of what top-p and top-k keep."""
    bound = _kept_bound(
        lane_max, num_lanes, vocab_size, row_max, total.to(tl.float32), scale, top_p, top_k,
        LANES_BLOCK,
    )  # fmt: skip
    num = _collect(kept, logits, bans, bound, vocab_size, BLOCK)

    # The largest logit at which one of the goals is reached.
    goal_mass = tl.where(top_p < 1.0, top_p * total, float("inf"))
    goal_count = tl.where(top_k > 0, top_k, NO_ID)
    lo = _ordered(bound).to(tl.int64)
    hi = _ordered(row_max).to(tl.int64)
    while lo < hi:
        mid = (lo + hi + 1) >> 1
        count, mass = _above(kept, logits, num, _float_of(mid.to(tl.int32)), row_max, scale, BLOCK)
        reached = (count >= goal_count) | (mass >= goal_mass)
        lo = tl.where(reached, mid, lo)
        hi = tl.where(reached, hi, mid - 1)
    last = _float_of(lo.to(tl.int32))
    # Of those that equal it top-p keeps the first few, top-k all.
    _, mass = _above(kept, logits, num, last, row_max, scale, BLOCK)
    _, mass_before = _above(
        kept, logits, num, _float_of((lo + 1).to(tl.int32)), row_max, scale, BLOCK
    )
    weight = tl.exp2(_distance(last, row_max, scale)).to(tl.float64)
    most = tl.ceil((goal_mass - mass_before) / weight)
    most = tl.where(mass >= goal_mass, tl.maximum(most, 1.0), float("inf"))

    sums = tl.zeros([BLOCK], tl.float32)
    weighted = tl.zeros([BLOCK], tl.float32)
    second = tl.full([BLOCK], float("-inf"), tl.float32)
    draw = tl.full([BLOCK], float("-inf"), tl.float32)
    draw_id = tl.full([BLOCK], NO_ID, tl.int32)
    num_equal = 0
    for first in range(0, num, BLOCK):
        idx, x = _load_kept(kept, logits, first, num, BLOCK)
        equal = (x == last).to(tl.int32)
        place = num_equal + tl.cumsum(equal, axis=0) - equal
        num_equal += tl.sum(equal, axis=0)
        x = tl.where((x > last) | ((equal != 0) & (place < most)), x, float("-inf"))
        d = _distance(x, row_max, scale)
        p = tl.exp2(d)
        sums += p
        weighted += p * d
        second = tl.maximum(second, tl.where(idx == argmax, float("-inf"), x))
        if DRAWS:
            w0, w1, w2, w3 = random_words(seed, position, step, TOKEN, idx // 4)
            even = tl.where(idx % 4 == 0, w0, w2)
            odd = tl.where(idx % 4 == 1, w1, w3)
            key = x * inverse + gumbel(tl.where(idx % 2 == 0, even, odd))
            key = tl.where(draws, key, float("-inf"))
            draw_id = tl.where(key > draw, idx, draw_id)
            draw = tl.maximum(draw, key)
    best = tl.max(draw, axis=0)
    draw_id = tl.min(tl.where((draw == best) & (draw > float("-inf")), draw_id, NO_ID), axis=0)
    return (
        tl.sum(sums.to(tl.float64), axis=0),
        tl.sum(weighted.to(tl.float64), axis=0),
        tl.max(second, axis=0),
        draw_id,
    )


@triton.jit(do_not_specialize=["num_rows", "num_spans", "num_segments", "top_k", "step_idx"])
def finish_kernel(
    logits, cu_rows_span, bans, seeds, random_position, floats, ids, lane_max, lists,
    confidence, candidate, is_nan, rank_key,
    temperatures, temperature, top_ps, top_p, top_ks, top_k, alg_temps, alg_temp,
    step_idxs, step_idx,
    logits_stride, vocab_size, num_rows, num_spans, num_segments,
    CONFIDENCE: tl.constexpr, DRAWS: tl.constexpr, FILTERS: tl.constexpr, LANES: tl.constexpr,
    SEGMENTS: tl.constexpr, LANES_BLOCK: tl.constexpr, LIST_BLOCK: tl.constexpr,
    SPAN_BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes confidence, candidate, is_nan and rank_key ``[rows]``; `lists` holds ids, one list
    ``[vocab_size]`` for each program."""
    num_programs = tl.num_programs(0)
    for turn in range(tl.cdiv(num_rows, num_programs)):
        row = (turn * num_programs + tl.program_id(0)).to(tl.int64)
        if row < num_rows:
            span = _span_of(cu_rows_span, num_spans, row, SPAN_BLOCK)
            t = _setting(temperatures, temperature, span, num_spans)
            step = _setting(step_idxs, step_idx, span, num_spans)
            inverse = _inverse(t)
            scale = inverse * LOG2_E
            base = logits + row * logits_stride

            segment = tl.arange(0, SEGMENTS)
            is_segment = segment < num_segments
            at = floats + (row * num_segments + segment) * NUM_FLOATS
            largest = tl.load(at + MAX, mask=is_segment, other=float("-inf"))
            row_max = tl.max(largest, axis=0)
            total = tl.load(at + SUM, mask=is_segment, other=0.0)
            weighted = tl.load(at + WEIGHTED, mask=is_segment, other=0.0)
            total, weighted = _raised(total, weighted, largest, row_max, scale)
            total = tl.sum(total.to(tl.float64), axis=0)
            weighted = tl.sum(weighted.to(tl.float64), axis=0)
            second = row_max
            if CONFIDENCE == MARGIN:
                second = tl.load(at + SECOND, mask=is_segment, other=float("-inf"))
                second = _second_of(largest, second)
            at_ids = ids + (row * num_segments + segment) * NUM_IDS
            argmax = tl.load(at_ids + ARGMAX, mask=is_segment, other=NO_ID)
            argmax = tl.min(tl.where(largest == row_max, argmax, NO_ID), axis=0)
            draw_id = tl.full([], NO_ID, tl.int32)
            if DRAWS:
                draw = tl.load(at + DRAW, mask=is_segment, other=float("-inf"))
                drawn = tl.load(at_ids + DRAW_ID, mask=is_segment, other=NO_ID)
                draw_id = tl.min(tl.where(draw == tl.max(draw, axis=0), drawn, NO_ID), axis=0)

            is_distribution = total > 0.0  # neither NaN nor nothing
            if FILTERS:
                p = _setting(top_ps, top_p, span, num_spans)
                k = _setting(top_ks, top_k, span, num_spans)
                k = tl.where(k < vocab_size, k, 0)
                if is_distribution & ((p < 1.0) | (k > 0)):
                    num_lanes = num_segments * LANES
                    total, weighted, second, draw_id = _filtered(
                        lists + tl.program_id(0).to(tl.int64) * vocab_size, base, bans,
                        lane_max + row * num_lanes, num_lanes, vocab_size, row_max, argmax, total,
                        scale, inverse, p, k, _seed_of(seeds, row),
                        tl.load(random_position + row), step, t > 0,
                        DRAWS, LIST_BLOCK, LANES_BLOCK,
                    )  # fmt: skip

            mass = total.to(tl.float32)
            has_drawn = draw_id != NO_ID  # not where every logit / temperature overflows
            if CONFIDENCE == ENTROPY:
                value = LN_2 * ((weighted / total).to(tl.float32) - tl.log2(mass))
            elif CONFIDENCE == MARGIN:
                value = (1.0 - tl.exp2(_distance(second, row_max, scale))) / mass
            else:
                x = tl.load(base + draw_id, mask=has_drawn, other=0.0).to(tl.float32)
                x = tl.where(has_drawn, x, row_max)
                value = tl.exp2(_distance(x, row_max, scale)) / mass
            value = tl.where(is_distribution, value, float("nan"))
            chosen = tl.where(has_drawn, draw_id, argmax)
            tl.store(confidence + row, value)
            tl.store(candidate + row, tl.where(is_distribution, chosen, -1).to(tl.int64))
            tl.store(is_nan + row, (~is_distribution).to(tl.uint8))
            softness = _setting(alg_temps, alg_temp, span, num_spans)
            if softness > 0:
                group = tl.full([], 0, tl.int32)
                position = tl.load(random_position + row)
                word, _, _, _ = random_words(_seed_of(seeds, row), position, step, POSITION, group)
                value = value / softness + gumbel(word)
            tl.store(rank_key + row, value)


# -- select ----------------------------------------------------------------------------------------


@triton.jit
def _ranked(
    rank_key, confidence, cu_rows_span, row, num_rows, num_spans,
    ADDS_ENTROPY: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Of each row: its span, whether it has one, how many rows of it rank before this one, and
    their entropies added up, if wanted, in the order of rows."""
    is_row = row < num_rows
    span = tl.zeros([ROWS], tl.int32)
    for first in range(0, num_spans, ROWS):
        other = first + tl.arange(0, ROWS)
        end = tl.load(cu_rows_span + 1 + other, mask=other < num_spans, other=NO_ID)
        span += tl.sum((end[None, :] <= row[:, None]).to(tl.int32), axis=1)
    in_span = is_row & (span < num_spans)
    begin = tl.load(cu_rows_span + span, mask=in_span, other=num_rows)
    end = tl.load(cu_rows_span + 1 + span, mask=in_span, other=0)
    key = tl.load(rank_key + row, mask=is_row, other=0.0)

    rank = tl.zeros([ROWS], tl.int32)
    entropy_before = tl.zeros([ROWS], tl.float64)
    first_row = tl.maximum(tl.min(begin, axis=0), 0)
    last_row = tl.minimum(tl.max(end, axis=0), num_rows)
    for first in range(first_row, last_row, ROWS):
        other = first + tl.arange(0, ROWS)
        is_other = other < num_rows
        other_key = tl.load(rank_key + other, mask=is_other, other=float("-inf"))[None, :]
        if ADDS_ENTROPY:
            entropy = -tl.load(confidence + other, mask=is_other, other=0.0).to(tl.float64)[None, :]
        other = other[None, :]
        before = (other_key > key[:, None]) | ((other_key == key[:, None]) & (other < row[:, None]))
        before = before & (other >= begin[:, None]) & (other < end[:, None])
        rank += tl.sum(before.to(tl.int32), axis=1)
        if ADDS_ENTROPY:
            entropy_before += tl.sum(tl.where(before, entropy, 0.0), axis=1)
    return span, in_span & (row >= begin), rank, entropy_before  # none before the first span


@triton.jit
def _threshold_of(thresholds, threshold, span, in_span):
    """Of each row."""
    if thresholds is not None:
        threshold = tl.load(thresholds + span, mask=in_span, other=0.0)
    return threshold


@triton.jit(do_not_specialize=["num_rows", "num_spans"])
def limit_kernel(
    num_unmask, cu_rows_span, rank_key, confidence, is_nan, thresholds, threshold,
    num_rows, num_spans, RULE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Lowers num_unmask, for a rule that writes a prefix."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    span, in_span, rank, entropy_before = _ranked(
        rank_key, confidence, cu_rows_span, row, num_rows, num_spans, RULE == ENTROPY_BUDGET, ROWS
    )
    limit = tl.maximum(_threshold_of(thresholds, threshold, span, in_span), 0.0)
    if RULE == FACTOR:  # ranks from 1 in the formula
        p = tl.load(confidence + row, mask=in_span, other=1.0).to(tl.float64)
        is_sure = (rank + 2).to(tl.float64) * (1.0 - p) < limit
    else:
        is_sure = entropy_before <= limit
    has_rank = in_span & (tl.load(is_nan + row, mask=in_span, other=1) == 0)
    tl.atomic_min(num_unmask + span, rank, mask=has_rank & (rank > 0) & ~is_sure)


@triton.jit(do_not_specialize=["num_rows", "num_spans", "total_tokens"])
def select_kernel(
    token_ids, row_position, cu_rows_span, num_unmask, rank_key, confidence, candidate, is_written,
    num_masked, thresholds, threshold, num_rows, num_spans, total_tokens,
    RULE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Writes token_ids and is_written, and counts. Positions out of range are not written."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = row < num_rows
    span, in_span, rank, _ = _ranked(
        rank_key, confidence, cu_rows_span, row, num_rows, num_spans, False, ROWS
    )
    chosen = in_span & (rank < tl.load(num_unmask + span, mask=in_span, other=0))
    if RULE == THRESHOLD:
        least = _threshold_of(thresholds, threshold, span, in_span)
        is_sure = tl.load(confidence + row, mask=is_row, other=0.0) >= least
        chosen = chosen & ((rank == 0) | is_sure)
    token = tl.load(candidate + row, mask=is_row, other=-1)
    position = tl.load(row_position + row, mask=is_row, other=-1)
    chosen = chosen & (token >= 0) & (position >= 0) & (position < total_tokens)
    tl.store(token_ids + position, token, mask=chosen)
    tl.store(is_written + row, chosen.to(tl.uint8), mask=is_row)
    if num_masked is not None:
        tl.atomic_add(num_masked + span, -1, mask=chosen)


# -- host ------------------------------------------------------------------------------------------


def _bans_of(banned_ids: Tensor | None, vocab_size: int) -> Tensor | None:
    """A bit for each id, in int32 words."""
    if banned_ids is None or len(banned_ids) == 0:
        return None
    bans = banned_ids.new_zeros(triton.cdiv(vocab_size, 32), dtype=torch.int32)
    block = 256
    ban_kernel[(triton.cdiv(len(banned_ids), block),)](
        banned_ids, bans, len(banned_ids), vocab_size, block
    )
    return bans


def _pair(setting: Any, kind: type = float) -> tuple[Tensor | None, float]:
    """How a setting crosses to a kernel: the number counts where there is no tensor."""
    return (setting, kind()) if isinstance(setting, Tensor) else (None, kind(setting))


@launches_on_its_device
def unmask(
    token_ids: Tensor,
    logits: Tensor,
    row_position: Tensor,
    cu_rows_span: Tensor,
    num_unmask: Tensor,
    confidence: Tensor,
    candidate: Tensor,
    is_nan: Tensor,
    is_written: Tensor,
    *,
    rule_code: int,
    threshold: float | Tensor | None,
    temperature: float | Tensor,
    top_p: float | Tensor,
    top_k: int | Tensor,
    alg_temp: float | Tensor,
    step_idx: int | Tensor,
    banned_ids: Tensor | None,
    seeds: Tensor | None,
    positions: Tensor | None,
    num_masked: Tensor | None,
) -> None:
    """See :func:`pdiff_runtime.ops.unmask_`, which has checked what it can; fills statistics."""
    num_rows, vocab_size = logits.shape
    num_spans = len(num_unmask)
    if num_rows == 0:
        return
    draws = isinstance(temperature, Tensor) or temperature > 0
    filters = (
        isinstance(top_p, Tensor)
        or top_p < 1
        or isinstance(top_k, Tensor)
        or 0 < top_k < vocab_size
    )
    ranked_by = CONFIDENCE_OF_RULE[rule_code].value
    bans = _bans_of(banned_ids, vocab_size)
    random_position = row_position if positions is None else positions
    num_segments = triton.cdiv(vocab_size, SEGMENT)
    floats = logits.new_empty(num_rows, num_segments, NUM_FLOATS.value, dtype=torch.float32)
    ids = logits.new_empty(num_rows, num_segments, NUM_IDS.value, dtype=torch.int32)
    rank_key = torch.empty_like(confidence)
    lane_max = lists = None
    num_programs = num_rows
    if filters:
        num_programs = min(num_rows, multiprocessors(logits.device).num)
        lane_max = logits.new_empty(num_rows, num_segments, LANES, dtype=torch.float32)
        lists = logits.new_empty(num_programs, vocab_size, dtype=torch.int32)

    shared = (logits, cu_rows_span, bans, seeds, random_position, floats, ids, lane_max)
    score_kernel[(num_rows, num_segments)](
        *shared, *_pair(temperature), *_pair(top_p), *_pair(top_k, int), *_pair(step_idx, int),
        logits.stride(0), vocab_size, num_spans,
        draws, filters, ranked_by == MARGIN.value, LANES, 16 // logits.element_size(), SEGMENT,
        SPAN_BLOCK, num_warps=LANES // 32,
    )  # fmt: skip
    finish_kernel[(num_programs,)](
        *shared, lists, confidence, candidate, is_nan.view(torch.uint8), rank_key,
        *_pair(temperature), *_pair(top_p), *_pair(top_k, int), *_pair(alg_temp),
        *_pair(step_idx, int), logits.stride(0), vocab_size, num_rows, num_spans, num_segments,
        ranked_by, draws, filters, LANES, triton.next_power_of_2(num_segments),
        triton.next_power_of_2(num_segments * LANES), LIST_BLOCK, SPAN_BLOCK,
        num_warps=8 if filters else 1,
    )  # fmt: skip
    select_grid = (triton.cdiv(num_rows, SELECT_ROWS),)
    thresholds = _pair(0.0 if threshold is None else threshold)
    if rule_code in (FACTOR.value, ENTROPY_BUDGET.value):
        num_unmask = num_unmask.clone()
        limit_kernel[select_grid](
            num_unmask, cu_rows_span, rank_key, confidence, is_nan.view(torch.uint8), *thresholds,
            num_rows, num_spans, rule_code, SELECT_ROWS, num_warps=8,  # 4 would spill the sums
        )  # fmt: skip
    select_kernel[select_grid](
        token_ids, row_position, cu_rows_span, num_unmask, rank_key, confidence, candidate,
        is_written.view(torch.uint8), num_masked, *thresholds,
        num_rows, num_spans, len(token_ids), rule_code, SELECT_ROWS, num_warps=4,
    )  # fmt: skip
