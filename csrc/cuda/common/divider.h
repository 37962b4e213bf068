#pragma once

#include <cstdint>

#include "common/macros.h"

namespace pdiff::cuda {

/// Division by a number that a launch knows, without the division: n / d for 0 <= n < 2^31, d > 0.
/// Exact  with 2^s >= d and m = ceil(2^(31 + s) / d), the error of n * m / 2^(31 + s) stays below
///        n / 2^31 / d, which does not reach the next integer.
struct Divider {
  uint32_t multiplier = 0, shift = 0;

  Divider() = default;
  explicit Divider(int32_t divisor) {
    while ((int64_t{1} << shift) < divisor) ++shift;
    const uint64_t power = uint64_t{1} << (31 + shift), d = static_cast<uint64_t>(divisor);
    multiplier = static_cast<uint32_t>((power + d - 1) / d);
  }

  PDIFF_HD int32_t divide(int32_t n) const {
    const uint64_t product = uint64_t{2 * static_cast<uint32_t>(n)} * multiplier;
    return static_cast<int32_t>(static_cast<uint32_t>(product >> 32) >> shift);
  }
};

}  // namespace pdiff::cuda
