"""swiglu against float64 on every instruction set."""

import math

import pytest
import torch
import torch.nn.functional as F
from on_backends import isa_fixture

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


@pytest.mark.parametrize("other", [lambda x: x[:3], lambda x: x.double()])
def test_what_does_not_fit_is_named(other):
    gate, up = rows_of(4, 32, torch.float32)
    with pytest.raises(ValueError, match=r"up: expected torch.float32 \[4, 32\], got "):
        ops.swiglu(gate, other(up))
