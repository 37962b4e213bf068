"""Hybrid attention against torch: dense-mask and causal SDPA, compiled FlexAttention, GEMM's rate.

    pytest bench/bench_hybrid_attention.py --benchmark-only -s

Rates count visible (query, key) pairs only: forward 4 * heads * head_dim * pairs, backward 2.5
times that. SDPA gets its keys gathered and repeated over the heads of a group beforehand, and its
mask in the type it is fastest with; plain causal SDPA answers another question and is there as a
scale.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from measure import Timing, alternate
from peers import dense_bias, inputs_of, peers_of, plan_of
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from workloads import ATTENTION, AttentionWorkload, long_document

from pdiff_runtime.ops import hybrid_attention

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def report(
    shape: str, timings: dict[str, Timing], flops: float, gemm_rate: float | None = None
) -> None:
    ours = timings["hybrid_attention"].seconds
    for name, timing in timings.items():
        rate = flops / timing.seconds
        share = f"{100 * rate / gemm_rate:6.1f} % of GEMM" if gemm_rate else ""
        times_ours = timing.seconds / ours
        print(
            f"{shape:24} {name:18} {timing} {rate / 1e9:8.1f} GFLOP/s {share} {times_ours:6.2f} x"
        )


def gemm_call(dtype: torch.dtype, flops: float) -> tuple[Callable[[], None], int]:
    """Square products of about `flops` together, and how much that is exactly."""
    size = 2048
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    repeats = max(1, round(flops / (2 * size**3)))

    def call() -> None:
        for _ in range(repeats):
            torch.mm(a, b)

    return call, repeats * 2 * size**3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.benchmark(group="hybrid attention forward")
def bench_forward(benchmark, name, dtype, threads):
    workload = ATTENTION[name]
    plan = plan_of(workload)
    q, k, v = inputs_of(plan, DTYPES[dtype])
    peers = peers_of(plan, q, k, v)
    bias = dense_bias(plan, DTYPES[dtype])
    mask = bias == 0
    ours = functools.partial(hybrid_attention, q, k, v, plan)
    dense = functools.partial(scaled_dot_product_attention, *peers["repeated"], attn_mask=bias)
    torch.testing.assert_close(
        ours(), dense()[0].transpose(0, 1), atol=2e-2, rtol=2e-2, check_dtype=False
    )
    calls = {"hybrid_attention": ours, "SDPA, dense mask": dense}
    if mask.shape[0] == mask.shape[1]:
        calls["SDPA, causal"] = functools.partial(
            scaled_dot_product_attention, *peers["repeated"], is_causal=True
        )
    if os.environ.get("BENCH_FLEX", "1") == "1":
        block_mask = create_block_mask(
            lambda b, h, row, key: mask[row, key], 1, 1, *mask.shape, device="cpu"
        )
        torch.compiler.reset()
        flex = torch.compile(flex_attention, dynamic=False)
        group = plan.num_heads_q != plan.num_heads_kv
        calls["FlexAttention"] = functools.partial(
            flex, *peers["grouped"], block_mask=block_mask, enable_gqa=group
        )
    gemm, gemm_flops = gemm_call(DTYPES[dtype], workload.forward_flops)
    with torch.inference_mode():
        timings = alternate({**calls, "gemm": gemm})
    gemm_rate = gemm_flops / timings.pop("gemm").seconds
    report(f"{name} {dtype} forward", timings, workload.forward_flops, gemm_rate)
    benchmark.extra_info |= {peer: timing.ms for peer, timing in timings.items()}
    benchmark.pedantic(ours, rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["long", "paper", "training"])
@pytest.mark.benchmark(group="hybrid attention backward")
def bench_backward(benchmark, name, dtype, threads):
    workload = ATTENTION[name]
    plan = plan_of(workload)
    q, k, v = inputs_of(plan, DTYPES[dtype])
    bias = dense_bias(plan, DTYPES[dtype])

    def backward_of(leaves, out):
        dout = torch.randn_like(out)
        return functools.partial(torch.autograd.grad, out, leaves, dout, retain_graph=True)

    leaves = [x.requires_grad_() for x in (q, k, v)]
    ours = backward_of(leaves, hybrid_attention(*leaves, plan))
    peers = [x.detach().requires_grad_() for x in peers_of(plan, *leaves)["repeated"]]
    timings = alternate(
        {
            "hybrid_attention": ours,
            "SDPA, dense mask": backward_of(
                peers, scaled_dot_product_attention(*peers, attn_mask=bias)
            ),
            "SDPA, causal": backward_of(
                peers, scaled_dot_product_attention(*peers, is_causal=True)
            ),
        }
    )
    flops = 2.5 * workload.forward_flops
    report(f"{name} {dtype} backward", timings, flops)
    benchmark.extra_info |= {peer: timing.ms for peer, timing in timings.items()}
    benchmark.pedantic(ours, rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.benchmark(group="attention plan")
def bench_plan(benchmark, name):
    workload = ATTENTION[name]
    plan = benchmark(plan_of, workload)
    benchmark.extra_info["nbytes"] = plan.words.nbytes


@pytest.mark.benchmark(group="attention call")
def bench_call_overhead(benchmark):
    """One row and one key: what is left is the call itself."""
    workload = AttentionWorkload((long_document(1, context=1, num_rounds=1),), 1, 1, 16)
    plan = plan_of(workload)
    q, k, v = inputs_of(plan, torch.float32)
    with torch.inference_mode():
        benchmark(hybrid_attention, q, k, v, plan)


def peak_bytes(call: Callable[[], object]) -> tuple[object, int]:
    """What a call returns, and by how much memory in use grew at its highest (Linux)."""
    status = Path("/proc/self/status")

    def resident(field: str) -> int:
        line = next(x for x in status.read_text().splitlines() if x.startswith(field))
        return 1024 * int(line.split()[1])

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    result = call()
    return result, resident("VmHWM") - before


def print_peaks_at(num_tokens: int) -> None:
    """Bytes that one forward and its backward take, their results included."""
    workload = AttentionWorkload((long_document(num_tokens),), 2, 1, 64)
    plan = plan_of(workload)
    leaves = [x.requires_grad_() for x in inputs_of(plan, torch.bfloat16)]
    out, forward = peak_bytes(lambda: hybrid_attention(*leaves, plan))
    dout = torch.randn_like(out)
    _, backward = peak_bytes(lambda: torch.autograd.grad(out, leaves, dout))
    print(forward, backward)


@pytest.mark.parametrize("num_tokens", [8192, 16384, 32768])
@pytest.mark.benchmark(group="attention memory")
def bench_peak_memory(benchmark, num_tokens):
    """2 query heads of 64: out is 256 bytes a token, dq, dk and dv are 512, a mask grows with n."""
    code = f"import bench_hybrid_attention as b; b.print_peaks_at({num_tokens})"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}

    def run() -> str:
        return subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True,
            cwd=Path(__file__).parent, env=environment,
        ).stdout  # fmt: skip

    forward, backward = (int(x) / num_tokens for x in benchmark.pedantic(run).split())
    benchmark.extra_info |= {"forward_bytes": forward, "backward_bytes": backward}
    print(
        f"\n{num_tokens} tokens: {forward:.0f} bytes a token for the forward, "
        f"{backward:.0f} for the backward; a dense bf16 mask takes {2 * num_tokens}"
    )
