#pragma once

// What an unmask rule is made of: the confidence that ranks a span's positions, and which of the
// ranked ones are sure enough to be written.

#include <cstdint>

#include "common/macros.h"
#include "pdiff/unmask.h"

namespace pdiff {

enum class UnmaskConfidence : int32_t { kEntropy, kProbability, kMargin };

PDIFF_HD UnmaskConfidence confidence_of(UnmaskRule rule) {
  switch (rule) {
    case UnmaskRule::kEntropy:
    case UnmaskRule::kEntropyBudget:
      return UnmaskConfidence::kEntropy;
    case UnmaskRule::kMargin:
      return UnmaskConfidence::kMargin;
    default:
      return UnmaskConfidence::kProbability;
  }
}

/// Whether the first position that is not sure ends what a span writes; else it alone is left out.
PDIFF_HD bool writes_a_prefix(UnmaskRule rule) {
  return rule == UnmaskRule::kFactor || rule == UnmaskRule::kEntropyBudget;
}

/// Whether the position of this rank, from 1, may be written. The first one is, sure or not.
/// `entropy_before` is the sum over the ranks before it, of use to kEntropyBudget alone.
PDIFF_HD bool is_sure(UnmaskRule rule, float threshold, float confidence, int64_t rank,
                      double entropy_before) {
  switch (rule) {
    case UnmaskRule::kThreshold:
      return confidence >= threshold;
    case UnmaskRule::kFactor:
      return static_cast<double>(rank + 1) * (1.0 - confidence) < threshold;
    case UnmaskRule::kEntropyBudget:
      return entropy_before <= threshold;
    default:
      return true;
  }
}

}  // namespace pdiff
