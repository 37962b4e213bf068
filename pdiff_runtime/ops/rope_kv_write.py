"""rope_kv_write_: rotary embedding and the write of keys and values into pages, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from pdiff_runtime import _C
from pdiff_runtime.ops import reference
from pdiff_runtime.ops._library import (
    ELEMENT_TYPES,
    Impl,
    check_no_grad,
    check_rows_apart,
    check_tensor,
    cuda_stream,
    is_traced,
    library,
    select_impl,
)


def rope_kv_write_(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slots: Tensor | None,
    k_cache: Tensor | None,
    v_cache: Tensor | None,
    *,
    impl: Impl | str = Impl.AUTO,
) -> None:
    """Rotate q and k in place, and write the rotated k and v into their cache slots.

    Half-split rotary in float arithmetic: element i of a head is rotated with element
    i + head_dim / 2. Rows of q, k and v may be any stride apart, so they can be parts of one
    projection's output; those of q and of k may not overlap, because they are written.

    Args:
        q: ``[rows, num_heads_q, head_dim]`` float32, bfloat16 or float16, rotated in
            place.
        k: ``[rows, num_heads_kv, head_dim]``, rotated in place.
        v: ``[rows, num_heads_kv, head_dim]``; not read without caches.
        cos, sin: ``[max_position, head_dim / 2]`` float32.
        positions: ``[rows]`` int32 or int64.
        slots: ``[rows]`` int64, page * page_size + offset, each at most once; -1 is not written.
        k_cache, v_cache: ``[num_pages, page_size, num_heads_kv, head_dim]``; None rotates only.

    On a GPU nothing waits for the device, so a position or slot out of range is not told: a row
    whose position is out of range is left as it is, and a slot out of range is not written.

    Raises:
        ValueError: A shape, dtype, device, position or slot does not fit; nothing is written then.
    """
    if is_traced():
        torch.ops.pdiff.rope_kv_write_(
            q, k, v, cos, sin, positions, slots, k_cache, v_cache, str(impl)
        )
    else:
        _run(q, k, v, cos, sin, positions, slots, k_cache, v_cache, impl)


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slots: Tensor | None,
    k_cache: Tensor | None,
    v_cache: Tensor | None,
    impl: Impl | str,
) -> None:
    device = q.device
    choice = select_impl(impl, device)
    check_no_grad("rope_kv_write_", q=q, k=k, v=v)
    _check_rows("q", q, ELEMENT_TYPES, ("rows", "num_heads_q", "head_dim"), q)
    rows, num_heads_q, head_dim = q.shape
    _check_rows("k", k, q.dtype, (rows, "num_heads_kv", head_dim), q)
    num_heads_kv = k.shape[1]
    if num_heads_q == 0 or num_heads_kv == 0 or head_dim == 0:
        name, x = ("q", q) if num_heads_q == 0 or head_dim == 0 else ("k", k)
        raise ValueError(
            f"{name}: expected at least one head and element of a head, got {list(x.shape)}"
        )
    check_rows_apart("q", q)
    check_rows_apart("k", k)
    if head_dim % 2 != 0:
        raise ValueError(f"q: expected an even head_dim, got {head_dim}")
    check_tensor("cos", cos, torch.float32, ("max_position", head_dim // 2), q)
    check_tensor("sin", sin, torch.float32, tuple(cos.shape), q)
    check_tensor("positions", positions, (torch.int64, torch.int32), (rows,), q)
    if (k_cache is None) != (v_cache is None):
        raise ValueError("k_cache, v_cache: expected both or neither")
    if k_cache is not None and v_cache is not None:
        if v is None or slots is None:
            raise ValueError("v, slots: expected tensors where there are caches, got None")
        _check_rows("v", v, q.dtype, (rows, num_heads_kv, head_dim), q)
        check_tensor("slots", slots, torch.int64, (rows,), q)
        pages = ("num_pages", "page_size", num_heads_kv, head_dim)
        check_tensor("k_cache", k_cache, q.dtype, pages, q)
        check_tensor("v_cache", v_cache, q.dtype, tuple(k_cache.shape), q)

    if choice is Impl.REFERENCE:
        reference.rope_kv_write_(q, k, v, cos, sin, positions, slots, k_cache, v_cache)
        return
    if choice is Impl.TRITON:
        from pdiff_runtime.ops import triton

        triton.rope_kv_write(q, k, v, cos, sin, positions, slots, k_cache, v_cache)
        return
    arguments = q, k, v, cos, sin, positions, slots, k_cache, v_cache
    if choice is Impl.CUDA:
        _C.rope_kv_write_cuda(*arguments, *cuda_stream(device))
    else:
        _C.rope_kv_write(*arguments, torch.get_num_threads())


def _check_rows(
    name: str,
    tensor: Tensor,
    dtype: torch.dtype | tuple[torch.dtype, ...],
    shape: tuple[int | str, ...],
    like: Tensor,
) -> None:
    """Heads of a row lie next to one another; rows may be any stride apart."""
    check_tensor(name, tensor, dtype, shape, like, contiguous=False)
    if not (tensor.is_contiguous() or tensor[:1].is_contiguous()):
        raise ValueError(f"{name}: expected contiguous rows, got strides {tensor.stride()}")


library.define(
    "rope_kv_write_(Tensor(a!) q, Tensor(b!) k, Tensor? v, Tensor cos, Tensor sin, "
    "Tensor positions, Tensor? slots, Tensor(c!)? k_cache, Tensor(d!)? v_cache, str impl) -> ()"
)
torch.library.impl(library, "rope_kv_write_", "CompositeExplicitAutograd")(_run)


@torch.library.register_fake("pdiff::rope_kv_write_", lib=library)
def _rope_kv_write_fake(*args: object) -> None:
    pass
