"""weighted_cross_entropy against the float64 reference: loss, parts and gradient."""

import math
import re

import pytest
import torch
from on_backends import backend_fixture

from pdiff_runtime import ops
from pdiff_runtime.ops import Impl, reference
from pdiff_runtime.testing import Backend

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
VOCAB_SIZES = [1, 7, 17, 1000, 4096, 32003]
CPU, CUDA = Backend(Impl.CPU), Backend(Impl.CUDA)


backend = backend_fixture(["generic", "avx2", "avx512"], [Impl.CUDA])


@pytest.fixture
def cuda():
    if CUDA.missing:
        pytest.skip(CUDA.missing)
    return CUDA


def problem(rows=11, vocab_size=1000, dtype=F32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, vocab_size, (rows,), generator=generator)
    labels[2:3] = -100
    return {
        "logits": (4 * torch.randn(rows, vocab_size, generator=generator)).to(dtype),
        "labels": labels,
        "weight": 5 * torch.rand(rows, generator=generator),
        "kind": torch.randint(0, 2, (rows,), generator=generator, dtype=torch.uint8),
    }


def exact(arguments, normaliser):
    """Outputs and gradient of the reference, the gradient in float64."""
    dlogits = torch.empty_like(arguments["logits"], dtype=torch.float64)
    return reference.weighted_cross_entropy(
        **arguments, normaliser=normaliser, dlogits=dlogits
    ), dlogits


def on(backend, arguments):
    return {name: x.to(backend.device) for name, x in arguments.items()}


def loss_and_gradient(arguments, normaliser=7.0, factor=1.0, backend=CPU, **options):
    """The op on logits that a model computed, as it is used; results on the CPU."""
    arguments = on(backend, arguments)
    leaf = arguments["logits"].clone().requires_grad_()
    result = ops.weighted_cross_entropy(
        **{"impl": backend.impl} | arguments | {"logits": leaf * 1.0} | options,
        normaliser=normaliser,
    )
    (factor * result.loss).backward()
    return ops.WeightedCrossEntropy(*(x.detach().cpu() for x in result)), leaf.grad.cpu()


