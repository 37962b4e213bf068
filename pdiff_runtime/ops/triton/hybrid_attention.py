"""Hybrid attention, forward.

Work    one task per (tile, block of its rows, KV head); a tile's rows are its tokens with all heads
        of the group. Programs take tasks in turns whose number they read from the plan, so a
        captured launch serves any plan of the same capacity.
Walk    run by run, key tile by key tile. Every row sees a prefix of a run: key tiles that all rows
        see whole carry no mask, the others one compare per score.
Bits    a tile whose keys the plan shares out is walked whole by its first part: no row depends on
        the batch, and which of the two loops a key tile is in changes no rounding.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pdiff_runtime.ops.triton.blocks import (
    load_keys,
    load_rows,
    locate,
    num_full_keys,
    num_tasks_of,
    store_rows,
    tile_of,
)
from pdiff_runtime.ops.triton.launch import (
    HOPPER_SHARED_BYTES,
    Config,
    launches_on_its_device,
    multiprocessors,
    padded_head_dim,
)
from pdiff_runtime.ops.triton.plan import (
    INTERVALS,
    KEY_BEGIN,
    NONE,
    PAGE_BEGIN,
    PAGES,
    ROW_BEGIN,
    next_run,
    section,
    sequence_of,
    start_rows,
    task_of,
)

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234663852886e38)
"""Where maxima start: finite, so that differences of two of them are numbers."""


def forward_config(dtype: torch.dtype, block_d: int, shared_bytes: int) -> Config:
    """Chosen so that nothing spills and, up to head_dim 128, shared memory of 99 KB suffices."""
    if dtype is torch.float32:
        return Config(32, 16 if block_d > 128 else 32, 8, 2)
    if block_d > 128:
        return Config(64, 32, 8, 2)
    if block_d == 128 and shared_bytes < HOPPER_SHARED_BYTES:
        return Config(128, 32, 8, 3)
    return Config(128, 64, 8, 3)


@triton.jit
def _attend(
    acc, row_max, row_sum, q, k, v, pages, begin, end, key_lo, num_keys, visible,
    k_stride, v_stride, k_page_stride, v_page_stride, scale_log2,
    MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Key tiles [begin, end) of a run, counted in keys from its first."""
    lane = tl.arange(0, BLOCK_N)
    for n in tl.range(begin, end, BLOCK_N):
        place = n + lane
        is_key = place < num_keys
        if PAGE_SIZE == 0:  # 64 bits once per tile, 32 within
            k_tile = k + (key_lo + n).to(tl.int64) * k_stride
            v_tile = v + (key_lo + n).to(tl.int64) * v_stride
            k_offset = lane * k_stride
            v_offset = lane * v_stride
        else:
            k_tile = k
            v_tile = v
            key = key_lo + place
            page = tl.load(pages + key // PAGE_SIZE, mask=is_key, other=0).to(tl.int64)
            k_offset = page * k_page_stride + (key % PAGE_SIZE) * k_stride
            v_offset = page * v_page_stride + (key % PAGE_SIZE) * v_stride
        keys = load_keys(k_tile, k_offset, is_key, MASKED, HEAD_DIM, BLOCK_D)
        # s <- q @ k^T; row_max <- max(row_max, scale * s)
        s = tl.dot(q, tl.trans(keys), input_precision="ieee")
        if MASKED:
            visible_here = place[None, :] < visible[:, None]
            block_max = tl.max(tl.where(visible_here, s, float("-inf")), axis=1)
            # not -inf times a scale of 0
            scaled = tl.where(block_max == float("-inf"), row_max, block_max * scale_log2)
        else:
            scaled = tl.max(s, axis=1) * scale_log2
        new_max = tl.maximum(row_max, scaled)
        # p <- exp(scale * s - row_max)
        p = tl.exp2(tl.fma(s, scale_log2, -new_max[:, None]))
        if MASKED:
            p = tl.where(visible_here, p, 0.0)
        alpha = tl.exp2(row_max - new_max)
        row_max = new_max
        row_sum = row_sum * alpha + tl.sum(p, axis=1)
        # out <- alpha * out + p @ v
        values = load_keys(v_tile, v_offset, is_key, MASKED, HEAD_DIM, BLOCK_D)
        acc = tl.dot(p.to(values.dtype), values, acc * alpha[:, None], input_precision="ieee")
    return acc, row_max, row_sum


@triton.jit(do_not_specialize=["total_q"])
def forward_kernel(
    words, q, k, v, out, lse, total_q,
    q_stride, k_stride, v_stride, k_page_stride, v_page_stride, scale_log2,
    GROUP: tl.constexpr, HEADS_KV: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Writes out ``[total_q, heads_q, head_dim]`` and, if given, lse ``[heads_q, total_q]``."""
    num_programs = tl.num_programs(0)
    num_tasks = num_tasks_of(words, GROUP, HEADS_KV, BLOCK_M)
    for turn in range(tl.cdiv(num_tasks, num_programs)):
        task = task_of(turn, num_programs)
        tile = tile_of(words, tl.minimum(task, num_tasks - 1), GROUP, HEADS_KV, BLOCK_M)
        if (task < num_tasks) & (tl.load(tile + 4) == 0):
            sequence = sequence_of(words, tl.load(tile))
            token, head, is_row, kv_head = locate(words, task, tile, GROUP, HEADS_KV, BLOCK_M)
            row = tl.load(sequence + ROW_BEGIN) + token
            offset = row.to(tl.int64) * q_stride + head * HEAD_DIM
            queries = load_rows(q, offset, is_row, HEAD_DIM, BLOCK_D)
            cursor, end, behind = start_rows(words, sequence, tl.load(tile + 3), token, is_row)
            intervals = section(words, INTERVALS)
            pages = section(words, PAGES) + tl.load(sequence + PAGE_BEGIN)
            head_k = k + kv_head * HEAD_DIM
            head_v = v + kv_head * HEAD_DIM
            if PAGE_SIZE == 0:
                first = tl.load(sequence + KEY_BEGIN).to(tl.int64)
                head_k += first * k_stride
                head_v += first * v_stride

            acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            row_max = tl.full([BLOCK_M], LOWEST, tl.float32)
            row_sum = tl.zeros([BLOCK_M], tl.float32)
            key_lo, visible, cursor = next_run(intervals, cursor, end, behind)
            while key_lo != NONE:
                num_keys = tl.max(visible, axis=0)
                num_full = num_full_keys(visible, is_row, BLOCK_N)
                acc, row_max, row_sum = _attend(
                    acc, row_max, row_sum, queries, head_k, head_v, pages,
                    0, num_full, key_lo, num_keys, visible,
                    k_stride, v_stride, k_page_stride, v_page_stride, scale_log2,
                    False, HEAD_DIM, PAGE_SIZE, BLOCK_N, BLOCK_D,
                )  # fmt: skip
                acc, row_max, row_sum = _attend(
                    acc, row_max, row_sum, queries, head_k, head_v, pages,
                    num_full, num_keys, key_lo, num_keys, visible,
                    k_stride, v_stride, k_page_stride, v_page_stride, scale_log2,
                    True, HEAD_DIM, PAGE_SIZE, BLOCK_N, BLOCK_D,
                )  # fmt: skip
                key_lo, visible, cursor = next_run(intervals, cursor, end, behind)

            blind = row_sum == 0.0
            row_sum = tl.where(blind, 1.0, row_sum)
            acc = acc / row_sum[:, None]
            token, head, is_row, kv_head = locate(words, task, tile, GROUP, HEADS_KV, BLOCK_M)
            row = tl.load(sequence + ROW_BEGIN) + token
            offset = row.to(tl.int64) * (HEADS_KV * GROUP * HEAD_DIM) + head * HEAD_DIM
            store_rows(out, offset, acc, is_row, HEAD_DIM, BLOCK_D)
            if lse is not None:
                log_sum = row_max * LN_2 + tl.log(row_sum)
                log_sum = tl.where(blind, float("-inf"), log_sum)
                tl.store(lse + head.to(tl.int64) * total_q + row, log_sum, mask=is_row)


@launches_on_its_device
def hybrid_attention(
    q: Tensor, k: Tensor, v: Tensor, words: Tensor, softmax_scale: float, lse: Tensor | None
) -> Tensor:
    """``[total_q, num_heads_q, head_dim]``; `lse` ``[num_heads_q, total_q]`` is filled if given.

    Args:
        q: ``[total_q, num_heads_q, head_dim]``.
        k: ``[total_kv, num_heads_kv, head_dim]``, or pages of tokens in front.
        v: As `k`.
        words: Of a plan with a GPU's schedule.
        softmax_scale: Not negative.
        lse: float32.
    """
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    total_q, num_heads_q, head_dim = q.shape
    if total_q == 0:
        return out
    num_heads_kv = k.shape[-2]
    block_d = padded_head_dim(head_dim)
    device = multiprocessors(q.device)
    config = forward_config(q.dtype, block_d, device.shared_bytes)
    paged = k.ndim == 4
    forward_kernel[(2 * device.num,)](
        words, q, k, v, out, lse, total_q,
        q.stride(0), k.stride(-3), v.stride(-3), k.stride(0), v.stride(0),
        softmax_scale * LOG2_E.value,
        num_heads_q // num_heads_kv, num_heads_kv, head_dim, k.shape[1] if paged else 0,
        config.block_m, config.block_n, block_d,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out
