#pragma once

#include "common/macros.h"

namespace pdiff {

/// The order in which tokens are kept and positions are unmasked: higher value first, then lower
/// index. Total on numbers, so every "k best" is one well-defined set on every device.
template <typename Index>
PDIFF_HD bool ranks_before(float value_a, Index index_a, float value_b, Index index_b) {
  return value_a > value_b || (value_a == value_b && index_a < index_b);
}

}  // namespace pdiff
