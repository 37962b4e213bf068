#pragma once

#include <math.h>

#include <cstdint>

#include "common/macros.h"

namespace pdiff {

/// A standard Gumbel number from a uniform word: -log(-log(1 - v)), v = (word + 1/2) / 2^32. Small
/// words give large numbers, where they lie densest. The argmax of logit + Gumbel over ids is a
/// sample of the softmax; the k largest are k draws without replacement.
PDIFF_HD float gumbel(uint32_t word) {
  return static_cast<float>(-log(-log1p(-(word + 0.5) * 0x1p-32)));
}

}  // namespace pdiff
