"""Ops with a kernel on CPUs alone: where torch's own takes over."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from pdiff_runtime import ops

EPS = 1e-6


def rms_norm(x, weight):
    return ops.rms_norm(x, weight, EPS)


def rms_norm_of_torch(x, weight):
    return F.rms_norm(x, x.shape[1:], weight, EPS)


def swiglu_of_torch(gate, up):
    return F.silu(gate) * up


@pytest.fixture(params=["rms_norm", "swiglu"])
def case(request):
    """Ours, torch's, and what both take."""
    x, y = torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(0))
    if request.param == "rms_norm":
        return rms_norm, rms_norm_of_torch, x, y[0].clone()
    return ops.swiglu, swiglu_of_torch, x, y


def test_for_gradients(case):
    ours, by_torch, x, y = case
    x.requires_grad_()
    y.requires_grad_()
    actual = torch.autograd.grad(ours(x, y).sum(), (x, y))
    expected = torch.autograd.grad(by_torch(x, y).sum(), (x, y))
    assert all(map(torch.equal, actual, expected))
    with torch.no_grad():
        torch.testing.assert_close(ours(x, y), by_torch(x, y))


def test_for_forward_gradients(case):
    ours, by_torch, x, y = case
    for tangents in [(torch.ones_like(x), torch.zeros_like(y)), (x, torch.ones_like(y))]:
        actual = torch.func.jvp(ours, (x, y), tangents)
        expected = torch.func.jvp(by_torch, (x, y), tangents)
        torch.testing.assert_close(actual, expected)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        assert torch.autograd.forward_ad.unpack_dual(ours(dual, y)).tangent is not None


def test_when_compiled(case):
    ours, _, x, y = case
    torch.testing.assert_close(torch.compile(ours, fullgraph=True)(x, y), ours(x, y))


@pytest.mark.parametrize(
    "trace", [make_fx, lambda f: lambda *a: torch.jit.trace(f, a, check_trace=False)]
)
def test_when_traced(trace, case):
    ours, by_torch, x, y = case
    traced = trace(lambda x: ours(x, y))(torch.randn_like(x))
    torch.testing.assert_close(traced(x), by_torch(x, y))


def test_for_tensors_without_memory_of_their_own(case):
    ours, by_torch, x, y = case
    with FakeTensorMode() as mode:
        assert ours(mode.from_tensor(x), mode.from_tensor(y)).shape == (4, 32)
    torch.testing.assert_close(ours(torch._neg_view(x), y), by_torch(-x, y))
    vmapped = torch.func.vmap(ours, in_dims=(0, None))(x[None], y)
    torch.testing.assert_close(vmapped[0], by_torch(x, y))


def test_for_nothing(case):
    ours, _, x, y = case
    assert ours(x[:0], y[:0] if y.ndim == 2 else y).shape == (0, 32)


@pytest.mark.parametrize("shape", [(32,), (2, 4, 32)])
def test_rows_have_two_dimensions(shape, case):
    ours, _, _, y = case
    with pytest.raises(ValueError, match=r"expected \[rows, size\], got \["):
        ours(torch.randn(shape), y)
