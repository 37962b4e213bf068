"""One unmasking step against torch, eager and compiled; its launches, and that it never waits.

1024 rows of 152,064 bfloat16 logits, 16 spans of 64 rows that write 4 positions each.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from device import DEVICE, ON_GPU, Call, compiled, rotated, synchronize
from records import Bench, Work, random
from torch import Tensor

from pdiff_runtime import ops
from pdiff_runtime.bench.peers import score_rows, torch_step
from pdiff_runtime.ops import Impl, reference

SETTINGS = {
    "entropy and argmax": {},
    "sampled": {"temperature": 0.7},
    "filtered": {"temperature": 0.7, "top_p": 0.95, "top_k": 50},
}
QUOTA = 4


def run(bench: Bench) -> None:
    """Whole steps, then the selection alone."""
    for name in SETTINGS:
        bench.case(f"unmask, {name}", functools.partial(_step, bench, name))
    bench.case("unmask, 256 rows", functools.partial(_step, bench, "entropy and argmax", 256))
    bench.case("unmask, select and scatter", functools.partial(_select, bench))


class Problem:
    """Spans of equal length over one pool of positions."""

    def __init__(self, num_rows: int, vocab_size: int, num_spans: int) -> None:
        self.num_rows, self.vocab_size, self.num_spans = num_rows, vocab_size, num_spans
        span = num_rows // num_spans
        self.row_position = torch.arange(num_rows, dtype=torch.int32, device=DEVICE)
        self.cu_rows = torch.arange(num_spans + 1, dtype=torch.int32, device=DEVICE) * span
        self.quota = min(QUOTA, span)
        self.num_unmask = torch.full_like(self.cu_rows[1:], self.quota)
        self.seeds = torch.arange(num_rows, device=DEVICE)
        self.token_ids = torch.zeros(num_rows, dtype=torch.int64, device=DEVICE)

    def logits(self) -> Tensor:
        return 2 * random(self.num_rows, self.vocab_size)

    def ours(self, logits: Tensor, impl: Impl, **settings: float) -> ops.UnmaskStats:
        return ops.unmask_(
            self.token_ids, logits, self.row_position, self.cu_rows, self.num_unmask,
            seeds=self.seeds, impl=impl, **settings,
        )  # fmt: skip


def _step(bench: Bench, name: str, num_rows: int = 1024) -> None:
    settings = SETTINGS[name]
    tiny = bench.is_tiny
    problem = Problem(*((16, 1000, 2) if tiny else (num_rows, 152_064, num_rows // 64)))
    workload = f"unmask, {name}" + ("" if num_rows == 1024 else f", {num_rows} rows")
    for impl in bench.impls:
        bench.check(workload, impl, functools.partial(_check, problem, impl, settings))
        if ON_GPU:
            call = functools.partial(problem.ours, problem.logits(), impl, **settings)
            bench.check(f"{workload}, no wait", impl, functools.partial(_never_waits, call))
            count = functools.partial(_count_launches, bench, workload, impl, call)
            bench.check(f"{workload}, launches", impl, count)
    pool = rotated(problem.logits)
    cu_rows = problem.cu_rows.tolist()

    def peer(score: Callable[..., tuple[Tensor, Tensor]], i: int) -> None:
        torch_step(
            score, problem.token_ids, pool[i % len(pool)], problem.row_position,
            cu_rows, problem.quota, **settings,
        )  # fmt: skip

    calls = {
        str(impl): Call(lambda i, impl=impl: problem.ours(pool[i % len(pool)], impl, **settings))
        for impl in bench.impls
    }
    calls["eager torch"] = Call(functools.partial(peer, score_rows))
    if not settings:
        calls["compiled torch"] = Call(functools.partial(peer, compiled(score_rows)))
    bench.measure(workload, calls, Work(pool[0].nbytes, "GB/s"))


def _select(bench: Bench) -> None:
    """256 spans of 256 rows, so few logits a row that what is left is ranking and writing.

    The kernel that ranks is timed by the profiler, those that score rows are left out.
    """
    if not ON_GPU:
        return
    problem = Problem(256 * 256, 16, 256)
    logits = problem.logits()
    for impl in bench.impls:
        call = functools.partial(problem.ours, logits, impl)
        kernels = _kernels(call, num_calls=30)
        print(sorted({name for name, _ in kernels}))
        ranking = sum(us for name, us in kernels if "select" in name) / 30
        bench.value("unmask, select and scatter", impl, ranking, "us")


def _check(problem: Problem, impl: Impl, settings: dict[str, float]) -> None:
    """Against the reference in float64, on the first two spans."""
    rows = int(problem.cu_rows[2])
    small = Problem(rows, problem.vocab_size, 2)
    logits = small.logits()
    stats = small.ours(logits, impl, **settings)
    token_ids = torch.zeros_like(small.token_ids)
    confidence, candidate, *_ = reference.unmask_(
        token_ids, logits, small.row_position, small.cu_rows, small.num_unmask, seeds=small.seeds,
        **settings,
    )  # fmt: skip
    torch.testing.assert_close(stats.confidence, confidence, rtol=1e-4, atol=1e-4)
    assert (stats.candidate != candidate).float().mean() < 0.01, "candidates differ"
    assert (small.token_ids != token_ids).float().mean() < 0.01, "written tokens differ"


def _never_waits(call: Callable[[], object]) -> None:
    """Torch sees no synchronisation, and the call can be captured in a graph and played again."""
    call()
    synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    graph.replay()


def _count_launches(bench: Bench, workload: str, impl: Impl, call: Callable[[], object]) -> None:
    kernels = _kernels(call)
    print(kernels)
    bench.value(f"{workload}, launches", impl, len(kernels), "kernels")


def _kernels(call: Callable[[], object], num_calls: int = 1) -> list[tuple[str, float]]:
    """Name and microseconds of each kernel that the calls launch."""
    call()
    synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(num_calls):
            call()
        synchronize()
    return [
        (event.name, event.device_time_total)
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.name.startswith("Mem")
    ]
