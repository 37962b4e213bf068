"""Attention in which a row sees its plan's keys: causal text, whole spans, nothing of siblings."""

from __future__ import annotations

from typing import Any, Literal, NoReturn, overload

import torch
from torch import Tensor

from pdiff_runtime import _C
from pdiff_runtime.ops import reference
from pdiff_runtime.ops._library import (
    ELEMENT_TYPES,
    FLOAT32_MAX,
    Impl,
    check_tensor,
    cuda_stream,
    is_traced,
    library,
    select_impl,
    why_not,
)
from pdiff_runtime.ops.attention_plan import AttentionPlan

_CUDA_DTYPES = (torch.bfloat16, torch.float16)

# What every call on a CPU asks: to look up an enum's member takes a fiftieth of it.
_AUTO, _CPU, _REFERENCE = Impl.AUTO, Impl.CPU, Impl.REFERENCE


@overload
def hybrid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    softmax_scale: float | None = None,
    return_lse: Literal[False] = False,
    *,
    impl: Impl | str = Impl.AUTO,
) -> Tensor: ...


@overload
def hybrid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    softmax_scale: float | None = None,
    *,
    return_lse: Literal[True],
    impl: Impl | str = Impl.AUTO,
) -> tuple[Tensor, Tensor]: ...


def hybrid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    *,
    impl: Impl | str = Impl.AUTO,
) -> Tensor | tuple[Tensor, Tensor]:
    """``softmax(softmax_scale * q @ k^T) @ v`` over the keys each row sees.

    Differentiable for packed keys. Tokens of q, k and v may be strided, as slices of a fused
    projection are. A row's result depends on its query and the keys it sees, bit for bit: not on
    the rest of the batch, nor on how a sequence is split over calls, nor on the number of threads.

    Args:
        q: ``[total_q, num_heads_q, head_dim]`` float32, bfloat16 or float16; rows of
            all sequences.
        k: ``[total_kv, num_heads_kv, head_dim]``, or
            ``[num_pages, page_size, num_heads_kv, head_dim]`` if the plan has a page table.
        v: As ``k``. Values of all keys of a sequence must be finite, of those that a row does not
            see too: inside a tile they are multiplied by 0, and 0 * inf is NaN.
        plan: From :meth:`AttentionPlan.pack` or :meth:`AttentionPlan.from_tokens`.
        softmax_scale: Finite and not negative; ``head_dim ** -0.5`` if None.
        return_lse: Also return the logarithm of each row's sum.

    Returns:
        ``[total_q, num_heads_q, head_dim]``; with ``return_lse`` also ``[num_heads_q, total_q]``
        float32, natural log. A row that sees no key gets 0 and -inf.

    Raises:
        ValueError: A shape, dtype, device or stride does not fit, e.g.
            "q: expected [96, 8, 128], got [95, 8, 128]".
    """
    if softmax_scale is None:
        softmax_scale = plan.head_dim**-0.5
    if not 0 <= softmax_scale <= FLOAT32_MAX:
        raise ValueError(f"softmax_scale: expected a finite number >= 0, got {softmax_scale}")
    choice = _select(impl, q, plan)
    if choice is _REFERENCE:
        out, lse = reference.hybrid_attention(q, k, v, plan, softmax_scale)
        return (out, lse) if return_lse else out
    if choice is not _CPU:
        _check(q, k, v, plan, _CUDA_DTYPES if choice is Impl.CUDA else ELEMENT_TYPES)
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if is_traced() or needs_grad:
        if choice is Impl.CUDA and impl == Impl.AUTO:
            choice = Impl.AUTO  # which kernel runs backward the op sees, and no traced graph
        out, lse = torch.ops.pdiff.hybrid_attention(
            q, k, v, plan.words, plan.num_slots, softmax_scale, choice
        )
        return (out, lse) if return_lse else out
    if not return_lse:
        return _forward(q, k, v, plan.words, plan.num_slots, softmax_scale, None, choice)
    lse = q.new_empty(q.shape[1::-1], dtype=torch.float32)
    return _forward(q, k, v, plan.words, plan.num_slots, softmax_scale, lse, choice), lse


def _select(impl: Impl | str, q: Tensor, plan: AttentionPlan) -> Impl:
    """The implementation that runs: by default the one that the plan was packed for."""
    if impl is _AUTO and plan.impl is _CPU:  # spared the checks on every call
        return plan.impl
    if impl == Impl.AUTO:
        in_float32 = plan.impl is Impl.CUDA and q.dtype is torch.float32 and q.is_cuda
        impl = Impl.TRITON if in_float32 else plan.impl  # walks the same plan
    choice = select_impl(impl, q.device)
    if choice is Impl.REFERENCE or plan.impl is Impl.REFERENCE:
        return Impl.REFERENCE
    if (choice is Impl.CPU) != (plan.impl is Impl.CPU):
        raise ValueError(f"plan: expected one packed for {choice}, got one for {plan.impl}")
    return choice


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    dtypes: tuple[torch.dtype, ...],
) -> None:
    """Raise unless the tensors are what the plan, whose words are on the device, expects."""
    tokens_k: tuple[int, ...] = (plan.total_kv,)
    if plan.page_size is not None:
        tokens_k = (max(len(k), plan.num_pages), plan.page_size)
    traced = is_traced()
    for name, x, dtype, shape in (
        ("q", q, dtypes, (plan.total_q, plan.num_heads_q)),
        ("k", k, q.dtype, (*tokens_k, plan.num_heads_kv)),
        ("v", v, q.dtype, (*tokens_k, plan.num_heads_kv)),
    ):
        sizes = (*shape, plan.head_dim)
        check_tensor(name, x, dtype, sizes, plan.words, contiguous=False, traced=traced)
        token = x[:1] if x.ndim == 3 else x[:1, :1]
        if not token.is_contiguous():
            raise ValueError(
                f"{name}: expected contiguous heads and elements, got strides {x.stride()}"
            )


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Tensor,
    num_slots: int,
    softmax_scale: float,
    lse: Tensor | None,
    impl: Impl,
) -> Tensor:
    """`plan` holds the plan's words; `lse` is written unless None."""
    if impl is not _CPU:
        if impl is Impl.CUDA:
            return _forward_cuda(q, k, v, plan, num_slots, softmax_scale, lse)
        from pdiff_runtime.ops import triton

        return triton.hybrid_attention(q, k, v, plan, softmax_scale, lse)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    _C.hybrid_attention(plan, q, k, v, out, lse, softmax_scale, torch.get_num_threads())
    return out


