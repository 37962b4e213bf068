"""One unmasking step against torch, eager and compiled, with one read of the logits as the limit.

320 rows of 152,064 logits, 8 spans that write 4 positions each. Two sets of logits take turns, so
that no call finds its input in the last cache.

    greedy    entropy, argmax and the per-span top-k
    sampled   temperature 0.7
    filtered  temperature 0.7, top-p 0.95 and top-k 50, which torch does by sorting
    nucleus   temperature 1 and top-p 0.95 on logits so flat that most of the vocabulary stays
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pdiff_runtime import ops
from pdiff_runtime.bench.case import DTYPES, Call, Case, Limit, Prepared, read_once, wants_compiled
from pdiff_runtime.bench.peers import score_rows, torch_step

KERNEL = "unmask"
ROWS, VOCAB_SIZE, QUOTA = 320, 152_064, 4
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 0.7},
    "filtered": {"temperature": 0.7, "top_p": 0.95, "top_k": 50},
    "nucleus": {"temperature": 1.0, "top_p": 0.95},
}


def cases(scale: int = 1) -> list[Case]:
    """Every setting and dtype; sweeps over rows and vocabulary."""

    def case(name: str, dtype: str, rows: int, vocab_size: int, setting: str) -> Case:
        prepare = functools.partial(_step, SETTINGS[setting], dtype, rows, vocab_size // scale)
        return Case(KERNEL, name, dtype, prepare)

    alone = [
        case(name, dtype, ROWS // scale, VOCAB_SIZE, name)
        for name in SETTINGS
        for dtype in DTYPES
        if dtype != "fp16" or name == "greedy"
    ]
    rows = [
        (setting, "rows", n, n, VOCAB_SIZE)
        for setting in ("greedy", "filtered")
        for n in (1, 2, 8, 32, 128)
    ]
    vocabularies = [
        (setting, "vocabulary", n, 64, n)
        for setting in ("greedy", "filtered")
        for n in (1000, 8000, 32_000, 128_000, 300_000)
    ]
    return alone + [
        Case(
            KERNEL, f"{axis}, {setting}", "fp32",
            functools.partial(
                _step, SETTINGS[setting], "fp32", num_rows, max(64, vocab_size // scale), False
            ),
            at, axis,
        )
        for setting, axis, at, num_rows, vocab_size in rows + vocabularies
    ]  # fmt: skip


def _step(
    settings: Mapping[str, Any], dtype: str, num_rows: int, vocab_size: int, compiled: bool = True
) -> Prepared:
    num_spans = max(1, min(8, num_rows // QUOTA))
    row_position = torch.arange(num_rows, dtype=torch.int32)
    cu_rows_span = (torch.arange(num_spans + 1) * num_rows // num_spans).int()
    quota = min(QUOTA, num_rows)
    num_unmask = torch.full((num_spans,), quota, dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)
    both = [
        (2 * torch.randn(num_rows, vocab_size, generator=generator)).to(DTYPES[dtype])
        for _ in range(2)
    ]
    turns = itertools.cycle(both)
    token_ids = torch.zeros(num_rows, dtype=torch.int64)

    def ours() -> ops.UnmaskStats:
        return ops.unmask_(
            token_ids, next(turns), row_position, cu_rows_span, num_unmask, **settings
        )

    confidence, candidate = score_rows(both[0], **settings)
    stats = ours()
    torch.testing.assert_close(stats.confidence, confidence, rtol=1e-3, atol=1e-3)
    if not settings:
        assert torch.equal(stats.candidate, candidate)

    def peer(score: Callable[..., tuple[Tensor, Tensor]]) -> Call:
        return lambda: torch_step(
            score, token_ids, next(turns), row_position, cu_rows_span.tolist(), quota, **settings
        )

    calls = {"torch, eager": peer(score_rows)}
    if not settings and compiled and wants_compiled():
        torch.compiler.reset()
        calls["torch, compiled"] = peer(torch.compile(score_rows))
    limit = Limit("one read", lambda: read_once(next(turns)), both[0].nbytes)
    return Prepared(ours, calls, both[0].nbytes, "B", limit)
