"""The forward in CUDA C++: against the reference, and the laws that hold bit for bit."""

import itertools

import pytest
import torch

from pdiff_runtime.ops import AttentionPlan, Impl, hybrid_attention, reference
from pdiff_runtime.plan import SpanLayout
from pdiff_runtime.testing import Backend, assert_within_budget, use_cuda_kernels
from pdiff_runtime.testing.problems import LAYOUTS, AttentionProblem

BF16, F16 = torch.bfloat16, torch.float16
CUDA = Backend(Impl.CUDA)
PLACE = {"device": CUDA.device, "impl": CUDA.impl}

pytestmark = pytest.mark.skipif(CUDA.missing != "", reason=CUDA.missing)
needs_gpu = pytest.mark.skipif(CUDA.device.type != "cuda", reason="needs a GPU")

HEADS = [(1, 1), (4, 2), (7, 1), (28, 4), (16, 1), (128, 1)]
SETTINGS = list(itertools.product([64, 128], [BF16, F16], [None, 1, 16, 48, 64]))
PROBLEMS = [
    AttentionProblem(layouts, *HEADS[i % len(HEADS)], *setting)
    for i, (layouts, setting) in enumerate(itertools.product(LAYOUTS, SETTINGS))
]
if not CUDA.is_quick:
    PROBLEMS = PROBLEMS[::7]


@pytest.fixture(params=["portable", "sm90a"], autouse=True)
def kernels(request):
    with use_cuda_kernels(request.param) as available:
        if not available:
            pytest.skip(f"{request.param} kernels are not for this device")
        yield request.param


def random(*shape, dtype=BF16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(CUDA.device, dtype)


def assert_same_bits(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


def assert_agrees(problem, plan, softmax_scale=None):
    q, k, v = problem.inputs(plan)
    out, lse = hybrid_attention(q, k, v, plan, softmax_scale, return_lse=True)
    scale = plan.head_dim**-0.5 if softmax_scale is None else softmax_scale
    out64, lse64 = reference.hybrid_attention(q.double(), k.double(), v.double(), plan, scale)
    out_low, lse_low = reference.hybrid_attention(q, k, v, plan, scale)
    assert_within_budget("out", out, out64, out_low)
    assert_within_budget("lse", lse, lse64, lse_low.float())
    assert not out[(lse64 == float("-inf")).T].any()


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_agrees_with_reference(problem):
    assert_agrees(problem, problem.plan(**PLACE))


@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0])
def test_scale_and_large_scores(scale):
    problem = AttentionProblem("many_spans", dtype=F16)
    assert_agrees(problem, problem.plan(**PLACE), scale)


LONG = [
    SpanLayout.causal(1, 1500),
    SpanLayout.from_segments(1500, [(2, "full", [(3, 700), (777, 790), (901, 1500)])]),
    SpanLayout.from_segments(1200, [(1, "full", [(0, 1200)]), (1, "full", [(500, 1190)])]),
    SpanLayout.causal(40, 1111),  # its last tile has few rows
]


@pytest.mark.parametrize(("head_dim", "dtype"), [(64, F16), (128, BF16)])
@pytest.mark.parametrize("page_size", [None, 48, 64])
def test_keys_that_are_shared_out(head_dim, dtype, page_size, monkeypatch):
    monkeypatch.setitem(LAYOUTS, "long", LONG)
    problem = AttentionProblem("long", 14, 2, head_dim, dtype, page_size)
    plan = problem.plan(**PLACE)
    assert plan.num_slots >= 10
    assert_agrees(problem, plan)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_bits_ignore_the_batch(head_dim):
    layouts = [*LAYOUTS["fewer_rows_than_keys"], SpanLayout.causal(2, 700), *LAYOUTS["one_span"]]
    heads = {"num_heads_q": 3, "num_heads_kv": 1, "head_dim": head_dim, **PLACE}
    whole = AttentionPlan.pack(layouts, **heads)
    assert whole.num_slots > 0
    q = random(whole.total_q, 3, head_dim)
    k, v = (random(whole.total_kv, 1, head_dim, seed=seed) for seed in (1, 2))
    out, lse = hybrid_attention(q, k, v, whole, return_lse=True)
    row = key = 0
    for layout in layouts:
        rows, keys = slice(row, row + layout.num_rows), slice(key, key + layout.num_keys)
        alone = hybrid_attention(
            q[rows], k[keys], v[keys], AttentionPlan.pack([layout], **heads), return_lse=True
        )
        assert_same_bits(alone, (out[rows], lse[:, rows]))
        row, key = rows.stop, keys.stop