def _forward_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Tensor,
    num_slots: int,
    softmax_scale: float,
    lse: Tensor | None,
) -> Tensor:
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    num_bytes = _C.hybrid_attention_workspace_bytes(num_slots, k.shape[-2], q.shape[-1])
    workspace = torch.empty(num_bytes, dtype=torch.uint8, device=q.device)
    _C.hybrid_attention_cuda(
        plan, num_slots, q, k, v, out, lse, softmax_scale, workspace, *cuda_stream(q.device)
    )
    return out


library.define(
    "hybrid_attention(Tensor q, Tensor k, Tensor v, Tensor plan, SymInt num_slots,"
    " float softmax_scale, str impl) -> (Tensor, Tensor)"
)
library.define(
    "hybrid_attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out,"
    " Tensor lse, Tensor plan, float softmax_scale, str impl) -> (Tensor, Tensor, Tensor)"
)


def _forward_op(
    q: Tensor, k: Tensor, v: Tensor, plan: Tensor, num_slots: int, softmax_scale: float, impl: str
) -> tuple[Tensor, Tensor]:
    lse = q.new_empty(q.shape[1::-1], dtype=torch.float32)
    choice = Impl.CUDA if impl == Impl.AUTO else Impl(impl)
    return _forward(q, k, v, plan, num_slots, softmax_scale, lse, choice), lse


def _backward_op(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: Tensor,
    softmax_scale: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dout = dout.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    if impl == Impl.AUTO:
        impl = _impl_of_backward(q.device, q.shape[-1])
    if impl == Impl.TRITON:
        from pdiff_runtime.ops import triton

        if k.ndim == 4:
            raise ValueError("plan: expected packed keys, got a page table")
        return triton.hybrid_attention_backward(dout, dlse, q, k, v, out, lse, plan, softmax_scale)
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    arguments = plan, q, k, v, out, lse, dout, dlse, dq, dk, dv, softmax_scale
    if impl == Impl.CUDA:
        num_bytes = _C.hybrid_attention_backward_workspace_bytes(q.shape[0], q.shape[1])
        workspace = torch.empty(num_bytes, dtype=torch.uint8, device=q.device)
        _C.hybrid_attention_backward_cuda(*arguments, workspace, *cuda_stream(q.device))
    else:
        _C.hybrid_attention_backward(*arguments, torch.get_num_threads())
    return dq, dk, dv


def _impl_of_backward(device: torch.device, head_dim: int) -> Impl:
    """CUDA's kernels, or Triton's where their blocks ask for more than the device has."""
    device_idx, _ = cuda_stream(device)
    fits = _C.hybrid_attention_backward_fits(head_dim, device_idx)
    return Impl.CUDA if fits or why_not(Impl.TRITON, device) else Impl.TRITON


def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, plan: Tensor, num_slots: int, softmax_scale: float, impl: str
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


def _backward_fake(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: Tensor,
    softmax_scale: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(
    ctx: Any,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, int, float, str],
    output: tuple[Tensor, Tensor],
) -> None:
    q, k, v, plan, _, ctx.softmax_scale, ctx.impl = inputs
    ctx.save_for_backward(q, k, v, *output, plan)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, dout: Tensor | None, dlse: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
    q, k, v, out, lse, plan = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(out)
    gradients = torch.ops.pdiff.hybrid_attention_backward(
        dout, dlse, q, k, v, out, lse, plan, ctx.softmax_scale, ctx.impl
    )
    return *gradients, None, None, None, None


def _no_second_derivative(ctx: Any, *_: Tensor | None) -> NoReturn:
    raise RuntimeError("hybrid_attention: has no second derivative")


for _key in ("CPU", "CUDA"):
    library.impl("hybrid_attention", _forward_op, _key)
    library.impl("hybrid_attention_backward", _backward_op, _key)
torch.library.register_fake("pdiff::hybrid_attention", _forward_fake, lib=library)
torch.library.register_fake("pdiff::hybrid_attention_backward", _backward_fake, lib=library)
torch.library.register_autograd(
    "pdiff::hybrid_attention", _backward, setup_context=_setup_context, lib=library
)
torch.library.register_autograd(
    "pdiff::hybrid_attention_backward", _no_second_derivative, lib=library
)
