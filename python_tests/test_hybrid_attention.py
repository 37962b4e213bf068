"""Hybrid attention against the float64 reference, and the laws that hold bit for bit."""

import dataclasses
import importlib
import itertools
import math
import re

import pytest
import torch
from on_backends import backend_fixture, isa_fixture

from pdiff_runtime import _C
from pdiff_runtime.ops import AttentionPlan, Impl, hybrid_attention, reference
from pdiff_runtime.plan import SpanLayout
from pdiff_runtime.testing import Backend, assert_within_budget
from pdiff_runtime.testing.problems import LAYOUTS, AttentionProblem, layout_of

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
HEADS = [(1, 1), (4, 2), (3, 1), (7, 1)]
HEAD_DIMS = [16, 40, 64, 128, 256]
ISAS = ["generic", "avx2", "avx512", "amx"]

backend = backend_fixture(ISAS)


isa = isa_fixture(ISAS)


def oracle(q, k, v, plan):
    scale = plan.head_dim**-0.5
    exact = reference.hybrid_attention(q.double(), k.double(), v.double(), plan, scale)
    return exact, reference.hybrid_attention(q, k, v, plan, scale)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


PROBLEMS = [
    AttentionProblem(layouts, *HEADS[i % len(HEADS)], head_dim, dtype, page_size)
    for i, (layouts, head_dim, dtype, page_size) in enumerate(
        itertools.product(LAYOUTS, HEAD_DIMS, [F32, BF16, F16], [None, 16, 48])
    )
]
PACKED = [p for p in PROBLEMS if p.page_size is None]
FEW = [
    AttentionProblem(layouts, *HEADS[i % 4], [16, 24, 64][i % 3], F16, page_size)
    for i, (layouts, page_size) in enumerate(zip(LAYOUTS, itertools.cycle([None, 48, 16])))
]
FEW += [
    AttentionProblem("empty_spans", 3, 1, 24),
    AttentionProblem("unsynced_neighbours", 2, 1, 16),
]
FEW_PACKED = [dataclasses.replace(p, page_size=None) for p in FEW[1::2]]


def few_of(few, many):
    """Parameters: `many` where that is quick, `few` everywhere."""
    return few + [pytest.param(p, marks=pytest.mark.exhaustive) for p in many if p not in few]


DTYPES = few_of([F16, BF16], [F32])


def placed_on(backend):
    return {"device": backend.device, "impl": backend.impl}


def plan_for(problem, backend):
    return problem.plan(**placed_on(backend))


@pytest.mark.parametrize("problem", few_of(FEW, PROBLEMS), ids=str)
def test_agrees_with_reference(problem, backend):
    plan = plan_for(problem, backend)
    q, k, v = problem.inputs(plan)
    out, lse = hybrid_attention(q, k, v, plan, return_lse=True)
    (out64, lse64), (out_low, lse_low) = oracle(q, k, v, plan)
    assert_within_budget("out", out, out64, out_low)
    assert_within_budget("lse", lse, lse64, lse_low.float())
    blind = lse64 == float("-inf")
    assert not out[blind.T].any()


