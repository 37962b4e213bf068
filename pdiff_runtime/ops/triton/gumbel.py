"""Random numbers that have an address: the words of csrc/common/philox.h, as Gumbel numbers."""

from __future__ import annotations

import triton
import triton.language as tl

TOKEN = tl.constexpr(0)
POSITION = tl.constexpr(1)
"""What a random number is for; part of its address."""


@triton.jit
def random_words(seed, position, step_idx, use: tl.constexpr, group):
    """Words of the ids 4 * group .. 4 * group + 3, in the shape of `group`."""
    zero = (group ^ group).to(tl.uint32)
    counter = zero + group.to(tl.uint32)
    position = zero + position.to(tl.uint32, bitcast=True)
    step_idx = zero + step_idx.to(tl.uint32, bitcast=True)
    return tl.philox(seed, counter, position, step_idx, zero + use)


@triton.jit
def gumbel(word):
    """-log(-log(1 - v)) with v = (word + 1/2) / 2^32, in float32: small words, where the numbers
    are large, by the series of log(1 - v)."""
    v = (word.to(tl.float32) + 0.5) * 2.0**-32
    series = v * (1.0 + v * (1 / 2 + v * (1 / 3 + v * (1 / 4 + v * (1 / 5 + v * (1 / 6))))))
    exact = -tl.log(1.0 - tl.minimum(v, 0.99999994))
    return -tl.log(tl.where(v < 1 / 64, series, exact))
