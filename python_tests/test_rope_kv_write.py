"""rope_kv_write_ against the float64 reference, and what it must leave alone."""

import re

import pytest
import torch
from on_backends import backend_fixture

from pdiff_runtime import ops
from pdiff_runtime.ops import Impl, reference
from pdiff_runtime.testing import Backend

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
CPU, CUDA = Backend(Impl.CPU), Backend(Impl.CUDA)
exhaustive = pytest.mark.exhaustive
HEADS = [pytest.param((1, 1), marks=exhaustive), (4, 2), (7, 1)]
MAX_POSITION = 70
backend = backend_fixture(["generic", "avx2", "avx512"], [Impl.CUDA, Impl.TRITON])


@pytest.fixture
def cuda():
    if CUDA.missing:
        pytest.skip(CUDA.missing)
    return CUDA


def problem(rows=9, num_heads_q=4, num_heads_kv=2, head_dim=16, dtype=F32, pages=(5, 4), seed=0):
    """Arguments by name; row 3 is not written, rows are slices of one projection."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    heads = [num_heads_q, num_heads_kv, num_heads_kv]
    q, k, v = random(rows, sum(heads), head_dim).to(dtype).split(heads, dim=1)
    angle = random(MAX_POSITION, head_dim // 2)
    num_slots = pages[0] * pages[1]
    slots = torch.randperm(max(num_slots, rows), generator=generator)[:rows]
    slots[slots >= num_slots] = -1
    slots[3:4] = -1
    return {
        "q": q,
        "k": k,
        "v": v,
        "cos": angle.cos(),
        "sin": angle.sin(),
        "positions": torch.randint(0, MAX_POSITION, (rows,), generator=generator),
        "slots": slots,
        "k_cache": torch.full((*pages, num_heads_kv, head_dim), 7.0, dtype=dtype),
        "v_cache": torch.full((*pages, num_heads_kv, head_dim), 7.0, dtype=dtype),
    }


def clone(arguments, device="cpu"):
    """A copy of everything that keeps q, k and v slices of one buffer."""
    copies = {name: x.to(device, copy=True) for name, x in arguments.items() if name not in "qkv"}
    heads = [arguments[name].shape[1] for name in "qkv"]
    fused = torch.cat([arguments[name] for name in "qkv"], dim=1).to(device)
    return dict(zip("qkv", fused.split(heads, dim=1), strict=True)) | copies


def run(arguments, backend, without=()):
    """The op where the backend's tensors live, without the arguments named; then back."""
    there = clone(arguments, backend.device)
    ops.rope_kv_write_(**there | dict.fromkeys(without), impl=backend.impl)
    for name, x in there.items():
        arguments[name].copy_(x)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("head_dim", [2, 16, 40, 66, 128, 256])
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_agrees_with_reference(heads, head_dim, dtype, index_dtype, backend):
    actual = problem(13, *heads, head_dim, dtype)
    actual["positions"] = actual["positions"].to(index_dtype)
    expected = clone(actual)
    run(actual, backend)
    reference.rope_kv_write_(**expected)
    rounding = {F32: 1e-6, BF16: 2**-7, F16: 2**-10}[dtype]
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], rtol=rounding, atol=rounding)
    assert torch.equal(actual["v_cache"], expected["v_cache"])


@pytest.mark.parametrize("head_dim", [16, 66])
def test_cache_holds_the_rotated_keys_and_nothing_else_changes(head_dim, backend):
    arguments = problem(head_dim=head_dim, dtype=BF16)
    before = clone(arguments)
    run(arguments, backend)
    slots = arguments["slots"]
    written = slots[slots >= 0]
    k_cache, v_cache = (arguments[name].flatten(0, 1) for name in ("k_cache", "v_cache"))
    assert torch.equal(k_cache[written], arguments["k"][slots >= 0])
    assert torch.equal(v_cache[written], before["v"][slots >= 0])
    rest = torch.ones(len(k_cache), dtype=torch.bool)
    rest[written] = False
    assert (k_cache[rest] == 7).all()
    assert (v_cache[rest] == 7).all()
    assert torch.equal(arguments["v"], before["v"])


def test_without_caches_it_only_rotates(backend):
    with_caches, without = problem(), problem()
    run(with_caches, backend)
    run(without, backend, without=("v", "slots", "k_cache", "v_cache"))
    assert torch.equal(with_caches["q"], without["q"])
    assert torch.equal(with_caches["k"], without["k"])


