"""swiglu against float64 on every instruction set, and where torch's takes over."""

import math

import pytest
import torch
import torch.nn.functional as F
from on_backends import isa_fixture
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from pdiff_runtime import ops

ROUNDING = {torch.float32: 2**-20, torch.bfloat16: 2**-8, torch.float16: 2**-11}


isa = isa_fixture(["generic", "avx2", "avx512"])


def rows_of(num_rows, size, dtype):
    generator = torch.Generator().manual_seed(size)
    gate, up = (5 * torch.randn(num_rows, size, generator=generator) for _ in range(2))
    return gate.to(dtype), up.to(dtype)


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("size", [1, 7, 16, 63, 64, 65, 512, 1001])
def test_agrees_with_float64(size, dtype, isa):
    gate, up = rows_of(5, size, dtype)
    out = ops.swiglu(gate, up)
    assert out.dtype is dtype
    exact = F.silu(gate.double()) * up.double()
    torch.testing.assert_close(out.double(), exact, rtol=ROUNDING[dtype], atol=1e-7)


def test_large_gates(isa):
    gate = torch.tensor([[-1e30, -200.0, -89.0, 0.0, 89.0, 200.0, 1e30, math.nan]])
    out = ops.swiglu(gate, torch.full_like(gate, 2.0))[0]
    torch.testing.assert_close(out[:4], torch.zeros(4), rtol=0, atol=1e-30)
    assert out[4:7].tolist() == [178.0, 400.0, 2 * gate[0, 6].item()]
    assert out[7].isnan()


def test_threads_and_the_rows_beside_change_no_bit(isa):
    gate, up = rows_of(300, 512, torch.bfloat16)
    before = torch.get_num_threads()
    results = []
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        results.append(ops.swiglu(gate, up))
    torch.set_num_threads(before)
    assert torch.equal(*results)
    assert torch.equal(ops.swiglu(gate[17:18], up[17:18]), results[0][17:18])


def test_halves_of_one_projection(isa):
    both, _ = rows_of(6, 200, torch.float32)
    gate, up = both.chunk(2, dim=1)
    assert torch.equal(ops.swiglu(gate, up), ops.swiglu(gate.contiguous(), up.contiguous()))


def test_torch_takes_over_for_gradients():
    gate, up = (x.requires_grad_() for x in rows_of(4, 32, torch.float32))
    actual = torch.autograd.grad(ops.swiglu(gate, up).sum(), (gate, up))
    expected = torch.autograd.grad((F.silu(gate) * up).sum(), (gate, up))
    assert all(map(torch.equal, actual, expected))


def test_torch_takes_over_when_compiled_or_empty():
    gate, up = rows_of(4, 32, torch.float32)
    compiled = torch.compile(ops.swiglu, fullgraph=True)(gate, up)
    torch.testing.assert_close(compiled, ops.swiglu(gate, up))
    assert ops.swiglu(gate[:0], up[:0]).shape == (0, 32)


@pytest.mark.parametrize("other", [lambda x: x[:3], lambda x: x.double()])
def test_what_does_not_fit_is_named(other):
    gate, up = rows_of(4, 32, torch.float32)
    with pytest.raises(ValueError, match=r"up: expected torch.float32 \[4, 32\], got "):
        ops.swiglu(gate, other(up))


def test_nobody_who_traces_is_passed_by():
    x, _ = rows_of(4, 32, torch.float32)

    def ours(x):
        return ops.swiglu(x, x)

    def by_torch(x):
        return F.silu(x) * x

    for trace in (make_fx(ours), lambda *a: torch.jit.trace(ours, a, check_trace=False)):
        traced = trace(torch.randn_like(x))
        torch.testing.assert_close(traced(x), by_torch(x))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert ours(mode.from_tensor(x)).shape == (4, 32)
    actual = torch.func.jvp(ours, (x,), (torch.ones_like(x),))
    expected = torch.func.jvp(by_torch, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(ours(torch._neg_view(x)), by_torch(-x))


@pytest.mark.parametrize("shape", [(32,), (2, 4, 32)])
def test_rows_have_two_dimensions(shape):
    x = torch.randn(shape)
    with pytest.raises(ValueError, match=r"expected \[rows, size\], got \["):
        ops.swiglu(x, x)
