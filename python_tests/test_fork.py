"""Kernels in a process that was forked after the parent had used them with several threads."""

import os
import signal
import time
from collections.abc import Callable

import pytest
import torch

from pdiff_runtime import ops
from pdiff_runtime.testing.problems import AttentionProblem

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
SECONDS = 30


def every_op() -> list[Callable[[], list[torch.Tensor]]]:
    """Calls of all CPU kernels, each with work for several threads, torch's own part done."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    plan = AttentionProblem("many_spans").plan()
    inputs = AttentionProblem("many_spans").inputs(plan)
    dout = random(*inputs[0].shape)
    logits, token_ids = random(12, 50_000), torch.zeros(12, dtype=torch.int64)
    row_position = torch.arange(12, dtype=torch.int32)
    cu_rows_span, num_unmask = torch.tensor([0, 12]).int(), torch.tensor([5]).int()
    labels, kind, weight = torch.arange(12), torch.zeros(12, dtype=torch.uint8), torch.ones(12)
    q, k, cos, sin = random(600, 4, 64), random(600, 2, 64), random(600, 32), random(600, 32)
    positions, weights = torch.arange(600), random(256)

    def attention() -> list[torch.Tensor]:
        out, lse = ops.hybrid_attention(*inputs, plan, return_lse=True)
        backward = torch.ops.pdiff.hybrid_attention_backward
        return [out, lse, *backward(dout, None, *inputs, out, lse, plan.words, 0.125, "cpu")]

    def unmask() -> list[torch.Tensor]:
        settings = {"temperature": 0.7, "top_p": 0.9}
        ops.unmask_(token_ids, logits, row_position, cu_rows_span, num_unmask, **settings)
        return [token_ids]

    def cross_entropy() -> list[torch.Tensor]:
        return [ops.weighted_cross_entropy(logits, labels, weight, kind, normaliser=12.0).loss]

    def rope() -> list[torch.Tensor]:
        rotated = [torch.from_numpy(x.numpy().copy()) for x in (q, k)]
        ops.rope_kv_write_(*rotated, None, cos, sin, positions, None, None, None)
        return rotated

    def norms() -> list[torch.Tensor]:
        rows = q.view(-1, 256)
        return [ops.rms_norm(rows, weights, 1e-6), ops.swiglu(rows, rows)]

    return [attention, unmask, cross_entropy, rope, norms]


def bits_of(calls: list[Callable[[], list[torch.Tensor]]]) -> list[bytes]:
    return [x.numpy().tobytes() for call in calls for x in call()]


def test_a_forked_process_computes_the_same():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        calls = every_op()
        expected = bits_of(calls)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                status = 0 if bits_of(calls) == expected else 2
            finally:
                os._exit(status)
        deadline = time.monotonic() + SECONDS
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                pytest.fail(f"the child has not ended after {SECONDS} s")
            time.sleep(0.02)
        assert os.waitstatus_to_exitcode(ended[1]) == 0
    finally:
        torch.set_num_threads(before)
