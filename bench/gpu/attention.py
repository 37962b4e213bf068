"""Hybrid attention, forward and backward, against what torch offers for the same mask.

Rates count visible (query, key) pairs: forward 4 * heads * head_dim * pairs, backward 2.5 times
that. Peers get their keys gathered and their masks built beforehand. Of the two sets of CUDA
kernels one is in use; beside sm90a only FlexAttention is timed.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable

import torch
from device import DEVICE, ON_GPU, Call, compiled, synchronize
from records import Bench, Work
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from pdiff_runtime.bench.peers import dense_bias, gathered, inputs_of, peers_of, plan_of
from pdiff_runtime.bench.workloads import AttentionWorkload, gpu_attention
from pdiff_runtime.ops import AttentionPlan, Impl, hybrid_attention, reference
from pdiff_runtime.plan import SpanLayout
from pdiff_runtime.testing import assert_within_budget

BF16 = torch.bfloat16


def run(bench: Bench) -> None:
    """The shapes of inference, then the training shapes both ways, whose peers are compiled."""
    tiny = gpu_attention(128, heads=(2, 1, 64))
    shapes = tiny if bench.is_tiny else gpu_attention()
    small = tiny if bench.is_tiny else gpu_attention(16)
    for name in ("denoise", "answers"):
        body = functools.partial(_paged, bench, name, shapes[name], small[name])
        bench.case(f"attention, {name}", body)
    bench.case("attention, mixed batch", functools.partial(_mixed, bench, shapes))
    bench.case("attention call", functools.partial(_host_cost, bench))
    for name in ("long", "paper"):
        body = functools.partial(_training, bench, name, shapes[name], small[name])
        bench.case(f"attention, {name}", body)


def _training(
    bench: Bench, name: str, workload: AttentionWorkload, small: AttentionWorkload
) -> None:
    make = functools.partial(plan_of, workload, device=DEVICE)
    plans = bench.plans(f"attention, {name}", lambda impl: make(impl=impl))
    plan = next(iter(plans.values()))
    tensors = inputs_of(plan, BF16)
    peers = peers_of(plan, *tensors)
    bias, mask = dense_bias(plan, BF16), _flex_mask(plan)
    flex = compiled(flex_attention)

    def flex_forward(*x: Tensor) -> Tensor:
        return flex(*x, block_mask=mask, enable_gqa=True)

    def dense_forward(*x: Tensor) -> Tensor:
        return scaled_dot_product_attention(*x, attn_mask=bias)

    forward, backward = {}, {}
    for impl, ours_plan in plans.items():
        title = bench.title(impl)
        for way, gradients in (("forward", False), ("backward", True)):
            body = functools.partial(_check, small, impl, gradients)
            bench.check(f"attention {way}, {name}", title, body)
        ours = functools.partial(hybrid_attention, plan=ours_plan)
        forward[title] = _forward_of(ours, tensors)
        backward[title] = _backward_of(ours, tensors)
    titles = list(forward)
    if ON_GPU:  # it has no backward on a CPU
        backward["FlexAttention"] = _backward_of(flex_forward, peers["grouped"])
    forward["FlexAttention"] = _forward_of(flex_forward, peers["grouped"])
    dense = _forward_of(dense_forward, peers["repeated"])
    if bench.kernels == "portable":
        forward["SDPA, dense mask"] = dense
        backward["SDPA, dense mask"] = _backward_of(dense_forward, peers["repeated"])

    for title in titles:  # also at full size: against torch, in bfloat16 both
        body = functools.partial(_compare, forward[title], dense)
        bench.check(f"attention, {name}, full size", title, body)

    flops = workload.forward_flops
    workloads = [f"attention {way}, {name}" for way in ("forward", "backward")]
    forward_times = bench.measure(workloads[0], forward, Work(flops, "TFLOP/s"))
    backward_times = bench.measure(workloads[1], backward, Work(2.5 * flops, "TFLOP/s"))
    for title in titles:
        if {title, "FlexAttention"} <= forward_times.keys() & backward_times.keys():
            ours, peer = (
                forward_times[x].ms + backward_times[x].ms for x in (title, "FlexAttention")
            )
            workload = f"attention both ways against FlexAttention, {name}"
            bench.value(workload, title, peer / ours, "x")


def _paged(bench: Bench, name: str, workload: AttentionWorkload, small: AttentionWorkload) -> None:
    make = functools.partial(plan_of, workload, device=DEVICE)
    plans = bench.plans(f"attention, {name}", lambda impl: make(impl=impl))
    plan = next(iter(plans.values()))
    tensors = inputs_of(plan, BF16)
    calls = {}
    composed = _composed(workload, plan, *tensors)
    for impl, ours_plan in plans.items():
        title = bench.title(impl)
        bench.check(f"attention, {name}", title, functools.partial(_check, small, impl))
        calls[title] = _forward_of(functools.partial(hybrid_attention, plan=ours_plan), tensors)
        body = functools.partial(_compare, calls[title], composed)
        bench.check(f"attention, {name}, full size", title, body)
    if bench.kernels == "portable":
        calls["prefix, spans, merge"] = composed
    if name == "answers":  # each key and value is read once
        work = Work(2 * 2 * plan.total_kv * plan.num_heads_kv * plan.head_dim, "GB/s")
    else:
        work = Work(workload.forward_flops, "TFLOP/s")
    bench.measure(f"attention forward, {name}", calls, work)


def _mixed(bench: Bench, shapes: dict[str, AttentionWorkload]) -> None:
    """Half the denoise requests, half the answers, and prompts: in one launch, and in three."""
    parts = {
        name: dataclasses.replace(shapes[name], layouts=shapes[name].layouts[:count])
        for name, count in (("denoise", 16), ("answers", 64), ("prompts", 2))
    }
    layouts = tuple(itertools.chain(*(part.layouts for part in parts.values())))
    mixed = dataclasses.replace(shapes["denoise"], layouts=layouts)
    for impl in bench.impls:
        calls = {}
        for name, part in {"mixed": mixed, **parts}.items():
            plan = plan_of(part, impl=impl, device=DEVICE)
            ours = functools.partial(hybrid_attention, plan=plan)
            calls[name] = _forward_of(ours, inputs_of(plan, BF16))
        timings = bench.measure(f"attention forward, mixed batch, {bench.title(impl)}", calls)
        if timings.keys() == calls.keys():
            share = timings["mixed"].ms / sum(timings[name].ms for name in parts)
            title = "attention forward, mixed batch of separate launches"
            bench.value(title, bench.title(impl), share, "of the sum")


def _host_cost(bench: Bench) -> None:
    """What a call costs the host: one row and one key, the device not waited for."""
    workload = AttentionWorkload((SpanLayout.causal(1, 1),), 1, 1, 64)
    for impl in bench.impls:
        plan = plan_of(workload, impl=impl, device=DEVICE)
        call = _forward_of(functools.partial(hybrid_attention, plan=plan), inputs_of(plan, BF16))
        samples = []
        for _ in range(5):
            synchronize()
            start = time.perf_counter()
            for i in range(100):
                call.run(i)
            samples.append(1e6 * (time.perf_counter() - start) / 100)
        bench.value("attention call, on the host", bench.title(impl), sorted(samples)[2], "us")


def _forward_of(forward: Callable[..., Tensor], tensors: list[Tensor]) -> Call:
    @torch.no_grad()
    def call(_: int) -> Tensor:
        return forward(*tensors)

    return Call(call)


def _backward_of(forward: Callable[..., Tensor], tensors: list[Tensor]) -> Call:
    """The gradient alone; the forward and its graph are made in the first call."""
    kept: list[tuple[Tensor, list[Tensor], Tensor]] = []

    def backward(_: int) -> object:
        if not kept:
            leaves = [x.detach().requires_grad_() for x in tensors]
            out = forward(*leaves)
            kept.append((out, leaves, torch.randn_like(out)))
        out, leaves, dout = kept[0]
        return torch.autograd.grad(out, leaves, dout, retain_graph=True)

    return Call(backward)


def _compare(ours: Call, peer: Call) -> None:
    """Two forwards of the same inputs, whatever the order of dimensions: within 2 % of the norm."""
    actual, expected = ours.run(0).float(), peer.run(0).float()
    if expected.ndim == 4:  # [1, heads, rows, head_dim]
        expected = expected[0].transpose(0, 1)
    error = (actual - expected).norm() / expected.norm()
    assert error < 0.02, f"out: differs by {error:.3g} of the norm"  # NaN fails, too


def _check(workload: AttentionWorkload, impl: str, gradients: bool = False) -> None:
    """Within twice the error of the reference in bfloat16."""
    plan = plan_of(workload, impl=Impl(impl), device=DEVICE)
    tensors = inputs_of(plan, BF16)
    dout = torch.randn_like(tensors[0])

    def results(forward: Callable[..., Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [x.to(dtype).requires_grad_(gradients) for x in tensors]
        out = forward(*leaves)
        if not gradients:
            return (out,)
        return out.detach(), *torch.autograd.grad(out, leaves, dout.to(dtype))

    def specification(*x: Tensor) -> Tensor:
        return reference.hybrid_attention(*x, plan, plan.head_dim**-0.5)[0]

    ours = results(lambda *x: hybrid_attention(*x, plan), BF16)
    oracle, low = results(specification, torch.float64), results(specification, BF16)
    for name, *values in zip(("out", "dq", "dk", "dv"), ours, oracle, low, strict=False):
        assert_within_budget(name, *values)


def _flex_mask(plan: AttentionPlan) -> BlockMask:
    """The plan's relation by keys: at most two ranges of rows see a key."""
    ranges = torch.zeros(4, plan.total_kv, dtype=torch.int32)
    row_begin = key_begin = 0
    for layout in plan.layouts:
        twin = layout.key_major
        for (lo, hi), first, last in zip(
            twin.segments, twin.range_ptr, twin.range_ptr[1:], strict=False
        ):
            keys = slice(key_begin + lo, key_begin + hi)
            for i, (row_lo, row_hi, kind) in enumerate(twin.ranges[first:last]):
                is_causal = kind == 0
                lows = torch.arange(hi - lo) * int(is_causal) + int(row_begin + row_lo)
                ranges[2 * i, keys] = lows.int()
                ranges[2 * i + 1, keys] = int(row_begin + row_hi)
        row_begin, key_begin = row_begin + layout.num_rows, key_begin + layout.num_keys
    lo_a, hi_a, lo_b, hi_b = ranges.to(plan.device)

    def sees(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        first = (row >= lo_a[key]) & (row < hi_a[key])
        return first | ((row >= lo_b[key]) & (row < hi_b[key]))

    return create_block_mask(sees, 1, 1, plan.total_q, plan.total_kv, device=plan.device)


def _composed(
    workload: AttentionWorkload, plan: AttentionPlan, q: Tensor, k: Tensor, v: Tensor
) -> Call:
    """What servers do today: attend to the prefix, attend to the own span, merge by lse.

    Heads of a group are rows of one batched flash attention; keys lie contiguous already.
    """
    layout, batch = workload.layouts[0], len(workload.layouts)
    heads_kv, group = plan.num_heads_kv, plan.num_heads_q // plan.num_heads_kv
    num_rows, num_keys = layout.num_rows, layout.num_keys
    num_spans = layout.num_segments if num_rows > 1 else 0
    context = num_keys - num_rows if num_spans else num_keys

    def rows(x: Tensor, parts: int) -> Tensor:  # [batch * parts, heads_kv, group * rows, head_dim]
        x = x.view(batch * parts, num_rows // parts, heads_kv, group, -1)
        return x.permute(0, 2, 3, 1, 4).flatten(2, 3).contiguous()

    def keys(x: Tensor) -> Tensor:  # [batch, heads_kv, num_keys, head_dim]
        return gathered(plan, x).view(batch, num_keys, heads_kv, -1).transpose(1, 2)

    def spans(x: Tensor) -> Tensor:  # [batch * num_spans, heads_kv, span, head_dim]
        x = x[:, :, context:].unflatten(2, (num_spans, -1)).transpose(1, 2)
        return x.flatten(0, 1).contiguous()

    def tokens(out: Tensor) -> Tensor:  # a view as [total_q, num_heads_q, head_dim]
        out = out.view(batch, heads_kv, group, num_rows, -1).permute(0, 3, 1, 2, 4)
        return out.flatten(2, 3).flatten(0, 1)

    all_k, all_v = keys(k), keys(v)
    prefix = [rows(q, 1), *(x[:, :, :context].contiguous() for x in (all_k, all_v))]
    own = [rows(q, num_spans), spans(all_k), spans(all_v)] if num_spans else None

    @torch.no_grad()
    def call(_: int) -> Tensor:
        out, lse = _flash(*prefix)
        if own is None:
            return tokens(out)
        out_own, lse_own = _flash(*own)
        shape = (batch, num_spans, heads_kv, group, -1)
        out_own = out_own.view(*shape, plan.head_dim).permute(0, 2, 3, 1, 4, 5).reshape(out.shape)
        lse_own = lse_own.view(*shape).permute(0, 2, 3, 1, 4).reshape(lse.shape)
        share = torch.sigmoid(lse_own - lse)[..., None]
        return tokens(torch.lerp(out.float(), out_own.float(), share).to(out.dtype))

    return Call(call)


def _flash(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Full attention with its lse."""
    if q.is_cuda:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)
        return out, lse
    scores = q.float() @ k.float().mT * q.shape[-1] ** -0.5
    return (scores.softmax(-1) @ v.float()).to(q.dtype), scores.logsumexp(-1)
