"""Blocks of rows and of keys: which they are, and how they come from memory and go back."""

from __future__ import annotations

import triton
import triton.language as tl

from pdiff_runtime.ops.triton.plan import NUM_TILES, TILE_ROWS, TILE_WORDS, TILES, section

UNBOUNDED = tl.constexpr(2**30)


@triton.jit
def locate(words, task, tile, GROUP: tl.constexpr, HEADS_KV: tl.constexpr, BLOCK_M: tl.constexpr):
    """The rows of one block: token and query head of each, which of them exist; the KV head.

    The bounds are read anew by each call, so that the compiler does not keep what the rows of a
    block need at their start in registers until their end.
    """
    row_lo = tl.load(tile + 1, volatile=True)
    row_hi = tl.load(tile + 2, volatile=True)
    kv_head = task % HEADS_KV
    blocks = tl.cdiv(tl.load(words + TILE_ROWS) * GROUP, BLOCK_M)
    idx = (task // HEADS_KV) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    token = row_lo + idx // GROUP
    return token, kv_head * GROUP + idx % GROUP, (token < row_hi), kv_head


@triton.jit
def num_tasks_of(words, GROUP: tl.constexpr, HEADS_KV: tl.constexpr, BLOCK_M: tl.constexpr):
    blocks = tl.cdiv(tl.load(words + TILE_ROWS) * GROUP, BLOCK_M)
    return tl.load(words + NUM_TILES) * blocks * HEADS_KV


@triton.jit
def tile_of(words, task, GROUP: tl.constexpr, HEADS_KV: tl.constexpr, BLOCK_M: tl.constexpr):
    blocks = tl.cdiv(tl.load(words + TILE_ROWS) * GROUP, BLOCK_M)
    return section(words, TILES) + task // (blocks * HEADS_KV) * TILE_WORDS


@triton.jit
def load_rows(base, offset, is_row, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """``[rows, BLOCK_D]``; what is no row or past head_dim is 0."""
    dim = tl.arange(0, BLOCK_D)
    pointers = base + offset[:, None] + dim[None, :]
    if BLOCK_D == HEAD_DIM:
        return tl.load(pointers, mask=is_row[:, None], other=0.0)
    return tl.load(pointers, mask=is_row[:, None] & (dim < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def store_rows(base, offset, value, is_row, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    dim = tl.arange(0, BLOCK_D)
    mask = is_row[:, None] & (dim < HEAD_DIM)[None, :]
    tl.store(base + offset[:, None] + dim[None, :], value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def load_keys(
    base, offset, is_key, MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):
    """``[keys, BLOCK_D]``; keys past a run's end are 0 where they are `MASKED`."""
    if MASKED:
        return load_rows(base, offset, is_key, HEAD_DIM, BLOCK_D)
    dim = tl.arange(0, BLOCK_D)
    pointers = base + offset[:, None] + dim[None, :]
    if BLOCK_D == HEAD_DIM:
        return tl.load(pointers)
    return tl.load(pointers, mask=(dim < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def num_full_keys(visible, is_row, BLOCK_N: tl.constexpr):
    """Keys of a run in tiles that every row sees whole."""
    return tl.min(tl.where(is_row, visible, UNBOUNDED), axis=0) // BLOCK_N * BLOCK_N