@pytest.mark.parametrize("inplace_backward", [False, True], ids=["fresh", "inplace"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_agrees_with_reference(vocab_size, dtype, inplace_backward, backend):
    arguments = problem(vocab_size=vocab_size, dtype=dtype)
    result, gradient = loss_and_gradient(
        arguments, backend=backend, inplace_backward=inplace_backward
    )
    (loss, weighted_sums, unweighted_sums, counts), dlogits = exact(arguments, 7.0)
    torch.testing.assert_close(result.loss, loss, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(result.weighted_sums, weighted_sums, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(result.unweighted_sums, unweighted_sums, rtol=1e-5, atol=0.0)
    assert torch.equal(result.counts, counts)
    assert gradient.dtype == dtype
    rtol = {F32: 1e-5, BF16: 2**-8, F16: 2**-11}[dtype]
    torch.testing.assert_close(gradient.double(), dlogits, rtol=rtol, atol=1e-7)
    assert not any(part.requires_grad for part in result[1:])


def test_equals_torch():
    arguments = problem(rows=40)
    leaf = arguments["logits"].clone().requires_grad_()
    ce = torch.nn.functional.cross_entropy(leaf, arguments["labels"], reduction="none")
    loss = (ce * arguments["weight"]).sum() / 7.0
    loss.backward()
    result, gradient = loss_and_gradient(arguments)
    torch.testing.assert_close(result.loss, loss, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(gradient, leaf.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("vocab_size", [1000, 32003])
def test_forward_alone_gives_the_same_loss(vocab_size, backend):
    arguments = problem(vocab_size=vocab_size)
    with_gradient, _ = loss_and_gradient(arguments, backend=backend)
    without = ops.weighted_cross_entropy(
        **on(backend, arguments), normaliser=7.0, impl=backend.impl
    )
    assert not without.loss.requires_grad
    assert all(torch.equal(a, b.cpu()) for a, b in zip(with_gradient, without, strict=True))


@pytest.mark.parametrize("inplace_backward", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=["fp32", "bf16", "fp16"])
def test_gradient_of_what_follows_the_loss(dtype, inplace_backward, backend):
    options = {"backend": backend, "inplace_backward": inplace_backward}
    arguments = problem(vocab_size=1003, dtype=dtype)
    _, gradient = loss_and_gradient(arguments, **options)
    _, doubled = loss_and_gradient(arguments, factor=2.0, **options)
    assert torch.equal(doubled, 2 * gradient)


@pytest.mark.parametrize("normaliser", [0.0, torch.tensor(0.0)], ids=["float", "tensor"])
def test_normaliser_zero_gives_zero(normaliser, backend):
    arguments = problem()
    result, gradient = loss_and_gradient(arguments, normaliser, backend=backend)
    assert result.loss == 0
    assert not gradient.any()
    _, weighted_sums, *_ = exact(arguments, 0.0)[0]
    torch.testing.assert_close(result.weighted_sums, weighted_sums)


def test_normaliser_may_be_a_tensor(backend):
    result, gradient = loss_and_gradient(problem(), torch.tensor(7), backend=backend)
    expected, gradient_expected = loss_and_gradient(problem(), 7.0, backend=backend)
    assert torch.equal(result.loss, expected.loss)
    assert torch.equal(gradient, gradient_expected)


def test_ignored_rows_get_zero_whatever_they_hold(backend):
    arguments = problem()
    arguments["labels"][4] = -100
    arguments["logits"][4] = math.nan
    arguments["weight"][5] = 0.0
    result, gradient = loss_and_gradient(arguments, backend=backend)
    assert torch.isfinite(result.loss)
    assert not gradient[4].any()
    assert not gradient[5].any()
    assert result.counts.sum() == 9  # a weight of 0 still counts
    everything = problem()
    everything["labels"][:] = -100
    result, gradient = loss_and_gradient(everything, backend=backend)
    assert result.loss == 0
    assert not gradient.any()


def test_extreme_logits(backend):
    arguments = problem(rows=4, vocab_size=100)
    arguments["logits"][0] = -math.inf
    arguments["logits"][0, 17] = 3.0
    arguments["logits"][1] = 1e4 * torch.arange(100)
    arguments["logits"][3] = -1e30
    arguments["labels"] = torch.tensor([17, 99, 5, 8])
    result, gradient = loss_and_gradient(arguments, backend=backend)
    (loss, *_), dlogits = exact(arguments, 7.0)
    torch.testing.assert_close(result.loss, loss, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(gradient.double(), dlogits, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("rows", [0, 1, 3, 60])
def test_thread_count_changes_no_bit(rows, backend):
    before = torch.get_num_threads()
    results = []
    try:
        for num_threads in (1, 2):
            torch.set_num_threads(num_threads)
            results.append(loss_and_gradient(problem(rows, 20_011), backend=backend))
    finally:
        torch.set_num_threads(before)
    (one, gradient_one), (two, gradient_two) = results
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert torch.equal(gradient_one, gradient_two)


def test_gradient_of_a_row_does_not_depend_on_its_batch(backend):
    arguments = problem(rows=9)
    _, whole = loss_and_gradient(arguments, backend=backend)
    for row in range(9):
        only = {name: x[row : row + 1] for name, x in arguments.items()}
        _, alone = loss_and_gradient(only, backend=backend)
        assert torch.equal(alone[0], whole[row])


@pytest.mark.parametrize("vocab_size", [33, 1003, 60_013])
@pytest.mark.parametrize("row_stride", [0, 1, 8], ids="gap{}".format)
def test_rows_may_be_any_stride_apart(row_stride, vocab_size, backend):
    arguments = problem(vocab_size=vocab_size, dtype=BF16)
    gaps = torch.full((11, vocab_size + row_stride), math.nan, dtype=BF16, device=backend.device)
    logits = gaps[:, :vocab_size]
    logits.copy_(arguments["logits"])
    (loss, *_), dlogits = exact(arguments, 7.0)
    for inplace_backward in (False, True):  # fresh gradients lie on rows without gaps
        leaf = logits.detach().requires_grad_()
        node = leaf.view_as(leaf) if inplace_backward else leaf
        result = ops.weighted_cross_entropy(
            **on(backend, arguments) | {"logits": node}, normaliser=7.0, impl=backend.impl,
            inplace_backward=inplace_backward,
        )  # fmt: skip
        result.loss.backward()
        torch.testing.assert_close(result.loss.detach().cpu(), loss, rtol=1e-5, atol=0.0)
        torch.testing.assert_close(leaf.grad.double().cpu(), dlogits, rtol=2**-8, atol=1e-7)
    assert gaps[:, vocab_size:].isnan().all()


def test_cuda_makes_the_loss_nan_where_labels_are_out_of_range(cuda):
    for changed in ({"labels": 1000}, {"labels": -1}, {"kind": 2}):
        arguments = problem()
        for name, value in changed.items():
            arguments[name][4] = value
        result, gradient = loss_and_gradient(arguments, backend=cuda)
        assert result.loss.isnan()
        assert not gradient[4].any()
        assert gradient[3].any()
        assert result.counts.sum() == 9


def test_cuda_backward_runs_once(cuda):
    arguments = on(cuda, problem())
    logits = arguments["logits"].requires_grad_()
    result = ops.weighted_cross_entropy(**arguments, normaliser=7.0, impl=cuda.impl)
    result.loss.backward(retain_graph=True)
    assert logits.grad is not None
    with pytest.raises(RuntimeError, match="its backward runs only once"):
        result.loss.backward()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: captures a graph")
def test_a_captured_cuda_graph_follows_its_inputs(cuda):
    arguments = on(cuda, problem(vocab_size=60_013, dtype=BF16))
    normaliser = torch.tensor(7.0, device="cuda")

    def step():
        leaf = arguments["logits"].detach().requires_grad_()
        result = ops.weighted_cross_entropy(**arguments | {"logits": leaf}, normaliser=normaliser)
        result.loss.backward()
        return result.loss.detach(), leaf.grad

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    arguments["labels"].copy_(arguments["labels"].roll(1))
    normaliser.fill_(3.0)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


def test_inplace_writes_over_the_logits_and_warns_those_who_kept_them():
    arguments = problem()
    leaf = arguments["logits"].clone().requires_grad_()
    logits = leaf * 1.0
    result = ops.weighted_cross_entropy(
        **arguments | {"logits": logits}, normaliser=7.0, inplace_backward=True
    )
    dlogits = exact(arguments, 7.0)[1]
    torch.testing.assert_close(logits.detach().double(), dlogits, rtol=1e-5, atol=1e-7)
    result.loss.backward()
    assert torch.equal(leaf.grad, logits.detach())

    view = (leaf * 2.0)[None][0] / 2.0
    ops.weighted_cross_entropy(
        **arguments | {"logits": view[None][0]}, normaliser=7.0, inplace_backward=True
    ).loss.backward()
    torch.testing.assert_close(leaf.grad, 2 * logits.detach())

    kept = leaf.tanh()  # whose backward reads its output
    result = ops.weighted_cross_entropy(
        **arguments | {"logits": kept}, normaliser=7.0, inplace_backward=True
    )
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.loss.backward()
    with pytest.raises(ValueError, match="expected logits computed by the model, got a leaf"):
        ops.weighted_cross_entropy(
            **arguments | {"logits": leaf}, normaliser=7.0, inplace_backward=True
        )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"logits": torch.zeros(11, 1000).double()}, "expected float32 or bfloat16 or float16"),
        ({"logits": torch.zeros(1000, 11).T}, "expected rows without gaps"),
        ({"labels": torch.zeros(10, dtype=torch.int64)}, "expected int64 [11], got int64 [10]"),
        ({"labels": torch.full((11,), 1000)}, "[0]: expected 0 to 999 or -100, got 1000"),
        ({"labels": torch.full((11,), -1)}, "[0]: expected 0 to 999 or -100, got -1"),
        ({"weight": torch.zeros(11).bfloat16()}, "expected float32 [11], got bfloat16 [11]"),
        ({"kind": torch.zeros(11, dtype=torch.bool)}, "expected uint8 [11], got bool [11]"),
        ({"kind": torch.full((11,), 2, dtype=torch.uint8)}, "[0]: expected 0 or 1, got 2"),
        ({"impl": "triton"}, "triton is not available on cpu"),
    ],
)
def test_a_wrong_argument_is_named(changed, message):
    name = next(iter(changed))
    with pytest.raises(ValueError, match=f"{name}.*{re.escape(message)}"):
        ops.weighted_cross_entropy(**problem() | changed, normaliser=1.0)


@pytest.mark.parametrize(
    ("normaliser", "got"),
    [(torch.ones(2).double(), "float64 [2]"), (torch.ones(0, 3), "float32 [0, 3]")],
)
@pytest.mark.parametrize("needs_grad", [False, True], ids=["forward", "gradient"])
@pytest.mark.parametrize("inplace_backward", [False, True], ids=["fresh", "inplace"])
@pytest.mark.parametrize("impl", [Impl.CPU, Impl.CUDA, Impl.REFERENCE])
def test_a_normaliser_is_one_number(impl, inplace_backward, needs_grad, normaliser, got):
    backend = Backend(impl)
    if backend.missing:
        pytest.skip(backend.missing)
    arguments = on(backend, problem())
    before = arguments["logits"].clone()
    if needs_grad:
        arguments["logits"] = arguments["logits"].requires_grad_().view(11, 1000)
    message = re.escape(f"normaliser: expected one number, got {got}")
    with pytest.raises(ValueError, match=message):
        ops.weighted_cross_entropy(
            **arguments, normaliser=normaliser.to(backend.device),
            inplace_backward=inplace_backward, impl=impl,
        )  # fmt: skip
    assert torch.equal(arguments["logits"], before)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_a_tensor_of_one_number_is_a_normaliser(shape, backend):
    arguments = on(backend, problem())
    normaliser = torch.full(shape, 7.0, device=backend.device)
    expected = ops.weighted_cross_entropy(**arguments, normaliser=7.0, impl=backend.impl)
    actual = ops.weighted_cross_entropy(**arguments, normaliser=normaliser, impl=backend.impl)
    assert torch.equal(actual.loss, expected.loss)


def test_there_is_no_triton_version(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="triton is not available.*has no Triton version"):
        ops.weighted_cross_entropy(**problem(), normaliser=7.0, impl="triton")


def test_reference_impl_is_the_reference():
    arguments = problem()
    result, gradient = loss_and_gradient(arguments, impl="reference")
    expected, dlogits = exact(arguments, 7.0)
    assert torch.equal(result.loss, expected[0])
    torch.testing.assert_close(gradient.double(), dlogits, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("needs_grad", [True, False])
def test_opcheck(needs_grad):
    arguments = problem(rows=4, vocab_size=33)
    arguments["logits"].requires_grad_(needs_grad)
    torch.library.opcheck(
        torch.ops.pdiff.weighted_cross_entropy,
        (*arguments.values(), torch.tensor(7.0), needs_grad, "auto"),
    )


@pytest.mark.parametrize("inplace_backward", [False, True])
def test_compiles_without_graph_breaks(inplace_backward):
    arguments = problem()

    def step(logits):
        return ops.weighted_cross_entropy(
            **arguments | {"logits": logits * 1.5}, normaliser=7.0,
            inplace_backward=inplace_backward,
        )  # fmt: skip

    def gradient(function):
        leaf = arguments["logits"].clone().requires_grad_()
        result = function(leaf)
        result.loss.backward()
        return result.loss, leaf.grad

    compiled, eager = gradient(torch.compile(step, fullgraph=True)), gradient(step)
    torch.testing.assert_close(compiled, eager)


def test_rows_on_the_same_memory_are_refused():
    logits = torch.randn(1, 8).expand(4, 8)
    labels, weight = torch.zeros(4, dtype=torch.int64), torch.ones(4)
    kind = torch.zeros(4, dtype=torch.uint8)
    with pytest.raises(ValueError, match="rows that do not overlap"):
        ops.weighted_cross_entropy(logits, labels, weight, kind, normaliser=4.0)