@pytest.mark.parametrize("chunk", [1, 5, 32, 100])
def test_bits_ignore_how_a_sequence_is_split(chunk):
    num_keys = 201 if chunk == 1 else 663
    heads = {"num_heads_q": 4, "num_heads_kv": 1, "head_dim": 64, "split_keys": False, **PLACE}
    q, k, v = (random(num_keys, h, 64, seed=seed) for seed, h in enumerate((4, 1, 1)))
    q *= torch.linspace(0.1, 10, num_keys)[:, None, None].to(q)  # maxima that rise often, never
    whole = AttentionPlan.pack([SpanLayout.causal(num_keys, num_keys)], **heads)
    expected = hybrid_attention(q, k, v, whole)
    for lo in range(0, num_keys, chunk * (1 if chunk > 5 else 13)):
        hi = min(lo + chunk, num_keys)
        plan = AttentionPlan.pack([SpanLayout.causal(hi - lo, hi)], **heads)
        assert torch.equal(hybrid_attention(q[lo:hi], k[:hi], v[:hi], plan), expected[lo:hi])


@pytest.mark.parametrize("split_keys", [False, True])
def test_bits_ignore_where_keys_lie(split_keys, kernels):
    rows, num_keys = 3, 1200
    heads = {"num_heads_q": 4, "num_heads_kv": 2, "head_dim": 64, "split_keys": split_keys, **PLACE}
    layouts = [SpanLayout.causal(rows, num_keys)]
    q, k, v = (random(n, h, 64, seed=n) for n, h in ((rows, 4), (num_keys, 2), (num_keys, 2)))
    expected = hybrid_attention(q, k, v, AttentionPlan.pack(layouts, **heads))
    for page_size in (1, 16, 48, 64, 256):
        if kernels == "sm90a" and page_size % 64 != 0:
            continue  # pages for the portable kernels
        num_pages = -(-num_keys // page_size)
        pages = torch.randperm(num_pages, generator=torch.Generator().manual_seed(page_size))
        plan = AttentionPlan.pack(
            layouts, **heads, page_table=pages[None].int(), page_size=page_size
        )
        slots = (pages[:, None] * page_size + torch.arange(page_size)).flatten()[:num_keys]
        pools = []
        for x in (k, v):
            pool = x.new_full((num_pages * page_size, 2, 64), torch.nan)
            pool[slots.to(x.device)] = x
            pools.append(pool.unflatten(0, (num_pages, page_size)))
        assert torch.equal(hybrid_attention(q, *pools, plan), expected)


def test_slices_of_a_fused_projection():
    problem = AttentionProblem("several_syncs", 6, 2, 64, BF16)
    plan = problem.plan(**PLACE)
    fused = random(plan.total_q, (6 + 2 + 2) * 64)
    slices = [x.unflatten(1, (-1, 64)) for x in fused.split([384, 128, 128], dim=1)]
    assert not slices[1].is_contiguous()
    out = hybrid_attention(*slices, plan)
    assert torch.equal(out, hybrid_attention(*(x.contiguous() for x in slices), plan))


def test_a_nan_row_stays_alone():
    problem = AttentionProblem("many_spans", dtype=BF16)
    plan = problem.plan(**PLACE)
    q, k, v = problem.inputs(plan)
    expected = hybrid_attention(q, k, v, plan)
    q[5] = torch.nan
    out = hybrid_attention(q, k, v, plan)
    assert out[5].isnan().all()
    keep = torch.arange(plan.total_q, device=q.device) != 5
    assert torch.equal(out[keep], expected[keep])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("q", lambda q: q[:-1], r"q: expected .*\[158, 4, 64\], got .*\[157, 4, 64\]"),
        ("q", lambda q: q.float(), "q: expected bfloat16 or float16.*got float32"),
        ("k", lambda k: k.half(), "k: expected bfloat16.*got float16"),
        ("v", lambda v: v.mT.contiguous().mT, "v: expected contiguous heads and elements"),
        ("k", lambda k: k.new_zeros(158, 132)[:, :128].unflatten(1, (2, 64)), "k: expected rows "),
        ("q", lambda q: q.new_zeros(q.numel() + 1)[1:].view_as(q), "q: expected memory aligned"),
        ("softmax_scale", lambda _: -0.5, "softmax_scale: expected a finite number >= 0, got -0.5"),
    ],
)
def test_wrong_arguments_are_named(name, change, message):
    problem = AttentionProblem("one_span", dtype=BF16)
    plan = problem.plan(**PLACE)
    args = dict(zip("qkv", problem.inputs(plan), strict=True), plan=plan, impl="cuda")
    args[name] = change(args.get(name))
    with pytest.raises(ValueError, match=message):
        hybrid_attention(**args)