@pytest.mark.parametrize("rows", [0, 1, pytest.param(500, marks=exhaustive)])
def test_thread_count_changes_no_bit(rows, backend):
    results = []
    before = torch.get_num_threads()
    try:
        for num_threads in (1, 2):
            torch.set_num_threads(num_threads)
            arguments = problem(rows, head_dim=64, pages=(40, 16))
            run(arguments, backend)
            results.append(arguments)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize("head_dim", [10, 128])
@pytest.mark.parametrize("gap", [1, 8])
def test_rows_and_buffers_may_start_anywhere(gap, head_dim, backend):
    arguments = problem(head_dim=head_dim, dtype=BF16)
    expected = clone(arguments)
    run(expected, backend)
    given = {}
    for name, x in arguments.items():
        size = [*x.shape[:1], x[0].numel() + (gap if name in "qkv" else 0)]
        buffer = torch.full((gap + size[0] * size[1],), 5, dtype=x.dtype, device=backend.device)
        rows = buffer[gap:].view(size)[:, : x[0].numel()].unflatten(1, x.shape[1:] or (1,))
        given[name] = rows.view(x.shape) if x.ndim == 1 else rows
        given[name].copy_(x)
    ops.rope_kv_write_(**given, impl=backend.impl)
    assert all(torch.equal(x.cpu(), expected[name]) for name, x in given.items())


def test_a_gpu_skips_what_is_out_of_range(backend):
    if backend.impl is Impl.CPU:
        pytest.skip("a CPU refuses it")
    arguments = problem()
    arguments["slots"][5] = 20  # the cache ends
    arguments["slots"][6] = -2
    expected = clone(arguments)
    arguments["positions"][1] = MAX_POSITION
    arguments["positions"][2] = -1
    expected["slots"][[1, 2, 5, 6]] = -1
    run(arguments, backend)
    before = clone(expected)
    run(expected, CPU)
    for name in "qk":
        expected[name][1:3] = before[name][1:3]
    for name in ("q", "k", "v", "k_cache", "v_cache"):
        torch.testing.assert_close(arguments[name], expected[name], rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: captures a graph")
def test_a_captured_cuda_graph_follows_its_inputs(cuda):
    arguments, expected = (clone(problem(dtype=BF16, head_dim=128), "cuda") for _ in range(2))
    graph = torch.cuda.CUDAGraph()
    before = clone(arguments, "cuda")
    ops.rope_kv_write_(**before)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        ops.rope_kv_write_(**arguments)
    for given in (arguments, expected):
        given["positions"].copy_(given["positions"].roll(1))
    graph.replay()
    ops.rope_kv_write_(**expected)
    assert all(torch.equal(arguments[name], expected[name]) for name in arguments)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"q": torch.zeros(9, 4, 16).double()}, "bfloat16 or float16 [rows, num_heads_q"),
        ({"q": torch.zeros(9, 16, 4).transpose(1, 2)}, "expected contiguous rows"),
        ({"q": torch.zeros(1, 4, 16).expand(9, -1, -1)}, "do not overlap, got strides (0, 16, 1)"),
        ({"q": torch.zeros(96).as_strided((9, 4, 16), (4, 16, 1))}, "that do not overlap"),
        ({"k": torch.zeros(1, 2, 16).expand(9, -1, -1)}, "do not overlap, got strides (0, 16, 1)"),
        ({"k": torch.zeros(8, 2, 16)}, "expected float32 [9, num_heads_kv, 16], got float32 [8,"),
        ({"k": torch.zeros(9, 2, 16).bfloat16()}, "expected float32 [9, num_heads_kv, 16]"),
        ({"v": torch.zeros(9, 1, 16)}, "expected float32 [9, 2, 16], got float32 [9, 1, 16]"),
        ({"v": None}, "expected tensors where there are caches"),
        ({"cos": torch.zeros(70, 16)}, "expected float32 [max_position, 8]"),
        ({"sin": torch.zeros(69, 8)}, "expected float32 [70, 8], got float32 [69, 8]"),
        ({"positions": torch.full((9,), 70)}, "[0]: expected 0 to 69, got 70"),
        ({"positions": torch.full((9,), -1)}, "[0]: expected 0 to 69, got -1"),
        ({"positions": torch.zeros(9)}, "expected int64 or int32 [9], got float32 [9]"),
        ({"slots": torch.full((9,), 20)}, "[0]: expected -1 to 19, got 20"),
        ({"slots": torch.full((9,), -2)}, "[0]: expected -1 to 19, got -2"),
        ({"k_cache": None}, "expected both or neither"),
        ({"k_cache": torch.zeros(5, 4, 2, 15)}, "expected float32 [num_pages, page_size, 2, 16]"),
        ({"v_cache": torch.zeros(4, 4, 2, 16)}, "expected float32 [5, 4, 2, 16]"),
    ],
)
def test_a_wrong_argument_is_named_and_nothing_is_written(changed, message):
    arguments = problem() | changed
    before = {name: x.clone() for name, x in arguments.items() if x is not None}
    name = next(iter(changed))
    with pytest.raises(ValueError, match=f"{name}.*{re.escape(message)}"):
        ops.rope_kv_write_(**arguments)
    assert all(torch.equal(arguments[name], x) for name, x in before.items())


