#pragma once

#include "cpu/dispatch.h"
#include "pdiff/weighted_cross_entropy.h"

namespace pdiff::cpu {

// Writes cross_entropy[row] of every row that is not ignored, and dlogits.
PDIFF_DECLARE_KERNEL(void cross_entropy_rows(const WeightedCrossEntropyParams& params,
                                             double* cross_entropy))

}  // namespace pdiff::cpu
