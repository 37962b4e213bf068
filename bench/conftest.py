"""Kernel benches as pytest-benchmark cases: each case of `pdiff_runtime.bench` is one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from pdiff_runtime.bench.case import Case, text_of
from pdiff_runtime.bench.measure import machine


@pytest.fixture(params=[1, None], ids=["1thread", "all_threads"])
def threads(request):
    """One thread, then all; the machine is printed above each report."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param or before)
    print(f"\n{machine()}")
    yield torch.get_num_threads()
    torch.set_num_threads(before)


def bench_of(cases: Sequence[Case]) -> Callable[..., None]:
    """A bench of the cases that stand alone: ours and its peers by turns, then ours again."""

    @pytest.mark.parametrize("case", [case for case in cases if case.at is None], ids=str)
    @pytest.mark.benchmark(group=cases[0].kernel)
    def bench(benchmark, case: Case, threads: int) -> None:
        prepared = case.prepare()
        record = case.measure(prepared)
        print(text_of(record))
        benchmark.extra_info |= record
        benchmark.pedantic(prepared.ours, rounds=5, warmup_rounds=1)

    return bench