@pytest.mark.parametrize("heads", [(4, 2, 80), (129, 1, 64)])
def test_heads_it_does_not_take(heads):
    problem = AttentionProblem("one_span", *heads)
    with pytest.raises(ValueError, match=r"cuda is not available on .*: expected"):
        problem.plan(**PLACE)


@pytest.mark.skipif(CUDA.device.type != "cpu", reason="a plan for the CPU is on the CPU")
def test_a_plan_for_the_cpu_is_refused():
    problem = AttentionProblem("one_span", dtype=BF16)
    plan = problem.plan(impl="cpu")
    with pytest.raises(ValueError, match="plan: expected one packed for cuda, got one for cpu"):
        hybrid_attention(*problem.inputs(plan), plan, impl="cuda")


@needs_gpu
def test_a_captured_graph_runs_other_plans():
    heads = {"num_heads_q": 28, "num_heads_kv": 4, "head_dim": 128, **PLACE}
    total_q, total_kv = 96, 5000
    q, k, v = (random(n, h, 128) for n, h in ((total_q, 28), (total_kv, 4), (total_kv, 4)))

    def batch(seed):
        generator = torch.Generator().manual_seed(seed)
        cuts = [0, *sorted(torch.randint(1, 31, (3,), generator=generator).tolist()), 32]
        layouts = [SpanLayout.causal(1, 1000 + 50 * (cut % 9)) for cut in cuts]
        return AttentionPlan.pack(
            [*layouts, SpanLayout.causal(total_q - len(layouts), 300)], **heads
        )

    plans = [batch(seed) for seed in range(4)]
    capacity = max(plan.words.numel() for plan in plans)
    num_slots = max(plan.num_slots for plan in plans)
    words = torch.zeros(capacity, dtype=torch.int32, device=CUDA.device)

    def run():
        return torch.ops.pdiff.hybrid_attention(q, k, v, words, num_slots, 0.1, "cuda")

    words[: plans[0].words.numel()] = plans[0].words
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = run()
    for seed, plan in enumerate(plans):
        words[: plan.words.numel()] = plan.words
        q.copy_(random(total_q, 28, 128, seed=seed))
        out.fill_(torch.nan)
        graph.replay()
        expected = hybrid_attention(q, k[: plan.total_kv], v[: plan.total_kv], plan, 0.1,
                                    return_lse=True)  # fmt: skip
        assert_same_bits((out, lse), expected)
