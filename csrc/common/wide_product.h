#pragma once

#include <cstdint>

#include "common/macros.h"

namespace pdiff {

/// The two halves of a 32 x 32 bit product. Word is uint32_t, or a vector of them with its own
/// multiply_wide.
template <typename Word>
struct WideProduct {
  Word high, low;
};

PDIFF_HD WideProduct<uint32_t> multiply_wide(uint32_t a, uint32_t b) {
  const uint64_t product = uint64_t{a} * b;
  return {static_cast<uint32_t>(product >> 32), static_cast<uint32_t>(product)};
}

}  // namespace pdiff
