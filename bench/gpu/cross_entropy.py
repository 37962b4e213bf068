"""Weighted cross-entropy with its gradient in place against torch's float32 path.

4096 rows of 152,064 bfloat16 logits. Ours writes the gradient over the logits, so they are copied
anew before each call, which is not timed; limit: each logit read once and written once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from device import DEVICE, Call, compiled
from records import Bench, Work, random
from torch import Tensor

from pdiff_runtime import ops
from pdiff_runtime.ops import Impl, reference

NORMALISER = 4000.0


def run(bench: Bench) -> None:
    """One shape."""
    bench.case("weighted cross-entropy in place", functools.partial(_case, bench))


class Problem:
    """Random logits, labels and weights."""

    def __init__(self, rows: int, vocab_size: int) -> None:
        self.logits = 2 * random(rows, vocab_size)
        self.labels = torch.randint(0, vocab_size, (rows,), device=DEVICE)
        self.weight = torch.rand(rows, device=DEVICE) + 1.0
        self.kind = torch.randint(0, 2, (rows,), device=DEVICE, dtype=torch.uint8)

    def ours(self, leaf: Tensor, impl: Impl, inplace: bool = True) -> Tensor:
        """The gradient with respect to the leaf."""
        loss = ops.weighted_cross_entropy(
            leaf.view(leaf.shape), self.labels, self.weight, self.kind, normaliser=NORMALISER,
            inplace_backward=inplace, impl=impl,
        ).loss  # fmt: skip
        return torch.autograd.grad(loss, leaf)[0]

    def torch_loss(self, logits: Tensor) -> Tensor:
        ce = torch.nn.functional.cross_entropy(logits.float(), self.labels, reduction="none")
        return (ce * self.weight).sum() / NORMALISER


def _case(bench: Bench) -> None:
    workload = "weighted cross-entropy in place"
    for impl in bench.impls:
        bench.check(workload, impl, functools.partial(_check, impl))
    problem = Problem(*((8, 1000) if bench.is_tiny else (4096, 152_064)))
    buffer = problem.logits.clone().requires_grad_()

    @torch.no_grad()
    def refill(_: int) -> None:
        buffer.copy_(problem.logits)

    def peer(loss: Callable[[Tensor], Tensor], _: int) -> Tensor:
        return torch.autograd.grad(loss(buffer), buffer)[0]

    calls = {
        str(impl): Call(lambda _, impl=impl: problem.ours(buffer, impl), refill)
        for impl in bench.impls
    }
    calls |= {
        f"{impl}, own buffer": Call(lambda _, impl=impl: problem.ours(buffer, impl, False), refill)
        for impl in bench.impls
    }
    calls["eager torch"] = Call(functools.partial(peer, problem.torch_loss), refill)
    calls["compiled torch"] = Call(functools.partial(peer, compiled(problem.torch_loss)), refill)
    bench.measure(workload, calls, Work(2 * buffer.nbytes, "GB/s"))


def _check(impl: Impl) -> None:
    small = Problem(16, 1003)
    expected = torch.empty(small.logits.shape, dtype=torch.float64, device=DEVICE)
    loss, *_ = reference.weighted_cross_entropy(
        small.logits, small.labels, small.weight, small.kind, NORMALISER, expected
    )
    got = ops.weighted_cross_entropy(
        small.logits, small.labels, small.weight, small.kind, normaliser=NORMALISER, impl=impl
    )
    torch.testing.assert_close(got.loss, loss, rtol=1e-5, atol=0.0)
    leaf = small.logits.clone().requires_grad_()
    torch.testing.assert_close(
        small.ours(leaf, impl).double(), expected, rtol=2**-7, atol=2**-24 / NORMALISER
    )
