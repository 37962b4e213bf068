"""The backward in CUDA C++: against the reference, and the laws that hold bit for bit."""

import itertools

import pytest
import torch

from pdiff_runtime import _C
from pdiff_runtime.ops import AttentionPlan, Impl, hybrid_attention, reference
from pdiff_runtime.testing import Backend, assert_within_budget, use_cuda_kernels
from pdiff_runtime.testing.problems import LAYOUTS, TAGS, AttentionProblem, document, layout_of

BF16, F16 = torch.bfloat16, torch.float16
CUDA = Backend(Impl.CUDA)
PLACE = {"device": CUDA.device, "impl": CUDA.impl}

pytestmark = pytest.mark.skipif(CUDA.missing != "", reason=CUDA.missing)

HEADS = [(1, 1), (4, 2), (7, 1), (28, 4), (16, 1), (128, 1)]
SETTINGS = [(64, BF16), (128, BF16), (64, F16), (128, F16)]
PROBLEMS = [
    AttentionProblem(layouts, *heads, *setting)
    for layouts, heads, setting in itertools.product(LAYOUTS, HEADS, SETTINGS)
]
if not CUDA.is_quick:  # every layout and every setting, on few heads
    PROBLEMS = [
        AttentionProblem(layouts, *HEADS[i % 3], *SETTINGS[i % 4])
        for i, layouts in enumerate(LAYOUTS)
    ]


@pytest.fixture(params=["portable", "sm90a"], autouse=True)
def kernels(request):
    with use_cuda_kernels(request.param) as available:
        if not available:
            pytest.skip(f"{request.param} kernels are not for this device")
        yield request.param