@pytest.mark.parametrize("problem", few_of(FEW_PACKED, PACKED), ids=str)
def test_gradients_agree_with_reference(problem, backend):
    plan = plan_for(problem, backend)
    inputs = problem.inputs(plan)
    dout = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1)).to(inputs[0])
    dlse = torch.randn(plan.num_heads_q, plan.total_q).to(plan.device)

    def gradients(forward, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        out, lse = forward(*leaves)
        seen = lse.isfinite()
        loss = (out * dout.to(dtype)).sum() + (lse[seen] * dlse[seen]).sum()
        return torch.autograd.grad(loss, leaves)

    def ours(q, k, v):
        return hybrid_attention(q, k, v, plan, return_lse=True)

    def spec(q, k, v):
        return reference.hybrid_attention(q, k, v, plan, plan.head_dim**-0.5)

    actual = gradients(ours, problem.dtype)
    exact = gradients(spec, torch.float64)
    low_precision = gradients(spec, problem.dtype)
    for name, *values in zip(("dq", "dk", "dv"), actual, exact, low_precision, strict=True):
        assert_within_budget(name, *values)


@pytest.mark.parametrize("heads", [(130, 1), (33, 3)])
def test_many_keys_for_few_rows_and_large_groups(heads, backend):
    layouts = [SpanLayout.causal(1, 540), SpanLayout.from_spans(530, [2]), SpanLayout.causal(3, 3)]
    num_heads = {"num_heads_q": heads[0], "num_heads_kv": heads[1], "head_dim": 16}
    plan = AttentionPlan.pack(layouts, **num_heads, **placed_on(backend))
    q, k, v = (
        torch.randn(n, h, 16).to(backend.device)
        for n, h in [(plan.total_q, heads[0]), *2 * [(plan.total_kv, heads[1])]]
    )
    out, lse = hybrid_attention(q, k, v, plan, return_lse=True)
    (out64, lse64), (out_low, lse_low) = oracle(q, k, v, plan)
    assert_within_budget("out", out, out64, out_low)
    assert_within_budget("lse", lse, lse64, lse_low)


def assert_same_bits(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layouts", few_of(["empty_spans", "rows_that_see_nothing"], list(LAYOUTS)))
def test_outputs_are_written_whole(layouts, dtype, backend, monkeypatch):
    problem = AttentionProblem(layouts, dtype=dtype)
    plan = plan_for(problem, backend)
    q, k, v = problem.inputs(plan)
    expected = hybrid_attention(q, k, v, plan, return_lse=True)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    grads = torch.autograd.grad(hybrid_attention(*leaves, plan).sum(), leaves)

    def nan_like(x, **kwargs):
        return torch.full_like(x, torch.nan, **kwargs)

    def nan_of(x, *shape, **kwargs):
        shape = shape[0] if isinstance(shape[0], tuple) else shape
        return x.new_full(shape, torch.nan if x.is_floating_point() else 0, **kwargs)

    monkeypatch.setattr(torch, "empty_like", nan_like)
    monkeypatch.setattr(torch.Tensor, "new_empty", nan_of)
    assert_same_bits(hybrid_attention(q, k, v, plan, return_lse=True), expected)
    assert_same_bits(torch.autograd.grad(hybrid_attention(*leaves, plan).sum(), leaves), grads)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_bits_ignore_the_number_of_threads(dtype, isa):
    layouts = [layout_of(150, "200", "130", "sync", 600, "300", "sync", 9), layout_of(40, "60")]
    plan = AttentionPlan.pack(layouts, num_heads_q=6, num_heads_kv=2, head_dim=64)
    q, k, v = (
        torch.randn(plan.total_q, heads, 64).to(dtype).requires_grad_() for heads in (6, 2, 2)
    )

    def run(num_threads):
        before = torch.get_num_threads()
        torch.set_num_threads(num_threads)
        out, lse = hybrid_attention(q, k, v, plan, return_lse=True)
        grads = torch.autograd.grad((out.float().square().sum() + lse.sum()), (q, k, v))
        torch.set_num_threads(before)
        return out, lse, *grads

    assert_same_bits(run(2), run(1))


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_tensors_may_start_at_any_element(dtype, isa):
    problem = AttentionProblem("many_spans", head_dim=40, dtype=dtype)
    plan = problem.plan()
    inputs = problem.inputs(plan)
    shifted = []
    for x in inputs:
        whole = torch.empty(x.numel() + 1, dtype=dtype)
        shifted.append(whole[1:].view(x.shape).copy_(x))
        assert shifted[-1].data_ptr() % 64 != 0
    assert_same_bits(
        hybrid_attention(*shifted, plan, return_lse=True),
        hybrid_attention(*inputs, plan, return_lse=True),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batches", few_of(["fewer_rows_than_keys"], ["all"]))
def test_bits_ignore_the_batch(batches, dtype, backend):
    names = LAYOUTS if batches == "all" else [batches]
    layouts = [layout for name in names for layout in LAYOUTS[name]]
    heads = {"num_heads_q": 3, "num_heads_kv": 1, "head_dim": 64, **placed_on(backend)}
    whole = AttentionPlan.pack(layouts, **heads)
    q, k, v = (torch.randn(n, h, 64).to(whole.device, dtype).requires_grad_() for n, h in
               ((whole.total_q, 3), (whole.total_kv, 1), (whole.total_kv, 1)))  # fmt: skip
    out, lse = hybrid_attention(q, k, v, whole, return_lse=True)
    dout = torch.randn_like(out)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), dout)
    row = key = 0
    for layout in layouts:
        alone = AttentionPlan.pack([layout], **heads)
        rows, keys = slice(row, row + layout.num_rows), slice(key, key + layout.num_keys)
        part = [q[rows], k[keys], v[keys]]
        out_alone, lse_alone = hybrid_attention(*part, alone, return_lse=True)
        grads = torch.autograd.grad(out_alone, part, dout[rows])
        assert_same_bits((out_alone, lse_alone), (out[rows], lse[:, rows]))
        assert_same_bits(grads, (dq[rows], dk[keys], dv[keys]))
        row, key = rows.stop, keys.stop


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk", few_of([32, 100], [1, 5]))
def test_bits_ignore_how_a_sequence_is_split(chunk, dtype, backend):
    num_keys = 263
    heads = {"num_heads_q": 4, "num_heads_kv": 1, "head_dim": 48, **placed_on(backend)}
    q, k, v = (torch.randn(num_keys, h, 48).to(backend.device, dtype) for h in (4, 1, 1))
    rising = torch.linspace(0.1, 10, num_keys)[:, None, None]  # maxima that rise often, never
    q *= rising.to(q)
    heads["split_keys"] = False
    whole = AttentionPlan.pack([SpanLayout.causal(num_keys, num_keys)], **heads)
    expected = hybrid_attention(q, k, v, whole)
    for lo in range(0, num_keys, chunk):
        hi = min(lo + chunk, num_keys)
        plan = AttentionPlan.pack([SpanLayout.causal(hi - lo, hi)], **heads)
        assert torch.equal(hybrid_attention(q[lo:hi], k[:hi], v[:hi], plan), expected[lo:hi])


def test_bits_ignore_where_keys_lie(backend):
    for page_size in (None, 16, 48):
        problem = AttentionProblem("several_syncs", page_size=page_size)
        plan = plan_for(problem, backend)
        q, k, v = problem.inputs(plan)
        if page_size is None:
            packed, keys, values = plan, k, v
            expected = hybrid_attention(q, k, v, plan)
            continue
        pages = plan.page_table[0]
        for pool, rows in ((k, keys), (v, values)):
            for key in range(packed.total_kv):
                pool[pages[key // page_size], key % page_size] = rows[key]
        assert torch.equal(hybrid_attention(q, k, v, plan), expected)


def test_no_open_span_is_plain_causal_attention(backend):
    n, heads = 150, {"num_heads_q": 4, "num_heads_kv": 2, "head_dim": 64}
    plan = AttentionPlan.pack([layout_of(n)], **heads, **placed_on(backend))
    q, k, v = (torch.randn(n, heads, 64).to(backend.device) for heads in (4, 2, 2))
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1)[None] for x in (q, k, v)), is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(hybrid_attention(q, k, v, plan), expected[0].transpose(0, 1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_slices_of_a_fused_projection(dtype, backend):
    problem = AttentionProblem("several_syncs", 6, 2, 40, dtype)
    plan = plan_for(problem, backend)
    fused = torch.randn(plan.total_q, (6 + 2 + 2) * 40).to(plan.device, dtype).requires_grad_()
    slices = [x.unflatten(1, (-1, 40)) for x in fused.split([240, 80, 80], dim=1)]
    assert not slices[1].is_contiguous()
    out = hybrid_attention(*slices, plan)
    copies = [x.contiguous() for x in slices]
    expected = hybrid_attention(*copies, plan)
    assert torch.equal(out, expected)
    dout = torch.randn_like(out)
    assert_same_bits(
        torch.autograd.grad(out, fused, dout), torch.autograd.grad(expected, fused, dout)
    )


def test_scale_and_large_scores(backend):
    plan = plan_for(AttentionProblem("empty_spans"), backend)
    q, k, v = AttentionProblem("empty_spans").inputs(plan)
    for scale in (0.0, 1.0, 30.0):
        out, lse = hybrid_attention(q, k, v, plan, scale, return_lse=True)
        exact = reference.hybrid_attention(q.double(), k.double(), v.double(), plan, scale)
        low = reference.hybrid_attention(q, k, v, plan, scale)
        assert_within_budget("out", out, exact[0], low[0])
        assert_within_budget("lse", lse, exact[1], low[1])


def test_a_nan_row_stays_alone(backend):
    plan = plan_for(AttentionProblem("empty_spans"), backend)
    q, k, v = AttentionProblem("empty_spans").inputs(plan)
    expected = hybrid_attention(q, k, v, plan)
    q[5] = torch.nan
    out = hybrid_attention(q, k, v, plan)
    assert out[5].isnan().all()
    keep = torch.arange(plan.total_q) != 5
    assert torch.equal(out[keep], expected[keep])


def test_reference_can_be_asked_for():
    problem = AttentionProblem("one_span")
    plan = problem.plan()
    q, k, v = problem.inputs(plan)
    expected = reference.hybrid_attention(q, k, v, plan, plan.head_dim**-0.5)
    actual = hybrid_attention(q, k, v, plan, return_lse=True, impl="reference")
    assert_same_bits(actual, expected)


@pytest.mark.parametrize("page_size", [None, 16])
def test_opcheck(page_size):
    problem = AttentionProblem("one_span", page_size=page_size)
    plan = problem.plan()
    q, k, v = problem.inputs(plan)
    if page_size is None:
        for x in (q, k, v):
            x.requires_grad_()
    torch.library.opcheck(
        torch.ops.pdiff.hybrid_attention.default,
        (q, k, v, plan.words, plan.num_slots, 0.125, str(plan.impl)),
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole_with_changing_plans(dynamic):
    def block(q, k, v, plan):
        return hybrid_attention(2 * q, k, v, plan).square()

    torch.compiler.reset()
    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic)
    for layouts in ("one_span", "several_syncs"):
        problem = AttentionProblem(layouts)
        plan = problem.plan()
        leaves = [x.requires_grad_() for x in problem.inputs(plan)]
        expected, actual = block(*leaves, plan), compiled(*leaves, plan)
        assert_same_bits([actual], [expected])
        dout = torch.randn_like(expected)
        torch.testing.assert_close(
            torch.autograd.grad(actual, leaves, dout), torch.autograd.grad(expected, leaves, dout)
        )


def test_a_new_plan_of_the_same_shape_does_not_recompile():
    torch.compiler.reset()
    compiled = torch.compile(
        lambda q, k, v, plan: hybrid_attention(q, k, v, plan), fullgraph=True, dynamic=True
    )
    heads = {"num_heads_q": 2, "num_heads_kv": 1, "head_dim": 32}
    q, k, v = (torch.randn(40, h, 32) for h in (2, 1, 1))
    with torch.no_grad():
        for i, layout in enumerate([layout_of(40), layout_of(10, "30"), layout_of("9", "9", 22)]):
            plan = AttentionPlan.pack([layout], **heads)
            with torch.compiler.set_stance("fail_on_recompile" if i > 0 else "default"):
                actual = compiled(q, k, v, plan)
            assert torch.equal(actual, hybrid_attention(q, k, v, plan))


def bad(**changes):
    problem = AttentionProblem("one_span")
    plan = problem.plan()
    args = dict(zip("qkv", problem.inputs(plan), strict=True), plan=plan)
    args |= {name: change(args[name]) for name, change in changes.items() if name in "qkv"}
    return args | {name: value for name, value in changes.items() if name not in "qkv"}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (bad(q=lambda q: q[:-1]), r"q: expected \[158, 4, 64\], got \[157, 4, 64\]"),
        (bad(k=lambda k: k[:, :1]), r"k: expected \[158, 2, 64\], got \[158, 1, 64\]"),
        (bad(v=lambda v: v[..., :32]), r"v: expected \[158, 2, 64\], got \[158, 2, 32\]"),
        (bad(v=lambda v: v[None]), r"v: expected \[158, 2, 64\], got \[1, 158, 2, 64\]"),
        (bad(q=lambda q: q.double()), "q, k, v: expected .* or float16, all the same"),
        (bad(k=lambda k: k.bfloat16()), "q, k, v: expected .* or float16, all the same"),
        (bad(k=lambda k: k.to("meta")), "q, k, v: expected tensors on cpu"),
        (bad(q=lambda q: q.transpose(1, 2).contiguous().transpose(1, 2)), "q: expected contiguous"),
        (bad(softmax_scale=-0.5), "softmax_scale: expected a finite number >= 0, got -0.5"),
        (bad(impl="cuda"), "impl: cuda is not available on cpu|plan: expected one packed for cuda"),
        (bad(impl="fast"), "impl: expected one of"),
    ],
)
def test_wrong_arguments_are_named(args, message):
    with pytest.raises(ValueError, match=message):
        hybrid_attention(**args)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("q", lambda q: q[:-1], r"q: expected .*\[158, 4, 64\], got .*\[157, 4, 64\]"),
        ("k", lambda k: k[:, :1], r"k: expected .*\[158, 2, 64\], got .*\[158, 1, 64\]"),
        ("v", lambda v: v[None], r"v: expected .*\[158, 2, 64\], got .*\[1, 158, 2, 64\]"),
        ("q", lambda q: q.double(), "q.*: expected float32.*bfloat16.*got.*float64"),
        ("k", lambda k: k.bfloat16(), "k.*: expected .*float32.*got.*bfloat16"),
        ("v", lambda v: v.mT.contiguous().mT, "v: expected contiguous heads and elements"),
        ("softmax_scale", lambda _: -0.5, "softmax_scale: expected a finite number >= 0, got -0.5"),
    ],
)
def test_each_backend_names_wrong_arguments(name, change, message, backend):
    problem = AttentionProblem("one_span")
    plan = plan_for(problem, backend)
    args = dict(zip("qkv", problem.inputs(plan), strict=True), plan=plan)
    args[name] = change(args.get(name))
    with pytest.raises(ValueError, match=message):
        hybrid_attention(**args)


