"""rms_norm against float64 on every instruction set, and where torch's takes over."""

import pytest
import torch
import torch.nn.functional as F
from on_backends import isa_fixture
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from pdiff_runtime import ops

EPS = 1e-6
ROUNDING = {torch.float32: 2**-21, torch.bfloat16: 2**-8, torch.float16: 2**-11}


isa = isa_fixture(["generic", "avx2", "avx512"])


def rows_of(num_rows, size, dtype):
    generator = torch.Generator().manual_seed(size)
    x = 3 * torch.randn(num_rows, size, generator=generator)
    return x.to(dtype), torch.randn(size, generator=generator).to(dtype)


def exact(x, weight):
    return F.rms_norm(x.double(), (x.shape[1],), weight.double(), EPS)


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("size", [1, 7, 16, 63, 64, 65, 192, 1001])
def test_agrees_with_float64(size, dtype, isa):
    x, weight = rows_of(5, size, dtype)
    out = ops.rms_norm(x, weight, EPS)
    assert out.dtype is dtype
    torch.testing.assert_close(out.double(), exact(x, weight), rtol=ROUNDING[dtype], atol=1e-7)


def test_threads_and_the_rows_beside_change_no_bit(isa):
    x, weight = rows_of(400, 192, torch.bfloat16)
    before = torch.get_num_threads()
    results = []
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        results.append(ops.rms_norm(x, weight, EPS))
    torch.set_num_threads(before)
    assert torch.equal(*results)
    assert torch.equal(ops.rms_norm(x[17:18], weight, EPS), results[0][17:18])


def test_rows_may_be_any_stride_apart(isa):
    x, weight = rows_of(6, 100, torch.float32)
    assert torch.equal(ops.rms_norm(x[::2], weight, EPS), ops.rms_norm(x, weight, EPS)[::2])


def test_a_nan_stays_in_its_row(isa):
    x, weight = rows_of(3, 65, torch.float32)
    expected = ops.rms_norm(x, weight, EPS)
    x[1, 64] = torch.nan
    out = ops.rms_norm(x, weight, EPS)
    assert out[1].isnan().all()
    assert torch.equal(out[::2], expected[::2])


def test_torch_takes_over_for_gradients():
    x, weight = rows_of(4, 32, torch.float32)
    x.requires_grad_()
    weight.requires_grad_()
    actual = torch.autograd.grad(ops.rms_norm(x, weight, EPS).sum(), (x, weight))
    expected = torch.autograd.grad(F.rms_norm(x, (32,), weight, EPS).sum(), (x, weight))
    assert all(map(torch.equal, actual, expected))
    with torch.no_grad():
        torch.testing.assert_close(ops.rms_norm(x, weight, EPS), F.rms_norm(x, (32,), weight, EPS))


def test_torch_takes_over_when_compiled_or_empty():
    x, weight = rows_of(4, 32, torch.float32)
    compiled = torch.compile(ops.rms_norm, fullgraph=True)(x, weight, EPS)
    torch.testing.assert_close(compiled, ops.rms_norm(x, weight, EPS))
    assert ops.rms_norm(x[:0], weight, EPS).shape == (0, 32)


def test_a_weight_of_another_size_is_named():
    x, weight = rows_of(4, 32, torch.float32)
    with pytest.raises(ValueError, match=r"weight: expected \[32\], got \[31\]"):
        ops.rms_norm(x, weight[:31], EPS)


def test_nobody_who_traces_is_passed_by():
    x, y = rows_of(4, 32, torch.float32)

    def ours(x):
        return ops.rms_norm(x, y, EPS)

    def by_torch(x):
        return F.rms_norm(x, (32,), y, EPS)

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
    x, y = torch.randn(shape), torch.ones(32)
    with pytest.raises(ValueError, match=r"expected \[rows, size\], got \["):
        ops.rms_norm(x, y, EPS)
