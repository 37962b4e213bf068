"""Rotary embedding and the write of keys and values into pages: one launch, one program per row."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pdiff_runtime.ops.triton.launch import launches_on_its_device

MOST_ELEMENTS = 4096
"""Of a block, which is some heads of one row."""


@triton.jit
def _rotate(
    x, c, s, cache, num_cached,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Heads of one row at `x`, in place; the first `num_cached` also to `cache`, if given."""
    half: tl.constexpr = HEAD_DIM // 2
    dim = tl.arange(0, BLOCK_D)
    for first in tl.static_range(0, NUM_HEADS, BLOCK_H):
        head = first + tl.arange(0, BLOCK_H)
        here = (head < NUM_HEADS)[:, None] & (dim < half)[None, :]
        at = head[:, None] * HEAD_DIM + dim[None, :]
        a = tl.load(x + at, mask=here, other=0.0).to(tl.float32)
        b = tl.load(x + at + half, mask=here, other=0.0).to(tl.float32)
        low = (a * c[None, :] - b * s[None, :]).to(x.dtype.element_ty)
        high = (b * c[None, :] + a * s[None, :]).to(x.dtype.element_ty)
        tl.store(x + at, low, mask=here)
        tl.store(x + at + half, high, mask=here)
        if cache is not None:
            cached = here & (head < num_cached)[:, None]
            tl.store(cache + at, low, mask=cached)
            tl.store(cache + at + half, high, mask=cached)


@triton.jit(do_not_specialize=["max_position", "num_slots"])
def rope_kv_write_kernel(
    q, k, v, cos, sin, positions, slots, k_cache, v_cache,
    q_stride, k_stride, v_stride, max_position, num_slots,
    HEADS_Q: tl.constexpr, HEADS_KV: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_HQ: tl.constexpr, BLOCK_HKV: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """A row whose position is out of range is left alone; a slot out of range is not written."""
    row = tl.program_id(0).to(tl.int64)
    position = tl.load(positions + row).to(tl.int64)
    if (position >= 0) & (position < max_position):
        half: tl.constexpr = HEAD_DIM // 2
        dim = tl.arange(0, BLOCK_D)
        c = tl.load(cos + position * half + dim, mask=dim < half, other=0.0)
        s = tl.load(sin + position * half + dim, mask=dim < half, other=0.0)
        _rotate(q + row * q_stride, c, s, None, 0, HEADS_Q, HEAD_DIM, BLOCK_HQ, BLOCK_D)
        if k_cache is None:
            _rotate(k + row * k_stride, c, s, None, 0, HEADS_KV, HEAD_DIM, BLOCK_HKV, BLOCK_D)
        else:
            slot = tl.load(slots + row)
            is_cached = (slot >= 0) & (slot < num_slots)
            token = tl.where(is_cached, slot, 0) * (HEADS_KV * HEAD_DIM)
            _rotate(
                k + row * k_stride, c, s, k_cache + token, tl.where(is_cached, HEADS_KV, 0),
                HEADS_KV, HEAD_DIM, BLOCK_HKV, BLOCK_D,
            )  # fmt: skip
            for first in tl.static_range(0, HEADS_KV * HEAD_DIM, BLOCK_V):
                at = first + tl.arange(0, BLOCK_V)
                here = at < tl.where(is_cached, HEADS_KV * HEAD_DIM, 0)
                value = tl.load(v + row * v_stride + at, mask=here, other=0.0)
                tl.store(v_cache + token + at, value, mask=here)


@launches_on_its_device
def rope_kv_write(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slots: Tensor | None,
    k_cache: Tensor | None,
    v_cache: Tensor | None,
) -> None:
    """See :func:`pdiff_runtime.ops.rope_kv_write_`, which has checked the arguments."""
    num_rows, num_heads_q, head_dim = q.shape
    num_heads_kv = k.shape[1]
    if num_rows == 0:
        return
    block_d = triton.next_power_of_2(head_dim // 2)
    most_heads = max(1, MOST_ELEMENTS // (2 * block_d))
    rope_kv_write_kernel[(num_rows,)](
        q, k, v, cos, sin, positions, slots, k_cache, v_cache,
        q.stride(0), k.stride(0), 0 if v is None else v.stride(0), cos.shape[0],
        0 if k_cache is None else k_cache.shape[0] * k_cache.shape[1],
        num_heads_q, num_heads_kv, head_dim,
        min(triton.next_power_of_2(num_heads_q), most_heads),
        min(triton.next_power_of_2(num_heads_kv), most_heads), block_d,
        min(triton.next_power_of_2(num_heads_kv * head_dim), MOST_ELEMENTS),
        num_warps=4,
    )  # fmt: skip
