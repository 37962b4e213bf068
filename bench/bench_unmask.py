"""One unmasking step against torch: eager, compiled, and one read of the logits as the limit.

    pytest bench/bench_unmask.py --benchmark-only -s

320 rows of 152,064 logits, 8 spans that write 4 positions each. Two sets of logits take turns, so
that no call finds its input in the last cache. `greedy` is entropy, argmax and the per-span top-k;
`filtered` has temperature 0.7, top-p 0.95 and top-k 50, which torch does by sorting; `nucleus` has
temperature 1 and top-p 0.95 on logits so flat that most of the vocabulary stays.
"""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from measure import alternate
from peers import score_rows, torch_step

from pdiff_runtime import ops

ROWS, VOCAB_SIZE, NUM_SPANS, QUOTA = 320, 152_064, 8, 4
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SETTINGS = {
    "greedy": {},
    "sampled": {"temperature": 0.7},
    "filtered": {"temperature": 0.7, "top_p": 0.95, "top_k": 50},
    "nucleus": {"temperature": 1.0, "top_p": 0.95},
}

ROW_POSITION = torch.arange(ROWS, dtype=torch.int32)
CU_ROWS_SPAN = torch.arange(NUM_SPANS + 1, dtype=torch.int32) * (ROWS // NUM_SPANS)
NUM_UNMASK = torch.full((NUM_SPANS,), QUOTA, dtype=torch.int32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.benchmark(group="unmask")
def bench_unmask(benchmark, name, dtype, threads):
    settings = SETTINGS[name]
    generator = torch.Generator().manual_seed(0)
    both = [
        (2 * torch.randn(ROWS, VOCAB_SIZE, generator=generator)).to(DTYPES[dtype]) for _ in range(2)
    ]
    turns = itertools.cycle(both)
    token_ids = torch.zeros(ROWS, dtype=torch.int64)

    def ours() -> ops.UnmaskStats:
        return ops.unmask_(
            token_ids, next(turns), ROW_POSITION, CU_ROWS_SPAN, NUM_UNMASK, **settings
        )

    confidence, candidate = score_rows(both[0], **settings)
    stats = ours()
    torch.testing.assert_close(stats.confidence, confidence, rtol=1e-3, atol=1e-3)
    if name == "greedy":
        assert torch.equal(stats.candidate, candidate)

    def peer(score) -> None:
        torch_step(
            score, token_ids, next(turns), ROW_POSITION, CU_ROWS_SPAN.tolist(), QUOTA, **settings
        )

    calls = {
        "unmask_": ours,
        "eager": functools.partial(peer, score_rows),
        "one read": lambda: next(turns).view(torch.float32).sum(),
    }
    if name == "greedy":
        calls["compiled"] = functools.partial(peer, torch.compile(score_rows))
    timings = alternate(calls, max_seconds=20.0)
    read = timings["one read"].seconds
    for peer, timing in timings.items():
        share, ratio = 100 * read / timing.seconds, timing.seconds / timings["unmask_"].seconds
        print(f"{name:9} {dtype} {peer:9} {timing} {share:6.1f} % of one read {ratio:7.2f} x")
    benchmark.extra_info |= {peer: timing.ms for peer, timing in timings.items()}
    benchmark.pedantic(ours, rounds=5, warmup_rounds=1)
