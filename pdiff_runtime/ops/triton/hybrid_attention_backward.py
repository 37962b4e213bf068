"""Gradients of hybrid attention, for packed keys: three kernels, no atomics.

With p = exp(scale * q @ k^T - lse), dp = dout @ v^T and delta = sum(out * dout) - dlse of each row:
ds = p * (dp - delta), dq = scale * ds @ k, dk = scale * ds^T @ q, dv = p^T @ dout.

delta   one number per row and query head.
dq      walks row tiles as the forward does.
dk, dv  walks key tiles over the rows that see them, all heads of the group in one row block, so
        that they are summed where they are computed.
Bits    every sum runs in the order of its own sequence: equal in any batch, on every run.
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
from pdiff_runtime.ops.triton.hybrid_attention import LOG2_E
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
    KEY_TILE_WORDS,
    KEY_TILES,
    NONE,
    NUM_KEY_TILES,
    RANGES,
    ROW_BEGIN,
    next_row_run,
    next_run,
    section,
    sequence_of,
    start_keys,
    start_rows,
    task_of,
)

ROWS_OF_DELTA = 32
TILE_KEYS = tl.constexpr(64)
"""Of the plan's key tiles; a block may be a part of one."""


def dq_config(dtype: torch.dtype, block_d: int, shared_bytes: int) -> Config:
    """Chosen so that nothing spills."""
    if dtype is torch.float32:
        return Config(16, 16, 8, 2) if block_d > 128 else Config(32, 32, 8, 2)
    if block_d > 128:
        return Config(32, 32, 8, 1)
    if block_d == 128 and shared_bytes < HOPPER_SHARED_BYTES:
        return Config(64, 64, 8, 2)
    return Config(128, 64, 8, 2)


def dk_dv_config(dtype: torch.dtype, block_d: int) -> Config:
    """Chosen so that nothing spills. With 64 keys, four warps are what one `wgmma` wants."""
    if dtype is torch.float32:
        return Config(16, 16, 8, 2) if block_d > 128 else Config(32, 32, 8, 2)
    if block_d > 128:
        return Config(32, 32, 8, 1)
    return Config(32, 64, 4, 2)


