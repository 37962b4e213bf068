"""What a layer does between products, on the 480 rows of a denoising step, against eager torch.

Three models' sizes: the bundled one, one of 56 million parameters, one of a billion. Bytes are one
read of what goes in and one write of what comes out; both stay in the caches, as between two
products.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from pdiff_runtime import ops
from pdiff_runtime.bench.case import DTYPES, Case, Prepared

RMS_NORM, SWIGLU, ROPE = "rms_norm", "swiglu", "rope_kv_write"
ROWS = 480
SIZES = {  # hidden, intermediate, query heads, KV heads, head_dim
    "2M": (192, 512, 3, 1, 64),
    "56M": (512, 1408, 8, 2, 64),
    "1B": (2048, 5632, 16, 8, 128),
}


def cases(kernel: str, scale: int = 1) -> list[Case]:
    """Every size in float32 and bfloat16."""
    prepare = {RMS_NORM: _rms_norm, SWIGLU: _swiglu, ROPE: _rope}[kernel]
    return [
        Case(kernel, name, dtype, functools.partial(prepare, name, dtype, max(2, ROWS // scale)))
        for name in SIZES
        for dtype in ("fp32", "bf16")
    ]


def _rms_norm(name: str, dtype: str, rows: int) -> Prepared:
    x = _random(dtype, rows, SIZES[name][0])
    weight = torch.ones(x.shape[1]).to(x)
    ours = functools.partial(ops.rms_norm, x, weight, 1e-6)
    peer = functools.partial(F.rms_norm, x, x.shape[1:], weight, 1e-6)
    torch.testing.assert_close(ours(), peer(), rtol=2e-2, atol=1e-3)
    return Prepared(ours, {"torch, eager": peer}, 2 * x.nbytes, "B")


def _swiglu(name: str, dtype: str, rows: int) -> Prepared:
    gate, up = (_random(dtype, rows, SIZES[name][1]) for _ in range(2))
    ours = functools.partial(ops.swiglu, gate, up)

    def peer() -> Tensor:
        return F.silu(gate) * up

    torch.testing.assert_close(ours(), peer(), rtol=2e-2, atol=1e-3)
    return Prepared(ours, {"torch, eager": peer}, 3 * gate.nbytes, "B")


def _rope(name: str, dtype: str, rows: int) -> Prepared:
    _, _, num_heads_q, num_heads_kv, head_dim = SIZES[name]
    q, k, v = (_random(dtype, rows, n, head_dim) for n in (num_heads_q, *[num_heads_kv] * 2))
    k_cache, v_cache = (_random(dtype, 32, 64, num_heads_kv, head_dim) for _ in range(2))
    angle = torch.arange(2048)[:, None] / 10000 ** (torch.arange(head_dim // 2) / head_dim * 2)
    cos, sin = angle.cos(), angle.sin()
    positions = torch.arange(rows) + 700
    slots = torch.randperm(32 * 64)[:rows]

    def rotated(x: Tensor) -> Tensor:
        c, s = (t[positions, None].to(x.dtype) for t in (cos, sin))
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * c - b * s, b * c + a * s), dim=-1)

    def peer() -> tuple[Tensor, Tensor]:
        turned_q, turned_k = rotated(q), rotated(k)
        k_cache.flatten(0, 1)[slots] = turned_k
        v_cache.flatten(0, 1)[slots] = v
        return turned_q, turned_k

    def ours(q: Tensor = q, k: Tensor = k) -> None:
        ops.rope_kv_write_(q, k, v, cos, sin, positions, slots, k_cache, v_cache)

    expected, turned = peer(), (q.clone(), k.clone())
    ours(*turned)
    for actual, reference in zip(turned, expected, strict=True):
        torch.testing.assert_close(actual, reference, rtol=2e-2, atol=4e-2)
    num_bytes = 2 * (q.nbytes + k.nbytes) + k.nbytes + 2 * v.nbytes
    return Prepared(ours, {"torch, eager": peer}, num_bytes, "B")


def _random(dtype: str, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator).to(DTYPES[dtype])