@pytest.mark.parametrize("impl", Impl)
@pytest.mark.parametrize(
    ("num_heads_q", "num_heads_kv", "head_dim", "message"),
    [
        (0, 2, 16, "q: expected at least one head and element of a head, got [9, 0, 16]"),
        (4, 0, 16, "k: expected at least one head and element of a head, got [9, 0, 16]"),
        (4, 2, 0, "q: expected at least one head and element of a head, got [9, 4, 0]"),
    ],
)
def test_no_heads_or_elements_are_refused(num_heads_q, num_heads_kv, head_dim, message, impl):
    backend = Backend(impl)
    if backend.missing:
        pytest.skip(backend.missing)
    q, k = (torch.zeros(9, heads, head_dim) for heads in (num_heads_q, num_heads_kv))
    table, positions = torch.zeros(70, head_dim // 2), torch.zeros(9, dtype=torch.int64)
    tensors = (x.to(backend.device) for x in (q, k, table, positions))
    q, k, table, positions = tensors
    with pytest.raises(ValueError, match=re.escape(message)):
        ops.rope_kv_write_(q, k, None, table, table, positions, None, None, None, impl=impl)


@pytest.mark.parametrize("name", "qk")
def test_each_backend_refuses_rows_on_the_same_memory(name, backend):
    arguments = clone(problem(), backend.device)
    arguments[name] = arguments[name][:1].expand(9, -1, -1)
    with pytest.raises(ValueError, match=f"{name}: expected rows that do not overlap"):
        ops.rope_kv_write_(**arguments, impl=backend.impl)


def test_an_odd_head_dim_is_refused():
    with pytest.raises(ValueError, match="q: expected an even head_dim, got 15"):
        ops.rope_kv_write_(
            torch.zeros(1, 1, 15), torch.zeros(1, 1, 15), None, torch.zeros(1, 7),
            torch.zeros(1, 7), torch.zeros(1, dtype=torch.int64), None, None, None,
        )  # fmt: skip


def test_inputs_that_require_grad_are_refused():
    arguments = problem()
    arguments["v"].requires_grad_()
    with pytest.raises(RuntimeError, match="rope_kv_write_: v requires grad"):
        ops.rope_kv_write_(**arguments)


def test_reference_impl_is_the_reference():
    actual, expected = problem(), problem()
    ops.rope_kv_write_(**actual, impl="reference")
    reference.rope_kv_write_(**expected)
    assert all(torch.equal(actual[name], expected[name]) for name in actual)


@pytest.mark.parametrize("with_caches", [True, False])
def test_opcheck(with_caches):
    arguments = problem()
    arguments |= {name: arguments[name].contiguous() for name in "qkv"}
    if not with_caches:
        arguments |= {"v": None, "slots": None, "k_cache": None, "v_cache": None}
    torch.library.opcheck(torch.ops.pdiff.rope_kv_write_, (*arguments.values(), "auto"))


def test_compiles_without_graph_breaks():
    def step(arguments):
        q, k = arguments["q"] * 2.0, arguments["k"] * 2.0
        ops.rope_kv_write_(**arguments | {"q": q, "k": k})
        return q.sum() + k.sum()

    actual, expected = problem(), problem()
    compiled = torch.compile(step, fullgraph=True)(actual)
    torch.testing.assert_close(compiled, step(expected))
    assert torch.equal(actual["k_cache"], expected["k_cache"])
    assert torch.equal(actual["v_cache"], expected["v_cache"])
