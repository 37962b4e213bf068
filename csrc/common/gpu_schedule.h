#pragma once

// How the tiles of the GPU schedule are cut and what they cost. Host and device code.

#include <cstdint>

#include "common/macros.h"
#include "common/tile_walk.h"
#include "pdiff/attention_plan.h"

namespace pdiff {

/// Tokens per tile: the heads of a group fill it.
PDIFF_HD int32_t gpu_tile_rows(int32_t group_size) {
  return group_size < kGpuTileRows ? kGpuTileRows / group_size : 1;
}

PDIFF_HD bool has_few_rows(int32_t num_rows, int32_t group_size) {
  return num_rows * group_size <= kFewRows;
}

/// How many tiles of kGpuTileKeys keys the rows of a tile visit.
PDIFF_HD int32_t num_key_tiles_of(const SegmentsView& view, int32_t segment, int32_t row_hi) {
  int32_t num = 0;
  KeyRun run{};
  for (int32_t key = 0; next_run(view, segment, row_hi, key, &run); key = run.key_lo + 1) {
    num += (run.key_hi - run.key_lo + kGpuTileKeys - 1) / kGpuTileKeys;
  }
  return num;
}

/// The key segments of one sequence.
struct KeySegmentsView {
  const KeyInterval* segments;
  const int32_t* range_ptr;
  const Segment* ranges;
  int32_t num_segments;
};

/// The first key segment that ends after `key`.
PDIFF_HD int32_t find_key_segment(const KeySegmentsView& view, int32_t key) {
  int32_t lo = 0, hi = view.num_segments;
  while (lo < hi) {
    const int32_t mid = lo + (hi - lo) / 2;
    if (view.segments[mid].hi <= key) {
      lo = mid + 1;
    } else {
      hi = mid;
    }
  }
  return lo;
}

/// Pairs of rows and keys that a key tile's rows make up, over whole ranges.
PDIFF_HD int64_t pairs_of_keys(const KeySegmentsView& view, int32_t segment, int32_t key_lo,
                               int32_t key_hi) {
  int64_t pairs = 0;
  for (int32_t s = segment; s < view.num_segments && view.segments[s].lo < key_hi; ++s) {
    const int32_t lo = view.segments[s].lo > key_lo ? view.segments[s].lo : key_lo;
    const int32_t hi = view.segments[s].hi < key_hi ? view.segments[s].hi : key_hi;
    for (int32_t r = view.range_ptr[s]; r < view.range_ptr[s + 1]; ++r) {
      pairs += int64_t{hi - lo} * (view.ranges[r].q_hi - view.ranges[r].q_lo);
    }
  }
  return pairs;
}

}  // namespace pdiff