@pytest.mark.parametrize("softmax_scale", [math.inf, math.nan, -0.5, 1e39])
@pytest.mark.parametrize("impl", Impl)
def test_every_implementation_refuses_a_scale_that_is_not_finite(impl, softmax_scale):
    backend = Backend(impl)
    if backend.missing:
        pytest.skip(backend.missing)
    problem = AttentionProblem("one_span")
    plan = plan_for(problem, backend)
    message = f"softmax_scale: expected a finite number >= 0, got {softmax_scale}"
    with pytest.raises(ValueError, match=re.escape(message)):
        hybrid_attention(*problem.inputs(plan), plan, softmax_scale, impl=impl)


def test_gradients_need_packed_keys(backend):
    problem = AttentionProblem("one_span", page_size=16)
    plan = plan_for(problem, backend)
    q, k, v = problem.inputs(plan)
    out = hybrid_attention(q.requires_grad_(), k, v, plan)
    with pytest.raises(ValueError, match="plan: expected packed keys, got a page table"):
        out.sum().backward()


def test_there_is_no_second_derivative():
    problem = AttentionProblem("one_span")
    plan = problem.plan()
    q, k, v = problem.inputs(plan)
    q.requires_grad_()
    out = hybrid_attention(q, k, v, plan)
    (gradient,) = torch.autograd.grad(out.pow(2).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(gradient.pow(2).sum(), q)


def test_auto_by_name_is_the_impl_of_the_plan(monkeypatch):
    module = importlib.import_module("pdiff_runtime.ops.hybrid_attention")
    monkeypatch.setattr(module, "select_impl", lambda impl, _: Impl(impl))
    problem = AttentionProblem("one_span")
    plan = problem.plan()
    q, *_ = problem.inputs(plan)
    plan.impl = Impl.TRITON
    assert module._select("auto", q, plan) is module._select(Impl.AUTO, q, plan) is Impl.TRITON


@pytest.mark.parametrize(("fits", "expected"), [(True, "cuda"), (False, "triton")])
def test_auto_trains_with_kernels_that_fit_the_gpu(fits, expected, monkeypatch):
    module = importlib.import_module("pdiff_runtime.ops.hybrid_attention")
    monkeypatch.setattr(_C, "hybrid_attention_backward_fits", lambda *_: fits, raising=False)
    monkeypatch.setattr(module, "cuda_stream", lambda _: (0, 0))
    monkeypatch.setattr(module, "why_not", lambda *_: "")
    assert module._impl_of_backward(torch.device("cuda"), head_dim=128) == expected
