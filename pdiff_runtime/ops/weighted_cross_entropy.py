"""weighted_cross_entropy: the training loss with its gradient in one pass over the logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pdiff_runtime import _C
from pdiff_runtime.ops import reference
from pdiff_runtime.ops._library import (
    ELEMENT_TYPES,
    Impl,
    check_one_number,
    check_rows_apart,
    check_tensor,
    cuda_stream,
    is_traced,
    library,
    select_impl,
)


class WeightedCrossEntropy(NamedTuple):
    """The loss, and what it is made of by kind: 0 is the plan, 1 the inside of spans.

    Attributes:
        loss: Scalar float32, differentiable with respect to the logits.
        weighted_sums: ``[2]`` float32, sum of weight * ce.
        unweighted_sums: ``[2]`` float32, sum of ce.
        counts: ``[2]`` int64, rows that are not ignored.
    """

    loss: Tensor
    weighted_sums: Tensor
    unweighted_sums: Tensor
    counts: Tensor


def weighted_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor,
    kind: Tensor,
    *,
    normaliser: float | Tensor,
    inplace_backward: bool = False,
    impl: Impl | str = Impl.AUTO,
) -> WeightedCrossEntropy:
    """``sum(weight * cross_entropy(logits, labels)) / normaliser`` and its parts by kind.

    Where the logits require grad, the forward computes the gradient too, while the row is in cache.

    Args:
        logits: ``[rows, vocab_size]`` float32, bfloat16 or float16; rows any stride
            apart.
        labels: ``[rows]`` int64; rows with -100 are ignored and get gradient 0.
        weight: ``[rows]`` float32.
        kind: ``[rows]`` uint8, 0 (plan) or 1 (span).
        normaliser: What the sum is divided by, a number or a tensor of one element; 0 gives loss 0
            and gradient 0. No gradient flows into it. A tensor on the GPU stays there: nothing
            waits for its value.
        inplace_backward: Write the gradient over the logits' memory during the forward, which saves
            a buffer of their size. The logits are then unusable, and an op before this one that
            kept them for its own backward makes that backward raise. Eager mode only: a compiled
            graph keeps the separate buffer.

    On a GPU nothing waits for the device. A label or kind out of range can then not be told: the
    row counts as ignored, and the loss is NaN. The gradient is scaled in place there, so that
    backward runs once.

    Raises:
        ValueError: A shape, dtype, device, label or kind does not fit.
    """
    traced = is_traced()
    needs_grad = torch.is_grad_enabled() and logits.requires_grad
    if inplace_backward and needs_grad and not traced:
        if logits.is_leaf:
            raise ValueError("inplace_backward: expected logits computed by the model, got a leaf")
        outputs = _InplaceBackward.apply(logits, labels, weight, kind, normaliser, impl)
    elif traced or needs_grad:
        if not isinstance(normaliser, Tensor):
            normaliser = torch.full((), normaliser, dtype=torch.float64, device=logits.device)
        outputs = torch.ops.pdiff.weighted_cross_entropy(
            logits, labels, weight, kind, normaliser, needs_grad, str(impl)
        )[:4]
    else:
        outputs = _run(logits, labels, weight, kind, normaliser, None, impl)
    loss, *parts = outputs
    return WeightedCrossEntropy(loss, *(part.detach() for part in parts))


def _run(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor,
    kind: Tensor,
    normaliser: float | Tensor,
    dlogits: Tensor | None,
    impl: Impl | str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss and parts; `dlogits`, if given, receives the gradient of the loss."""
    device = logits.device
    choice = select_impl(impl, device, triton_refuses="this op has no Triton version")
    check_tensor(
        "logits",
        logits,
        ELEMENT_TYPES,
        ("rows", "vocab_size"),
        logits,
        contiguous=False,
    )
    rows, vocab_size = logits.shape
    if vocab_size > 1 and logits.stride(1) != 1:
        raise ValueError(f"logits: expected rows without gaps, got strides {logits.stride()}")
    check_rows_apart("logits", logits)
    check_tensor("labels", labels, torch.int64, (rows,), logits)
    check_tensor("weight", weight, torch.float32, (rows,), logits)
    check_tensor("kind", kind, torch.uint8, (rows,), logits)
    if isinstance(normaliser, Tensor):
        check_one_number("normaliser", normaliser)
    if choice is Impl.REFERENCE:
        return reference.weighted_cross_entropy(
            logits, labels, weight, kind, float(normaliser), dlogits
        )

    outputs = _empty_outputs(logits)
    arguments = logits, labels, weight, kind, dlogits, *outputs
    if choice is Impl.CUDA:
        if isinstance(normaliser, Tensor):
            on_device = normaliser.detach().to(device, torch.float64)
        else:
            on_device = torch.full((), normaliser, dtype=torch.float64, device=device)
        num_bytes = _C.weighted_cross_entropy_workspace_bytes(rows)
        workspace = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        _C.weighted_cross_entropy_cuda(*arguments, on_device, workspace, *cuda_stream(device))
    else:
        _C.weighted_cross_entropy(*arguments, float(normaliser), torch.get_num_threads())
    return outputs


