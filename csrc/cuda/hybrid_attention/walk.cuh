#pragma once

// A block's walk over the keys of a query tile: common/tile_walk.h, with what the tile needs of the
// plan staged in shared memory, where a look-up costs a tenth of one in global memory.

#include <cstdint>

#include "common/tile_walk.h"
#include "cuda/common/warp.cuh"

namespace pdiff::cuda {

/// In shared memory. Longer lists are rare, and stay in global memory.
struct TileWalk {
  static constexpr int kMaxSegments = 31, kMaxIntervals = 128;

  PlanTile tile;
  PlanSequence sequence;
  SegmentsView view;  // of the tile's segments: the first one is 0
  Segment segments[kMaxSegments];
  int32_t interval_ptr[kMaxSegments + 1];
  KeyInterval intervals[kMaxIntervals];
};

/// Fills `walk` for a tile. One whole warp calls it, and the block meets before it reads.
__device__ __forceinline__ void stage_walk(TileWalk& walk, const PlanView& plan,
                                           const PlanTile& tile, const PlanSequence& sequence,
                                           int lane) {
  const int32_t first = sequence.segment_begin + tile.segment;
  const int32_t num_left = sequence.num_segments - tile.segment;
  const Segment* segments = plan.segments + first;
  const int32_t* interval_ptr = plan.interval_ptr + first;

  // Segments ascend, so those that start above the tile's end are a prefix.
  const Segment segment = lane < num_left ? segments[lane] : Segment{};
  const int32_t ptr = lane <= num_left ? interval_ptr[lane] : 0;
  const bool reaches = lane < num_left && segment.q_lo < tile.row_hi;
  const int num_segments = __popc(__ballot_sync(kAllLanes, reaches));
  const int32_t begin = __shfl_sync(kAllLanes, ptr, 0);
  const int32_t end = __shfl_sync(kAllLanes, ptr, num_segments % kWarpSize);
  const bool fits =
      num_segments <= TileWalk::kMaxSegments && end - begin <= TileWalk::kMaxIntervals;
  if (fits) {
    if (lane < num_segments) walk.segments[lane] = segment;
    if (lane <= num_segments) walk.interval_ptr[lane] = ptr - begin;
    for (int32_t i = lane; i < end - begin; i += kWarpSize) {
      walk.intervals[i] = plan.intervals[begin + i];
    }
  }
  if (lane == 0) {
    walk.tile = tile;
    walk.sequence = sequence;
    walk.view = fits ? SegmentsView{walk.segments, walk.interval_ptr, walk.intervals, num_segments}
                     : SegmentsView{segments, interval_ptr, plan.intervals, num_left};
  }
}

/// A tile of keys [key, key + num_keys()) of a run.
struct KeyCursor {
  KeyRun run;
  int32_t key;

  __device__ __forceinline__ int32_t num_keys() const {
    return run.key_hi - key < kGpuTileKeys ? run.key_hi - key : kGpuTileKeys;
  }
  /// How many keys of the run lie before this tile.
  __device__ __forceinline__ int32_t offset() const { return key - run.key_lo; }
};

/// Goes to the first key tile; false when the rows see no key.
__device__ __forceinline__ bool first_keys(const TileWalk& walk, KeyCursor* cursor) {
  const bool found = next_run(walk.view, 0, walk.tile.row_hi, 0, &cursor->run);
  cursor->key = cursor->run.key_lo;
  return found;
}

/// Goes `num` key tiles on; false past the last.
__device__ __forceinline__ bool advance_keys(const TileWalk& walk, KeyCursor* cursor,
                                             int32_t num = 1) {
  cursor->key += num * kGpuTileKeys;
  while (cursor->key >= cursor->run.key_hi) {
    const int32_t num_past = (cursor->key - cursor->run.key_hi) / kGpuTileKeys;
    if (!next_run(walk.view, 0, walk.tile.row_hi, cursor->run.key_lo + 1, &cursor->run)) {
      return false;
    }
    cursor->key = cursor->run.key_lo + num_past * kGpuTileKeys;
  }
  return true;
}

}  // namespace pdiff::cuda
