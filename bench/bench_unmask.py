"""One unmasking step against torch: eager, compiled, and one read of the logits as the limit.

    pytest bench/bench_unmask.py --benchmark-only -s

320 rows of 152,064 logits, 8 spans that write 4 positions each. Two sets of logits take turns, so
that no call finds its input in the last cache. `greedy` is entropy, argmax and the per-span top-k;
`filtered` has temperature 0.7, top-p 0.95 and top-k 50, which torch does by sorting; `nucleus` has
temperature 1 and top-p 0.95 on logits so flat that most of the vocabulary stays.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from measure import alternate
from torch import Tensor

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


def filtered_logits(logits: Tensor, top_p: float = 1.0, top_k: int = 0) -> Tensor:
    """Top-p, then top-k, by sorting."""
    if top_p < 1.0:
        ranked, order = logits.sort(dim=-1, descending=True)
        probs = ranked.softmax(-1)
        is_out = probs.cumsum(-1) - probs >= top_p
        logits = logits.masked_fill(is_out.scatter(1, order, is_out), -torch.inf)
    if top_k > 0:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    return logits


def score_rows(logits: Tensor, temperature: float = 0.0, **filters: float) -> tuple[Tensor, Tensor]:
    """Confidence and candidate of each row, in plain torch."""
    logits = logits.float()
    if temperature > 0:
        logits = logits / temperature
    logits = filtered_logits(logits, **filters)
    probs = logits.softmax(-1)
    confidence = (probs * torch.log(probs + 1e-10)).sum(-1)
    if temperature > 0:
        return confidence, probs.multinomial(1)[:, 0]
    return confidence, logits.argmax(-1)


def torch_step(score: Callable[..., tuple[Tensor, Tensor]], token_ids: Tensor, logits: Tensor,
               **settings: float) -> None:  # fmt: skip
    """What `unmask_` does, span by span."""
    confidence, candidate = score(logits, **settings)
    for lo, hi in itertools.pairwise(CU_ROWS_SPAN.tolist()):
        best = lo + confidence[lo:hi].topk(QUOTA).indices
        token_ids[ROW_POSITION[best].long()] = candidate[best]


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

    calls = {
        "unmask_": ours,
        "eager": lambda: torch_step(score_rows, token_ids, next(turns), **settings),
        "one read": lambda: next(turns).view(torch.float32).sum(),
    }
    if name == "greedy":
        compiled = torch.compile(score_rows)
        calls["compiled"] = lambda: torch_step(compiled, token_ids, next(turns), **settings)
    timings = alternate(calls, max_seconds=20.0)
    read = timings["one read"].seconds
    for peer, timing in timings.items():
        share, ratio = 100 * read / timing.seconds, timing.seconds / timings["unmask_"].seconds
        print(f"{name:9} {dtype} {peer:9} {timing} {share:6.1f} % of one read {ratio:7.2f} x")
    benchmark.extra_info |= {peer: timing.ms for peer, timing in timings.items()}
    benchmark.pedantic(ours, rounds=5, warmup_rounds=1)