def _empty_outputs(logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Storage of loss, weighted_sums, unweighted_sums and counts."""
    return (
        logits.new_empty((), dtype=torch.float32),
        logits.new_empty(2, dtype=torch.float32),
        logits.new_empty(2, dtype=torch.float32),
        logits.new_empty(2, dtype=torch.int64),
    )


def _scaled(ctx: Any, dlogits: Tensor, grad_loss: Tensor) -> Tensor:
    """The gradient that reaches the logits; a plain ``loss.backward()`` copies nothing."""
    if type(grad_loss) is not Tensor:  # being traced
        return dlogits * grad_loss
    if select_impl(ctx.impl, dlogits.device) is Impl.CUDA:
        if getattr(ctx, "is_scaled", False):
            raise RuntimeError("weighted_cross_entropy: on a GPU its backward runs only once")
        ctx.is_scaled = True
        _C.scale_gradient_cuda(dlogits, grad_loss, *cuda_stream(dlogits.device))
        return dlogits
    if grad_loss.device.type == "cpu" and grad_loss == 1.0:
        return dlogits
    return dlogits * grad_loss


class _InplaceBackward(torch.autograd.Function):
    """The gradient takes the place of the logits during the forward."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        weight: Tensor,
        kind: Tensor,
        normaliser: float | Tensor,
        impl: Impl | str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ctx.impl = impl
        ctx.dlogits = logits.detach()
        outputs = _run(logits, labels, weight, kind, normaliser, ctx.dlogits, impl)
        torch.autograd.graph.increment_version(logits)  # whoever saved them finds out
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
        return _scaled(ctx, ctx.dlogits, grad_loss), None, None, None, None, None


library.define(
    "weighted_cross_entropy(Tensor logits, Tensor labels, Tensor weight, Tensor kind, "
    "Tensor normaliser, bool needs_grad, str impl) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


@torch.library.impl(library, "weighted_cross_entropy", "CompositeExplicitAutograd")
def _weighted_cross_entropy_op(
    logits: Tensor, labels: Tensor, weight: Tensor, kind: Tensor, normaliser: Tensor,
    needs_grad: bool, impl: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    dlogits = _empty_gradient(logits, needs_grad)
    outputs = _run(logits, labels, weight, kind, normaliser, dlogits if needs_grad else None, impl)
    return (*outputs, dlogits)


@torch.library.register_fake("pdiff::weighted_cross_entropy", lib=library)
def _weighted_cross_entropy_fake(
    logits: Tensor, labels: Tensor, weight: Tensor, kind: Tensor, normaliser: Tensor,
    needs_grad: bool, impl: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    return (*_empty_outputs(logits), _empty_gradient(logits, needs_grad))


def _empty_gradient(logits: Tensor, needs_grad: bool) -> Tensor:
    return logits.new_empty(tuple(logits.shape) if needs_grad else (0,))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.impl = inputs[-1]
    ctx.save_for_backward(output[4])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_loss: Tensor | None, *unused: Tensor | None) -> tuple[Any, ...]:
    (dlogits,) = ctx.saved_tensors
    grad = None if grad_loss is None else _scaled(ctx, dlogits, grad_loss)
    return grad, None, None, None, None, None, None


torch.library.register_autograd(
    "pdiff::weighted_cross_entropy", _backward, setup_context=_setup_context, lib=library
)
