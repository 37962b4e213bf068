#pragma once

#include <cstdint>

#include "common/philox.h"
#include "common/unmask_rule.h"
#include "cpu/dispatch.h"
#include "pdiff/unmask.h"

namespace pdiff::cpu {

// A row is read in blocks that stay in the first-level cache from one pass to the next; a segment
// of blocks is the unit of work where rows are fewer than threads can share.
constexpr int kUnmaskBlock = 4096;
constexpr int kUnmaskSegment = 8 * kUnmaskBlock;
constexpr int kUnmaskMaxLanes = 16;
// Lists of logits are padded with -inf to a multiple of this, so loops have no tails.
constexpr int kUnmaskPad = 64;

// The settings of one span, resolved.
struct UnmaskSettings {
  UnmaskConfidence confidence;
  bool draws;                 // temperature > 0
  float inverse_temperature;  // 1 at temperature 0
  float top_p;                // >= 1: off
  int64_t top_k;              // 0: off
  uint32_t step_idx;
  bool filters() const { return top_p < 1.0f || top_k > 0; }
};

// The best candidate of Gumbel-max so far.
struct UnmaskDraw {
  float key;  // logit / temperature + Gumbel
  float logit;
  int32_t idx;
};

// What one pass over logits leaves, with d = (logit - max) / temperature * log2(e).
struct UnmaskScore {
  float max, second;
  int32_t argmax;
  double sum;       // of 2^d
  double weighted;  // of d 2^d
  UnmaskDraw draw;
};

struct UnmaskRows {
  const UnmaskParams& params;
  const int32_t* row_span;         // [num_rows]
  const UnmaskSettings* settings;  // [num_spans]
  const int32_t* banned;           // [num_banned], ascending
  int32_t num_banned;
  bool filters;                      // any span does
  int64_t num_blocks, num_segments;  // of a row
  UnmaskScore* scores;               // [num_rows, num_segments]
  float* lane_max;                   // [num_rows, num_blocks, kUnmaskMaxLanes]
  float* list_logits;                // [num_threads, 2, vocab_size + kUnmaskPad]
  int32_t* list_ids;                 // the same
};

// Writes confidence, candidate and is_nan of every row.
PDIFF_DECLARE_KERNEL(void score_rows(const UnmaskRows& rows))

}  // namespace pdiff::cpu
