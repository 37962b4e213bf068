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

/// No word above this one gives gumbel(word) >= bound. Rounded up: a caller who skips larger words
/// never skips a winner.
PDIFF_HD uint32_t largest_word_reaching(double bound) {
  const double words = -expm1(-exp(-bound)) * 0x1p32 * (1.0 + 1e-6) + 1.0;
  return words < 4294967295.0 ? static_cast<uint32_t>(words) : 4294967295u;
}

}  // namespace pdiff
