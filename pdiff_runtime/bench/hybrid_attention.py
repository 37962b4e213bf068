"""Hybrid attention against torch: SDPA with a dense mask and causal, compiled FlexAttention.

Rates count visible (query, key) pairs only: forward 4 * heads * head_dim * pairs, backward 2.5
times that; a batch of single rows counts the bytes of its keys and values. SDPA gets its keys
gathered out of their pages and repeated over the heads of a group beforehand, unless it says
otherwise, and its mask in the type it is fastest with; plain causal SDPA answers another question
and is there as a scale.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from pdiff_runtime.bench.case import (
    DTYPES,
    Call,
    Case,
    Limit,
    Prepared,
    read_once,
    wants_compiled,
)
from pdiff_runtime.bench.peers import dense_bias, inputs_of, peers_of, plan_of
from pdiff_runtime.bench.workloads import (
    AttentionWorkload,
    cpu_attention,
    denoise_step,
    document_of_spans,
    documents_of,
    long_document,
)
from pdiff_runtime.ops import AttentionPlan, hybrid_attention
from pdiff_runtime.plan import SpanLayout

Result = TypeVar("Result")

FORWARD, BACKWARD = "hybrid_attention", "hybrid_attention_backward"
MAX_DENSE_PAIRS = 1 << 26
"""A dense mask of more pairs than this is left out, and only the first sequence is checked."""


def forward_cases(scale: int = 1) -> list[Case]:
    """Workloads in all dtypes; sweeps over length, density and number of spans in bfloat16."""
    cases = [
        Case(FORWARD, name, dtype, functools.partial(_forward, workload, dtype))
        for name, workload in cpu_attention(scale).items()
        for dtype in ("fp32", "bf16", "fp16")
        if dtype != "fp16" or name in ("long", "paper")
    ]
    cases.append(Case(FORWARD, "1000 calls", "fp32", _calls))
    sweeps: list[tuple[str, str, float, AttentionWorkload]] = []
    for num_tokens in (1024, 2048, 4096, 8192, 16384, 32768):
        workload = documents_of(max(700, num_tokens // scale))
        sweeps.append(("documents", "tokens", workload.num_rows, workload))
    for num_spans in (1, 2, 4, 8, 32):
        workload = document_of_spans(max(512, 4096 // scale), num_spans)
        sweeps.append(("density", "share of pairs visible", round(workload.density, 3), workload))
    for num_spans in (1, 2, 4, 8, 16, 40, 80):
        workload = denoise_step(736 // scale, 480, num_spans)
        sweeps.append(("spans", "spans of 480 rows together", num_spans, workload))
    for name, axis, at, workload in sweeps:
        prepare = functools.partial(_forward, workload, "bf16", flex=False)
        cases.append(Case(FORWARD, name, "bf16", prepare, at, axis))
    has_peaks = Path("/proc/self/clear_refs").exists()
    for num_tokens in (8192 // scale, 16384 // scale, 32768 // scale) if has_peaks else ():
        prepare = functools.partial(_memory, num_tokens)
        cases.append(Case(FORWARD, f"memory at {num_tokens} tokens", "bf16", prepare))
    return cases


def backward_cases(scale: int = 1) -> list[Case]:
    """The workloads that are trained on."""
    return [
        Case(BACKWARD, name, dtype, functools.partial(_backward, workload, dtype))
        for name, workload in cpu_attention(scale).items()
        for dtype in ("fp32", "bf16", "fp16")
        if workload.page_size is None and (dtype != "fp16" or name == "long")
    ]


def _forward(workload: AttentionWorkload, dtype: str, flex: bool = True) -> Prepared:
    torch.manual_seed(0)
    plan = plan_of(workload)
    q, k, v = inputs_of(plan, DTYPES[dtype])
    ours = functools.partial(hybrid_attention, q, k, v, plan)
    peers = peers_of(plan, q, k, v)
    by_sequence = _by_sequence(plan, *peers["repeated"])
    _assert_close(ours()[: plan.layouts[0].num_rows], by_sequence[0]())
    calls: dict[str, Call] = {}
    notes: dict[str, float] = {}
    if len(by_sequence) > 1:
        calls["SDPA, dense mask, a call each"] = lambda: [call() for call in by_sequence]
    if plan.total_q * plan.total_kv <= MAX_DENSE_PAIRS:
        bias = dense_bias(plan, DTYPES[dtype])
        dense, causal = _sdpa(*peers["repeated"], bias), _sdpa(*peers["repeated"])
        _assert_close(ours(), dense())
        calls["SDPA, dense mask"] = dense
        if plan.page_size is not None:
            calls["gathered keys, then SDPA, dense mask"] = lambda: scaled_dot_product_attention(
                *peers_of(plan, q, k, v)["grouped"], attn_mask=bias, enable_gqa=True
            )
        if plan.total_q == plan.total_kv:
            calls["SDPA, causal"] = causal
        if flex and wants_compiled():
            call, notes["compile_s"] = _flex(*peers["grouped"], bias == 0)
            calls["FlexAttention, compiled"] = call
    flops, key_bytes = workload.forward_flops, k.nbytes + v.nbytes
    if flops < 20 * key_bytes:  # reading them takes longer than the products
        read = Limit("one read", lambda: (read_once(k), read_once(v)), key_bytes)
        return Prepared(ours, calls, key_bytes, "B", read, notes)
    return Prepared(ours, calls, flops, "FLOP", _product(DTYPES[dtype], flops), notes)


def _backward(workload: AttentionWorkload, dtype: str) -> Prepared:
    torch.manual_seed(0)
    plan = plan_of(workload)
    bias = dense_bias(plan, DTYPES[dtype])
    q, k, v = (x.requires_grad_() for x in inputs_of(plan, DTYPES[dtype]))
    out = hybrid_attention(q, k, v, plan)
    dout = torch.randn_like(out)
    ours = _gradients((q, k, v), out, dout)
    repeated = q, k, v = [x.detach().requires_grad_() for x in peers_of(plan, q, k, v)["repeated"]]
    dout = dout.transpose(0, 1)[None].contiguous()
    dense = _gradients(repeated, _sdpa(q, k, v, bias)(), dout)
    causal = _gradients(repeated, _sdpa(q, k, v)(), dout)
    _assert_close(ours()[0], dense()[0], 0.1)
    flops = 2.5 * workload.forward_flops
    calls = {"SDPA, dense mask": dense, "SDPA, causal": causal}
    return Prepared(ours, calls, flops, "FLOP", _product(DTYPES[dtype], flops))


def _calls() -> Prepared:
    """One row and one key: what is left is the call itself, microseconds in place of ms."""
    plan = plan_of(AttentionWorkload((SpanLayout.causal(1, 1),), 1, 1, 16))
    q, k, v = inputs_of(plan, torch.float32)

    def calls() -> None:
        for _ in range(1000):
            hybrid_attention(q, k, v, plan)

    return Prepared(calls)


def _memory(num_tokens: int) -> Prepared:
    """2 query heads of 64: out is 256 bytes a token, dq, dk and dv are 512, a mask grows with n."""
    code = f"import {__name__} as b; b.print_peaks_at({num_tokens})"
    # What is freed goes back to the system, or it would be used again and not be seen.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    child = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, env=environment,
        check=False,
    )  # fmt: skip
    if child.returncode != 0:
        raise ValueError(f"memory: {child.stderr.strip() or child.returncode}")
    forward, backward = (int(word) / num_tokens for word in child.stdout.split())
    workload = AttentionWorkload((long_document(num_tokens),), 2, 1, 64)
    plan = plan_of(workload)
    q, k, v = inputs_of(plan, torch.bfloat16)
    notes = {
        "forward_bytes_per_token": round(forward),
        "backward_bytes_per_token": round(backward),
        "dense_bf16_mask_bytes_per_token": 2 * num_tokens,
    }
    ours = functools.partial(hybrid_attention, q, k, v, plan)
    return Prepared(ours, work=workload.forward_flops, notes=notes)


def print_peaks_at(num_tokens: int) -> None:
    """Bytes that one forward and its backward take, their results included."""
    plan = plan_of(AttentionWorkload((long_document(num_tokens),), 2, 1, 64))
    q, k, v = (x.requires_grad_() for x in inputs_of(plan, torch.bfloat16))
    out, forward = _peak_bytes(lambda: hybrid_attention(q, k, v, plan))
    dout = torch.randn_like(out)
    _, backward = _peak_bytes(lambda: torch.autograd.grad(out, (q, k, v), dout))
    print(forward, backward)


def _peak_bytes(call: Callable[[], Result]) -> tuple[Result, int]:
    """What a call returns, and by how much memory in use grew at its highest (Linux)."""
    status = Path("/proc/self/status")

    def resident(field: str) -> int:
        line = next(x for x in status.read_text().splitlines() if x.startswith(field))
        return 1024 * int(line.split()[1])

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    result = call()
    return result, resident("VmHWM") - before


def _sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Callable[[], Tensor]:
    """With a dense mask, or causal."""
    return lambda: scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=bias is None)


def _by_sequence(
    plan: AttentionPlan, q: Tensor, k: Tensor, v: Tensor
) -> list[Callable[[], Tensor]]:
    """SDPA of each sequence alone, with its dense mask."""
    calls = []
    row = key = 0
    for layout in plan.layouts:
        rows, keys = slice(row, row + layout.num_rows), slice(key, key + layout.num_keys)
        bias = torch.zeros(layout.num_rows, layout.num_keys, dtype=q.dtype)
        bias.masked_fill_(~layout.dense_mask(), -torch.inf)
        calls.append(_sdpa(q[:, :, rows], k[:, :, keys], v[:, :, keys], bias))
        row, key = rows.stop, keys.stop
    return calls


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Call, float]:
    """FlexAttention, and the seconds that its first call took."""
    num_rows, num_keys = mask.shape
    block_mask = create_block_mask(
        lambda b, h, row, key: mask[row, key], None, None, num_rows, num_keys, device="cpu"
    )
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False)
    is_grouped = q.shape[1] != k.shape[1]

    def call() -> object:
        return compiled(q, k, v, block_mask=block_mask, enable_gqa=is_grouped)

    start = time.perf_counter()
    with torch._inductor.config.patch(force_disable_caches=True):
        call()
    return call, round(time.perf_counter() - start, 1)


def _product(dtype: torch.dtype, flops: float) -> Limit:
    """Square matrix products of about `flops` together."""
    size = 2048 if flops > 1e8 else 512
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    repeats = max(1, round(flops / (2 * size**3)))

    def call() -> None:
        for _ in range(repeats):
            torch.mm(a, b)

    return Limit("torch.mm", call, repeats * 2 * size**3)


def _gradients(
    leaves: Sequence[Tensor], out: Tensor, dout: Tensor
) -> Callable[[], tuple[Tensor, ...]]:
    return functools.partial(torch.autograd.grad, out, leaves, dout, retain_graph=True)


def _assert_close(ours: Tensor, peer: Tensor, tolerance: float = 2e-2) -> None:
    """Ours is ``[rows, heads, head_dim]``, the peer's ``[1, heads, rows, head_dim]``."""
    torch.testing.assert_close(
        ours, peer[0].transpose(0, 1), atol=tolerance, rtol=tolerance, check_dtype=False
    )