def random(*shape, dtype=BF16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(CUDA.device, dtype)


def gradients(inputs, plan, dout, dlse=None, softmax_scale=None, forward=hybrid_attention):
    leaves = [x.detach().requires_grad_() for x in inputs]
    out, lse = forward(*leaves, plan, softmax_scale, return_lse=True)
    loss = (out * dout.to(out)).sum()
    if dlse is not None:
        seen = lse.isfinite()
        loss = loss + (lse[seen] * dlse[seen]).sum()
    return torch.autograd.grad(loss, leaves)


def spec(q, k, v, plan, softmax_scale, return_lse):
    scale = plan.head_dim**-0.5 if softmax_scale is None else softmax_scale
    return reference.hybrid_attention(q, k, v, plan, scale)


def assert_agrees(inputs, plan, dout, dlse=None, softmax_scale=None):
    actual = gradients(inputs, plan, dout, dlse, softmax_scale)
    exact = gradients([x.double() for x in inputs], plan, dout, dlse, softmax_scale, spec)
    low_precision = gradients(inputs, plan, dout, dlse, softmax_scale, spec)
    for name, *values in zip(("dq", "dk", "dv"), actual, exact, low_precision, strict=True):
        assert_within_budget(name, *values)


def assert_same_bits(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_agrees_with_reference(problem):
    plan = problem.plan(**PLACE)
    inputs = problem.inputs(plan)
    dout = random(*inputs[0].shape, dtype=problem.dtype, seed=1)
    dlse = random(plan.num_heads_q, plan.total_q, dtype=torch.float32, seed=2)
    assert_agrees(inputs, plan, dout, dlse)


@pytest.mark.parametrize("softmax_scale", [0.0, 0.5])
def test_scales(softmax_scale):
    problem = AttentionProblem("one_span", 2, 1, 64, BF16)
    plan = problem.plan(**PLACE)
    inputs = problem.inputs(plan)
    dout = random(*inputs[0].shape, seed=1)
    assert_agrees(inputs, plan, dout, softmax_scale=softmax_scale)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_bits_ignore_the_batch(head_dim):
    names = ["empty_spans", "rows_that_see_nothing", "several_syncs"]
    layouts = [layout for name in names for layout in LAYOUTS[name]]
    heads = {"num_heads_q": 3, "num_heads_kv": 1, "head_dim": head_dim, **PLACE}
    whole = AttentionPlan.pack(layouts, **heads)
    q, k, v = (
        random(n, h, head_dim, seed=h + n)
        for n, h in ((whole.total_q, 3), (whole.total_kv, 1), (whole.total_kv, 1))
    )
    dout = random(*q.shape, seed=1)
    dq, dk, dv = gradients((q, k, v), whole, dout)
    assert_same_bits(gradients((q, k, v), whole, dout), (dq, dk, dv))  # and on every run
    row = key = 0
    for layout in layouts:
        alone = AttentionPlan.pack([layout], **heads)
        rows, keys = slice(row, row + layout.num_rows), slice(key, key + layout.num_keys)
        actual = gradients((q[rows], k[keys], v[keys]), alone, dout[rows])
        assert_same_bits(actual, (dq[rows], dk[keys], dv[keys]))
        row, key = rows.stop, keys.stop


def test_other_plans_in_the_same_words():
    """Kernels read the plan on the device: on a GPU a captured graph runs each of them."""
    layouts = [layout_of(96), layout_of(20, "40", "sync", 35), layout_of("30", "30", 36)]
    heads = {"num_heads_q": 6, "num_heads_kv": 2, "head_dim": 64, **PLACE}
    plans = [AttentionPlan.pack([layout], **heads) for layout in layouts]
    assert all(plan.total_q == 96 and plan.num_slots == 0 for plan in plans)
    words = torch.zeros(
        max(plan.words.numel() for plan in plans), dtype=torch.int32, device=CUDA.device
    )
    q, k, v, dout = (random(96, h, 64, seed=seed) for seed, h in enumerate((6, 2, 2, 6)))

    def run():
        out, lse = torch.ops.pdiff.hybrid_attention(q, k, v, words, 0, 0.125, "cuda")
        return torch.ops.pdiff.hybrid_attention_backward(
            dout, None, q, k, v, out, lse, words, 0.125, "cuda"
        )

    replay = run
    if CUDA.device.type == "cuda":
        words[: plans[0].words.numel()] = plans[0].words
        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run()

        def replay():
            graph.replay()
            return captured

    for plan in plans:
        words[: plan.words.numel()] = plan.words
        assert_same_bits(replay(), gradients((q, k, v), plan, dout))


def test_a_plan_built_from_tokens():
    sketches = [(20, "40", "9", "sync", 35), (70,), ("30", 3, "30", 6)]
    documents = [document(*sketch) for sketch in sketches]
    heads = {"num_heads_q": 4, "num_heads_kv": 2, "head_dim": 64}
    ends = itertools.accumulate((len(ids) for ids in documents), initial=0)
    plan = AttentionPlan.from_tokens(
        torch.tensor(list(itertools.chain(*documents)), device=CUDA.device),
        torch.tensor(list(ends), dtype=torch.int32, device=CUDA.device),
        async_start=TAGS.async_start, async_end=TAGS.async_end, sync=TAGS.sync,
        impl=CUDA.impl, **heads,
    )  # fmt: skip
    layouts = [layout_of(*sketch) for sketch in sketches]
    packed = AttentionPlan.pack(layouts, **heads, **PLACE, split_keys=False)
    q, k, v, dout = (random(plan.total_q, h, 64, seed=i) for i, h in enumerate((4, 2, 2, 4)))
    assert_same_bits(gradients((q, k, v), plan, dout), gradients((q, k, v), packed, dout))


def test_outputs_are_written_whole(monkeypatch):
    problem = AttentionProblem("rows_that_see_nothing", 2, 1, 64, BF16)
    plan = problem.plan(**PLACE)
    inputs = problem.inputs(plan)
    dout = random(*inputs[0].shape, seed=1)
    expected = gradients(inputs, plan, dout)
    full = torch.full_like
    monkeypatch.setattr(torch, "empty_like", lambda x, **kwargs: full(x, torch.nan, **kwargs))
    assert_same_bits(gradients(inputs, plan, dout), expected)


def test_slices_of_a_fused_projection():
    problem = AttentionProblem("unsynced_neighbours", 6, 2, 64, BF16)
    plan = problem.plan(**PLACE)
    fused = random(plan.total_q, (6 + 2 + 2) * 64)
    slices = [x.unflatten(1, (-1, 64)) for x in fused.split([384, 128, 128], dim=1)]
    assert not slices[1].is_contiguous()
    dout = random(plan.total_q, 6, 64, seed=1)
    expected = gradients([x.contiguous() for x in slices], plan, dout)
    assert_same_bits(gradients(slices, plan, dout), expected)


def test_a_neighbour_in_memory_does_no_harm():
    """What lies beside a sequence is NaN: blocks reach past its first row and its last key."""
    plan = AttentionPlan.pack(
        [layout_of(70, "40")], num_heads_q=3, num_heads_kv=1, head_dim=64, **PLACE
    )
    around = plan.total_q + 200

    def inside(x):
        padded = x.new_full((around, *x.shape[1:]), torch.nan)
        padded[100:-100] = x
        return padded[100:-100]

    q, k, v = (random(plan.total_q, h, 64, seed=h) for h in (3, 1, 1))
    dout = random(*q.shape, seed=5)
    expected = gradients((q, k, v), plan, dout)
    assert_same_bits(gradients([inside(x) for x in (q, k, v)], plan, inside(dout)), expected)


def test_gradients_need_packed_keys():
    problem = AttentionProblem("one_span", 2, 1, 64, BF16, page_size=16)
    plan = problem.plan(**PLACE)
    q, k, v = problem.inputs(plan)
    out = hybrid_attention(q.requires_grad_(), k, v, plan)
    with pytest.raises(ValueError, match="plan: expected packed keys, got a page table"):
        out.sum().backward()


def test_gradients_compile_whole(kernels):
    plan = AttentionPlan.pack(
        [layout_of(20)], num_heads_q=2, num_heads_kv=1, head_dim=64, device=CUDA.device, impl="cuda"
    )
    leaves = [random(20, heads, 64).to(CUDA.device).requires_grad_() for heads in (2, 1, 1)]

    def gradients(attention):
        return torch.autograd.grad(attention(*leaves).float().sum(), leaves)

    def eager(q, k, v):  # by the plan's own choice, which tracing has to get through
        return hybrid_attention(2 * q, k, v, plan)

    torch.compiler.reset()
    compiled = torch.compile(eager, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(gradients(compiled), gradients(eager), strict=True):
        torch.testing.assert_close(actual, expected)


def test_backward_whose_blocks_do_not_fit_is_left_to_triton(monkeypatch):
    triton = Backend(Impl.TRITON)
    if triton.missing:
        pytest.skip(triton.missing)
    problem = AttentionProblem("one_span", 4, 2, 64, F16)
    plan = problem.plan(**PLACE)
    inputs = problem.inputs(plan)
    dout = torch.ones_like(inputs[0])
    monkeypatch.setattr(_C, "hybrid_attention_backward_fits", lambda *_: False)
    monkeypatch.delattr(_C, "hybrid_attention_backward_cuda")
    assert_agrees(inputs, plan, dout)
