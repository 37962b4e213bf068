"""Loss and gradient with respect to the logits against torch, eager and compiled.

256 rows of 152,064 logits. Two sets take turns, so that no call finds its input in the last cache.
`fresh` writes the gradient to a buffer of its own, `in place` over the logits; torch's path is the
float32 one: ``cross_entropy(logits.float(), reduction="none")``, weighted, backward. Bytes are one
read of the logits and one write of the gradient.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from pdiff_runtime import ops
from pdiff_runtime.bench.case import DTYPES, Call, Case, Limit, Prepared, wants_compiled

KERNEL = "weighted_cross_entropy"
ROWS, VOCAB_SIZE, NORMALISER = 256, 152_064, 250.0


def cases(scale: int = 1) -> list[Case]:
    """Both ways in every dtype; a sweep over rows."""
    alone = [
        Case(
            KERNEL, "in place" if in_place else "fresh", dtype,
            functools.partial(_step, dtype, ROWS // scale, VOCAB_SIZE // scale, in_place),
        )
        for in_place in (False, True)
        for dtype in DTYPES
    ]  # fmt: skip
    return alone + [
        Case(
            KERNEL, "rows", "fp32",
            functools.partial(_step, "fp32", rows, VOCAB_SIZE // scale, False, False),
            rows, "rows",
        )
        for rows in (1, 4, 16, 64, 256)
    ]  # fmt: skip


def _step(
    dtype: str, num_rows: int, vocab_size: int, in_place: bool, compiled: bool = True
) -> Prepared:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    both = [(2 * random(num_rows, vocab_size)).to(DTYPES[dtype]).requires_grad_() for _ in range(2)]
    turns = itertools.cycle(both)
    labels = torch.randint(0, vocab_size, (num_rows,), generator=generator)
    weight = torch.rand(num_rows, generator=generator) + 1.0
    kind = torch.randint(0, 2, (num_rows,), generator=generator, dtype=torch.uint8)

    def torch_loss(logits: Tensor) -> Tensor:
        ce = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")
        return (ce * weight).sum() / NORMALISER

    def ours(inplace_backward: bool = in_place) -> Tensor:
        leaf = next(turns)
        logits = leaf.view(num_rows, vocab_size)
        loss = ops.weighted_cross_entropy(
            logits, labels, weight, kind, normaliser=NORMALISER, inplace_backward=inplace_backward
        ).loss
        return torch.autograd.grad(loss, leaf)[0]

    def peer(loss: Callable[[Tensor], Tensor] = torch_loss) -> Tensor:
        logits = next(turns)
        return torch.autograd.grad(loss(logits), logits)[0]

    gradient, expected = ours(False), (next(turns), peer())[1]
    torch.testing.assert_close(gradient, expected, rtol=1e-2, atol=1e-6)
    num_bytes = both[0].nbytes
    source, target = both[0].detach().clone(), torch.empty_like(both[0].detach())
    limit = Limit("a copy", lambda: target.copy_(source), 2 * num_bytes)
    if in_place:
        # Logits become gradients and stay numbers near 0: not what the peers should be given.
        return Prepared(ours, {}, 2 * num_bytes, "B", limit)
    calls: dict[str, Call] = {"torch, eager": peer}
    if compiled and wants_compiled():
        torch.compiler.reset()
        calls["torch, compiled"] = functools.partial(peer, torch.compile(torch_loss))
    return Prepared(ours, calls, 2 * num_bytes, "B", limit)
