"""rms_norm against float64 on every instruction set."""

import pytest
import torch
import torch.nn.functional as F
from on_backends import isa_fixture

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


def test_a_weight_of_another_size_is_named():
    x, weight = rows_of(4, 32, torch.float32)
    with pytest.raises(ValueError, match=r"weight: expected \[32\], got \[31\]"):
        ops.rms_norm(x, weight[:31], EPS)
