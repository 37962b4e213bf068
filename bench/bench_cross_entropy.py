"""Loss and gradient with respect to the logits against torch: eager, compiled, one read as limit.

    pytest bench/bench_cross_entropy.py --benchmark-only -s

256 rows of 152,064 logits. Two sets take turns, so that no call finds its input in the last cache.
`fresh` writes the gradient to a buffer of its own, `inplace` over the logits; torch's path is the
float32 one: `cross_entropy(logits.float(), reduction="none")`, weighted, backward.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from measure import alternate
from torch import Tensor

from pdiff_runtime import ops

ROWS, VOCAB_SIZE, NORMALISER = 256, 152_064, 250.0
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.benchmark(group="weighted cross-entropy")
def bench_cross_entropy(benchmark, dtype, threads):
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    both = [(2 * random(ROWS, VOCAB_SIZE)).to(DTYPES[dtype]).requires_grad_() for _ in range(2)]
    turns = itertools.cycle(both)
    labels = torch.randint(0, VOCAB_SIZE, (ROWS,), generator=generator)
    weight = torch.rand(ROWS, generator=generator) + 1.0
    kind = torch.randint(0, 2, (ROWS,), generator=generator, dtype=torch.uint8)

    def torch_loss(logits: Tensor) -> Tensor:
        ce = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")
        return (ce * weight).sum() / NORMALISER

    def ours(inplace_backward: bool = False) -> Tensor:
        leaf = next(turns)
        logits = leaf.view(ROWS, VOCAB_SIZE)
        loss = ops.weighted_cross_entropy(
            logits, labels, weight, kind, normaliser=NORMALISER, inplace_backward=inplace_backward
        ).loss
        return torch.autograd.grad(loss, leaf)[0]

    def peer(loss=torch_loss) -> Tensor:
        logits = next(turns)
        return torch.autograd.grad(loss(logits), logits)[0]

    gradient, expected = ours(), (next(turns), peer())[1]
    torch.testing.assert_close(gradient, expected, rtol=1e-2, atol=1e-6)

    compiled = torch.compile(torch_loss)
    calls = {
        "fresh": ours,
        "eager": peer,
        "compiled": lambda: peer(compiled),
        "one read": lambda: next(turns).detach().view(torch.float32).sum(),
    }
    timings = alternate(calls, max_seconds=20.0)
    # Logits become gradients and stay random numbers near 0: not what the peers should be given.
    timings |= alternate({"inplace": lambda: ours(inplace_backward=True)}, max_seconds=5.0)
    for name, timing in timings.items():
        ratio = timing.seconds / timings["fresh"].seconds
        print(f"{dtype} {name:9} {timing} {ratio:7.2f} x")
    benchmark.extra_info |= {name: timing.ms for name, timing in timings.items()}
    benchmark.pedantic(ours, rounds=5, warmup_rounds=1)