# -- delta -----------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["total_q"])
def delta_kernel(
    out, dout, lse, dlse, log2_sum, delta, total_q,
    HEADS_Q: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Writes delta and lse in powers of two, both ``[total_q, heads_q]``: a group side by side."""
    idx = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # row * heads + head
    is_row = idx < total_q.to(tl.int64) * HEADS_Q
    o = load_rows(out, idx * HEAD_DIM, is_row, HEAD_DIM, BLOCK_D).to(tl.float32)
    do = load_rows(dout, idx * HEAD_DIM, is_row, HEAD_DIM, BLOCK_D).to(tl.float32)
    total = tl.sum(o * do, axis=1)
    by_head = idx % HEADS_Q * total_q + idx // HEADS_Q
    if dlse is not None:
        total -= tl.load(dlse + by_head, mask=is_row, other=0.0)
    tl.store(delta + idx, total, mask=is_row)
    value = tl.load(lse + by_head, mask=is_row, other=0.0)
    # +inf makes p = 0 in a row that sees nothing
    value = tl.where(value == float("-inf"), float("inf"), value * LOG2_E)
    tl.store(log2_sum + idx, value, mask=is_row)


# -- dq --------------------------------------------------------------------------------------------


@triton.jit
def _add_dq(
    dq, q, do, row_sum, row_delta, k, v, begin, end, key_lo, num_keys, visible,
    k_stride, v_stride, scale_log2,
    MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Key tiles [begin, end) of a run, counted in keys from its first."""
    lane = tl.arange(0, BLOCK_N)
    for n in tl.range(begin, end, BLOCK_N):
        place = n + lane
        k_tile = k + (key_lo + n).to(tl.int64) * k_stride
        v_tile = v + (key_lo + n).to(tl.int64) * v_stride
        keys = load_keys(k_tile, lane * k_stride, place < num_keys, MASKED, HEAD_DIM, BLOCK_D)
        values = load_keys(v_tile, lane * v_stride, place < num_keys, MASKED, HEAD_DIM, BLOCK_D)
        s = tl.dot(q, tl.trans(keys), input_precision="ieee")
        p = tl.exp2(tl.fma(s, scale_log2, -row_sum[:, None]))
        dp = tl.dot(do, tl.trans(values), input_precision="ieee")
        ds = p * (dp - row_delta[:, None])
        if MASKED:
            ds = tl.where(place[None, :] < visible[:, None], ds, 0.0)
        dq = tl.dot(ds.to(keys.dtype), keys, dq, input_precision="ieee")
    return dq


@triton.jit
def dq_kernel(
    words, q, k, v, log2_sum, delta, dout, dq,
    q_stride, k_stride, v_stride, scale, scale_log2,
    GROUP: tl.constexpr, HEADS_KV: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Writes dq ``[total_q, heads_q, head_dim]``."""
    num_programs = tl.num_programs(0)
    num_tasks = num_tasks_of(words, GROUP, HEADS_KV, BLOCK_M)
    for turn in range(tl.cdiv(num_tasks, num_programs)):
        task = task_of(turn, num_programs)
        tile = tile_of(words, tl.minimum(task, num_tasks - 1), GROUP, HEADS_KV, BLOCK_M)
        if (task < num_tasks) & (tl.load(tile + 4) == 0):
            sequence = sequence_of(words, tl.load(tile))
            token, head, is_row, kv_head = locate(words, task, tile, GROUP, HEADS_KV, BLOCK_M)
            row = (tl.load(sequence + ROW_BEGIN) + token).to(tl.int64)
            queries = load_rows(q, row * q_stride + head * HEAD_DIM, is_row, HEAD_DIM, BLOCK_D)
            offset = row * (HEADS_KV * GROUP) + head
            do = load_rows(dout, offset * HEAD_DIM, is_row, HEAD_DIM, BLOCK_D)
            row_sum = tl.load(log2_sum + offset, mask=is_row, other=float("inf"))
            row_delta = tl.load(delta + offset, mask=is_row, other=0.0)
            cursor, end, behind = start_rows(words, sequence, tl.load(tile + 3), token, is_row)
            intervals = section(words, INTERVALS)
            first = tl.load(sequence + KEY_BEGIN).to(tl.int64)
            head_k = k + kv_head * HEAD_DIM + first * k_stride
            head_v = v + kv_head * HEAD_DIM + first * v_stride

            acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            key_lo, visible, cursor = next_run(intervals, cursor, end, behind)
            while key_lo != NONE:
                num_keys = tl.max(visible, axis=0)
                num_full = num_full_keys(visible, is_row, BLOCK_N)
                acc = _add_dq(
                    acc, queries, do, row_sum, row_delta, head_k, head_v, 0, num_full, key_lo,
                    num_keys, visible, k_stride, v_stride, scale_log2,
                    False, HEAD_DIM, BLOCK_N, BLOCK_D,
                )  # fmt: skip
                acc = _add_dq(
                    acc, queries, do, row_sum, row_delta, head_k, head_v, num_full, num_keys,
                    key_lo, num_keys, visible, k_stride, v_stride, scale_log2,
                    True, HEAD_DIM, BLOCK_N, BLOCK_D,
                )  # fmt: skip
                key_lo, visible, cursor = next_run(intervals, cursor, end, behind)

            token, head, is_row, kv_head = locate(words, task, tile, GROUP, HEADS_KV, BLOCK_M)
            row = (tl.load(sequence + ROW_BEGIN) + token).to(tl.int64)
            offset = row * (HEADS_KV * GROUP) + head
            store_rows(dq, offset * HEAD_DIM, acc * scale, is_row, HEAD_DIM, BLOCK_D)


# -- dk and dv -------------------------------------------------------------------------------------


@triton.jit
def _locate_keys(words, block, BLOCK_N: tl.constexpr):
    """The tile and sequence of one block, its keys, and which exist; read anew by each call, as
    `locate` does."""
    blocks: tl.constexpr = TILE_KEYS // BLOCK_N
    tile = section(words, KEY_TILES) + block // blocks * KEY_TILE_WORDS
    key = tl.load(tile + 1) + block % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    return tile, sequence_of(words, tl.load(tile)), key, key < tl.load(tile + 2)


@triton.jit
def _add_dk_dv(
    dk, dv, keys, values, q, dout, log2_sum, delta, begin, end, row_lo, num_rows, first_row,
    q_stride, scale_log2,
    MASKED: tl.constexpr, GROUP: tl.constexpr, HEADS_KV: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Row blocks [begin, end) of a run, counted in rows and heads of the group from its first."""
    HEADS_Q: tl.constexpr = HEADS_KV * GROUP
    lane = tl.arange(0, BLOCK_M)
    for m in tl.range(begin, end, BLOCK_M):
        first = row_lo + m // GROUP  # 64 bits once per block, 32 within
        token = (m % GROUP + lane) // GROUP
        head = (m % GROUP + lane) % GROUP
        is_row = m + lane < num_rows
        q_block = q + first.to(tl.int64) * q_stride
        offset = token * q_stride + head * HEAD_DIM
        queries = load_rows(q_block, offset, is_row, HEAD_DIM, BLOCK_D)
        begin_of_block = first.to(tl.int64) * HEADS_Q
        offset = token * HEADS_Q + head
        do = load_rows(
            dout + begin_of_block * HEAD_DIM, offset * HEAD_DIM, is_row, HEAD_DIM, BLOCK_D
        )
        row_sum = tl.load(log2_sum + begin_of_block + offset, mask=is_row, other=float("inf"))
        row_delta = tl.load(delta + begin_of_block + offset, mask=is_row, other=0.0)
        # all transposed: keys are the rows of these products
        s = tl.dot(keys, tl.trans(queries), input_precision="ieee")
        p = tl.exp2(tl.fma(s, scale_log2, -row_sum[None, :]))
        if MASKED:
            p = tl.where((first + token)[None, :] >= first_row[:, None], p, 0.0)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
        dp = tl.dot(values, tl.trans(do), input_precision="ieee")
        ds = p * (dp - row_delta[None, :])
        dk = tl.dot(ds.to(queries.dtype), queries, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def dk_dv_kernel(
    words, q, k, v, log2_sum, delta, dout, dk, dv,
    q_stride, k_stride, v_stride, scale, scale_log2,
    GROUP: tl.constexpr, HEADS_KV: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Writes dk and dv ``[total_kv, heads_kv, head_dim]``."""
    num_programs = tl.num_programs(0)
    blocks: tl.constexpr = TILE_KEYS // BLOCK_N
    num_tasks = tl.load(words + NUM_KEY_TILES) * blocks * HEADS_KV
    for turn in range(tl.cdiv(num_tasks, num_programs)):
        task = task_of(turn, num_programs)
        if task < num_tasks:
            kv_head = task % HEADS_KV
            tile, sequence, key, is_key = _locate_keys(words, task // HEADS_KV, BLOCK_N)
            at = (tl.load(sequence + KEY_BEGIN) + key).to(tl.int64)
            keys = load_rows(k, at * k_stride + kv_head * HEAD_DIM, is_key, HEAD_DIM, BLOCK_D)
            values = load_rows(v, at * v_stride + kv_head * HEAD_DIM, is_key, HEAD_DIM, BLOCK_D)
            cursor, end, place = start_keys(words, sequence, tl.load(tile + 3), key, is_key)
            ranges = section(words, RANGES)
            first = tl.load(sequence + ROW_BEGIN).to(tl.int64)
            head_q = q + first * q_stride + kv_head * (GROUP * HEAD_DIM)
            offset = (first * HEADS_KV + kv_head) * GROUP
            head_do = dout + offset * HEAD_DIM
            head_sum = log2_sum + offset
            head_delta = delta + offset

            acc_dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
            acc_dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
            row_hi, first_row, cursor = next_row_run(ranges, cursor, end, place)
            while row_hi != NONE:
                row_lo = tl.min(first_row, axis=0)
                num_rows = (row_hi - row_lo) * GROUP
                unmasked_row = tl.max(tl.where(is_key, first_row, row_lo), axis=0)
                num_masked = tl.cdiv((unmasked_row - row_lo) * GROUP, BLOCK_M) * BLOCK_M
                num_masked = tl.minimum(num_masked, num_rows)
                acc_dk, acc_dv = _add_dk_dv(
                    acc_dk, acc_dv, keys, values, head_q, head_do, head_sum, head_delta,
                    0, num_masked, row_lo, num_rows, first_row, q_stride, scale_log2,
                    True, GROUP, HEADS_KV, HEAD_DIM, BLOCK_M, BLOCK_D,
                )  # fmt: skip
                acc_dk, acc_dv = _add_dk_dv(
                    acc_dk, acc_dv, keys, values, head_q, head_do, head_sum, head_delta,
                    num_masked, num_rows, row_lo, num_rows, first_row, q_stride, scale_log2,
                    False, GROUP, HEADS_KV, HEAD_DIM, BLOCK_M, BLOCK_D,
                )  # fmt: skip
                row_hi, first_row, cursor = next_row_run(ranges, cursor, end, place)

            tile, sequence, key, is_key = _locate_keys(words, task // HEADS_KV, BLOCK_N)
            at = (tl.load(sequence + KEY_BEGIN) + key).to(tl.int64)
            offset = (at * HEADS_KV + kv_head) * HEAD_DIM
            store_rows(dk, offset, acc_dk * scale, is_key, HEAD_DIM, BLOCK_D)
            store_rows(dv, offset, acc_dv, is_key, HEAD_DIM, BLOCK_D)


@launches_on_its_device
def hybrid_attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    words: Tensor,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq ``[total_q, num_heads_q, head_dim]``, dk and dv ``[total_kv, num_heads_kv, head_dim]``.

    Args:
        dout: As q and out, contiguous.
        dlse: ``[num_heads_q, total_q]`` float32, contiguous.
        q, k, v: As the forward took them, packed.
        out, lse: What the forward gave, contiguous.
        words: Of a plan with a GPU's schedule.
        softmax_scale: The forward's.
    """
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    total_q, num_heads_q, head_dim = q.shape
    num_heads_kv = k.shape[1]
    block_d = padded_head_dim(head_dim)
    device = multiprocessors(q.device)
    delta, log2_sum = (lse.new_empty(total_q, num_heads_q) for _ in range(2))
    if total_q > 0:
        delta_kernel[(triton.cdiv(total_q * num_heads_q, ROWS_OF_DELTA),)](
            out, dout, lse, dlse, log2_sum, delta, total_q,
            num_heads_q, head_dim, block_d, ROWS_OF_DELTA, num_warps=4,
        )  # fmt: skip
    arguments = (q.stride(0), k.stride(0), v.stride(0), softmax_scale, softmax_scale * LOG2_E.value)
    heads = (num_heads_q // num_heads_kv, num_heads_kv, head_dim)
    grid = (2 * device.num,)
    if total_q > 0:
        block_m, block_n, num_warps, num_stages = dq_config(q.dtype, block_d, device.shared_bytes)
        dq_kernel[grid](
            words, q, k, v, log2_sum, delta, dout, dq, *arguments, *heads,
            block_m, block_n, block_d, num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip
    if len(k) > 0:
        block_m, block_n, num_warps, num_stages = dk_dv_config(q.dtype, block_d)
        dk_dv_kernel[grid](
            words, q, k, v, log2_sum, delta, dout, dk, dv, *arguments, *heads,
            block_m, block_n, block_d, num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip
    return dq, dk, dv
