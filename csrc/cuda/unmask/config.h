#pragma once

// What the launches of unmask share: the cut of a row into segments, and the workspace.
//
//   score_segments   a warp per segment   logits -> sums of each segment; the one read of all
//   logits finish_rows      a block per row      sums -> filters -> confidence, candidate
//   select_spans     a block per span     confidences -> written tokens; a rule that ends at the
//                                         first unsure position has them sorted first
//
// Segments, and the lanes and order in which their elements are added, are the same for every
// launch shape: a row's bits depend neither on other rows nor on how the work was shared out.

#include <cstdint>

#include "common/macros.h"
#include "pdiff/unmask.h"

namespace pdiff::cuda::unmasking {

inline constexpr int kSegment = 4096;  // elements
inline constexpr int kSlots = 4;       // vectors of a lane that are loaded together
inline constexpr float kInf = __builtin_inff();
inline constexpr float kLowest = -3.40282347e38f;
inline constexpr float kLog2e = 1.44269504f;

/// A candidate of Gumbel-max; id -1: none yet.
struct Draw {
  float key = -kInf;  // logit / temperature + Gumbel
  float logit = -kInf;
  int32_t id = -1;
};

/// With d = (logit - max) / temperature * log2(e).
struct SegmentScore {
  float max;       // NaN if a logit is
  float sum;       // of 2^d
  float weighted;  // of d 2^d
  Draw draw;
};

struct Workspace {
  SegmentScore* scores;  // [num_rows, num_segments]
  float* lane_max;       // [num_rows, num_segments, 32], or null: no row has a filter
  uint32_t* rank_keys;   // [num_rows]
  uint64_t* sorted;      // [num_rows], of spans too long for shared memory
};

PDIFF_HD int32_t num_segments(int64_t vocab_size) {
  return static_cast<int32_t>((vocab_size + kSegment - 1) / kSegment);
}

}  // namespace pdiff::cuda::unmasking
