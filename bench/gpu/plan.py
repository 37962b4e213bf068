"""What the plan of a batch costs: built on the host, and on the device from its token ids."""

from __future__ import annotations

import functools
import time

import numpy as np
import numpy.typing as npt
import torch
from device import DEVICE, ON_GPU, Call
from records import Bench
from torch import Tensor

from pdiff_runtime.bench.attention_plan import TAGS, rounds_of_spans
from pdiff_runtime.bench.peers import inputs_of, pages_of, plan_of
from pdiff_runtime.bench.workloads import gpu_attention
from pdiff_runtime.ops import AttentionPlan, Impl, hybrid_attention
from pdiff_runtime.plan import SpanLayout

TAG_IDS = {"async_start": TAGS.async_start, "async_end": TAGS.async_end, "sync": TAGS.sync}
HEADS = {"num_heads_q": 28, "num_heads_kv": 4, "head_dim": 128}


def run(bench: Bench) -> None:
    """Training batches of 32k tokens in 1k segments, then a denoise step."""
    bench.case("attention plan", functools.partial(_training, bench))
    bench.case("attention plan, denoise", functools.partial(_denoise, bench))


def _training(bench: Bench) -> None:
    tokens = rounds_of_spans(*((512, 20, 4) if bench.is_tiny else (32_768, 1000)))
    for impl in bench.impls:

        def on_host(impl=impl) -> AttentionPlan:
            layout = SpanLayout.from_tokens(tokens, TAGS)
            return AttentionPlan.pack([layout], **HEADS, device=DEVICE, impl=impl)

        bench.value("attention plan on the host, layout included", impl, _host_us(on_host), "us")
    on_device = torch.from_numpy(tokens).to(DEVICE)
    cu_seqlens = torch.tensor([0, len(tokens)], dtype=torch.int32, device=DEVICE)
    for impl in bench.impls:
        check = functools.partial(_same_attention, tokens, on_device, cu_seqlens, impl)
        bench.check("attention plan on the device", impl, check)
    calls = {
        str(impl): Call(
            lambda _, impl=impl: AttentionPlan.from_tokens(
                on_device, cu_seqlens, **TAG_IDS, **HEADS, impl=impl
            )
        )
        for impl in bench.impls
    }
    bench.measure("attention plan on the device", calls)


def _same_attention(
    tokens: npt.NDArray[np.int64], on_device: Tensor, cu_seqlens: Tensor, impl: Impl
) -> None:
    """Attention by a plan of the device is attention by a plan of the host."""
    heads = {"num_heads_q": 2, "num_heads_kv": 1, "head_dim": 64}
    layout = SpanLayout.from_tokens(tokens, TAGS)
    plans = (
        AttentionPlan.pack([layout], **heads, device=DEVICE, impl=impl),
        AttentionPlan.from_tokens(on_device, cu_seqlens, **TAG_IDS, **heads, impl=impl),
    )
    tensors = inputs_of(plans[0], torch.bfloat16)
    expected, actual = (hybrid_attention(*tensors, plan) for plan in plans)
    torch.testing.assert_close(actual, expected)


def _denoise(bench: Bench) -> None:
    workload = gpu_attention(128 if bench.is_tiny else 1)["denoise"]
    for impl in bench.impls:
        build = functools.partial(
            plan_of, workload, impl=impl, device=DEVICE, page_table=pages_of(workload)
        )
        bench.value("attention plan of a denoise step", impl, _host_us(build), "us")


def _host_us(build: functools.partial[AttentionPlan]) -> float:
    """Median microseconds on the host; the copy to the device is only issued."""
    samples = []
    for _ in range(30 if ON_GPU else 5):
        start = time.perf_counter()
        build()
        samples.append(1e6 * (time.perf_counter() - start))
    return sorted(samples)[len(samples) // 2]
