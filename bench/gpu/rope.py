"""Rotary embedding and the write of keys and values into pages, against torch's several passes.

Inputs are not rotated: those of a denoise step are in the L2 cache when a model has just made them,
too, so their rate may be beyond the memory's.
"""

from __future__ import annotations

import functools

import torch
from device import DEVICE, Call, compiled
from records import Bench, Work, random
from torch import Tensor

from pdiff_runtime import ops
from pdiff_runtime.ops import Impl, reference

PAGE_SIZE = 64


def run(bench: Bench) -> None:
    """Rows of a prefill, and of a denoise step."""
    for rows in (8192, 300):
        bench.case(f"rope, {rows} rows", functools.partial(_case, bench, rows))


class Problem:
    """q, k, v as parts of one projection; every row has a slot."""

    def __init__(self, rows: int, heads_q: int = 28, heads_kv: int = 4, head_dim: int = 128):
        self.rows = rows
        qkv = random(rows, heads_q + 2 * heads_kv, head_dim)
        self.q, self.k, self.v = qkv.split([heads_q, heads_kv, heads_kv], dim=1)
        angle = torch.rand(rows, head_dim // 2, device=DEVICE)
        self.cos, self.sin = angle.cos(), angle.sin()
        self.positions = torch.arange(rows, device=DEVICE)
        num_pages = -(-rows // PAGE_SIZE)
        self.slots = torch.randperm(num_pages * PAGE_SIZE, device=DEVICE)[:rows]
        self.caches = [random(num_pages, PAGE_SIZE, heads_kv, head_dim) for _ in range(2)]

    def ours(self, impl: Impl) -> None:
        ops.rope_kv_write_(
            self.q, self.k, self.v, self.cos, self.sin, self.positions, self.slots, *self.caches,
            impl=impl,
        )  # fmt: skip

    @property
    def num_bytes(self) -> int:
        """q read and written; k read, and written to its place and to its page; v moved."""
        return 2 * (2 * self.q.numel() + 3 * self.k.numel() + 2 * self.v.numel())


def _torch(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, positions: Tensor,
           slots: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:  # fmt: skip
    c, s = (table[positions][:, None] for table in (cos, sin))
    for x in (q, k):
        a, b = x.float().chunk(2, dim=-1)
        x.copy_(torch.cat([a * c - b * s, b * c + a * s], dim=-1))
    k_cache.flatten(0, 1)[slots] = k
    v_cache.flatten(0, 1)[slots] = v


def _case(bench: Bench, rows: int) -> None:
    workload = f"rope, {rows} rows"
    for impl in bench.impls:
        bench.check(workload, impl, functools.partial(_check, impl))
    problem = Problem(rows) if not bench.is_tiny else Problem(8, 7, 1, 32)
    p = problem
    arguments = (p.q, p.k, p.v, p.cos, p.sin, p.positions, p.slots, *p.caches)
    fused = compiled(_torch)
    calls = {str(impl): Call(lambda _, impl=impl: problem.ours(impl)) for impl in bench.impls}
    calls["eager torch"] = Call(lambda _: _torch(*arguments))
    calls["compiled torch"] = Call(lambda _: fused(*arguments))
    bench.measure(workload, calls, Work(problem.num_bytes, "GB/s"))


def _check(impl: Impl) -> None:
    actual = Problem(37, 7, 1, 32)
    copy = Problem(37, 7, 1, 32)
    for name in ("q", "k", "v", "cos", "sin", "slots"):
        setattr(copy, name, getattr(actual, name).clone())
    copy.caches = [cache.clone() for cache in actual.caches]
    actual.ours(impl)
    reference.rope_kv_write_(
        copy.q, copy.k, copy.v, copy.cos, copy.sin, copy.positions, copy.slots, *copy.caches
    )
    for name in ("q", "k"):
        torch.testing.assert_close(
            getattr(actual, name), getattr(copy, name), rtol=2**-7, atol=1e-5
        )
    for x, y in zip(actual.caches, copy.caches, strict=True):
        torch.testing.assert_close(x, y, rtol=2**-7, atol=1e-5)
