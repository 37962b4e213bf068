#pragma once

// Steps 3 and 4: the tiles of a plan with their work, and their order.

#include "common/gpu_schedule.h"
#include "cuda/common/block_scan.cuh"
#include "cuda/ptx/shared.cuh"
#include "cuda/span_layout/build_segments.cuh"
#include "cuda/span_layout/config.h"

namespace pdiff::cuda {

inline constexpr int kCutThreads = 128;

/// The last of [0, num) sequences whose first tile is at most `tile`: empty ones have none.
__device__ __forceinline__ int32_t sequence_of_tile(const int32_t* tile_begin, int32_t num,
                                                    int32_t tile) {
  return first_past(num, [&](int32_t s) { return tile_begin[s] > tile; }) - 1;
}

__device__ __forceinline__ void cut_tile(const PlanView& plan, const PlanWorkspace& work,
                                         int32_t idx) {
  const int32_t s = sequence_of_tile(work.tile_begin, plan.header.num_sequences, idx);
  const PlanSequence& sequence = plan.sequences[s];
  const SegmentsView segments = segments_of(plan, sequence);
  const int32_t row_lo = (idx - work.tile_begin[s]) * plan.header.tile_rows;
  const int32_t row_hi = min(sequence.num_rows, row_lo + plan.header.tile_rows);
  const int32_t segment = find_segment(segments, 0, segments.num_segments, row_lo);
  work.tiles[idx] = {.sequence = s,
                     .row_lo = row_lo,
                     .row_hi = row_hi,
                     .segment = segment,
                     .part = 0,
                     .num_parts = 1,
                     .slot_begin = 0};
  const int32_t group_size = plan.header.num_heads_q / plan.header.num_heads_kv;
  const int32_t cost = has_few_rows(row_hi - row_lo, group_size) ? 1 : kGpuTileRows / kFewRows;
  work.tile_work[idx] = cost * num_key_tiles_of(segments, segment, row_hi);
}

__device__ __forceinline__ void cut_key_tile(const PlanView& plan, const PlanWorkspace& work,
                                             int32_t idx) {
  const int32_t s = sequence_of_tile(work.key_tile_begin, plan.header.num_sequences, idx);
  const PlanSequence& sequence = plan.sequences[s];
  const KeySegmentsView segments{plan.key_segments + sequence.key_segment_begin,
                                 plan.range_ptr + sequence.key_segment_begin, plan.ranges,
                                 sequence.num_key_segments};
  const int32_t key_lo = (idx - work.key_tile_begin[s]) * kGpuTileKeys;
  const int32_t key_hi = min(sequence.num_keys, key_lo + kGpuTileKeys);
  const int32_t segment = find_key_segment(segments, key_lo);
  work.key_tiles[idx] = {.sequence = s, .key_lo = key_lo, .key_hi = key_hi, .key_segment = segment};
  const int64_t pairs = pairs_of_keys(segments, segment, key_lo, key_hi);
  work.key_tile_work[idx] = static_cast<int32_t>(pairs / kGpuTileKeys);
}

/// A thread per tile and per key tile that there is room for.
__global__ void __launch_bounds__(kCutThreads)
    cut_tiles_kernel(const int32_t* words, const __grid_constant__ PlanWorkspace work,
                     const __grid_constant__ PlanRoom room) {
  const PlanView plan = plan_view_of(words);
  const int32_t idx = static_cast<int32_t>(blockIdx.x * blockDim.x + threadIdx.x);
  if (idx < room.tiles) {
    if (idx < plan.header.num_tiles) cut_tile(plan, work, idx);
  } else if (idx - room.tiles < plan.header.num_key_tiles) {
    cut_key_tile(plan, work, idx - room.tiles);
  }
}

struct OrderShared {
  Count scan[kWarpSize];
  int32_t most;
  int32_t buckets[kMaxBuildThreads];  // one per thread; how many, then where the next one goes
};

/// A counting sort, most work first, with a bucket per thread.
template <typename Record>
__device__ __forceinline__ void order_by_work(OrderShared& shared, const Record* from,
                                              const int32_t* work, int32_t num, Record* to) {
  const int32_t thread = static_cast<int32_t>(threadIdx.x);
  const int32_t num_buckets = static_cast<int32_t>(blockDim.x);
  if (thread == 0) shared.most = 0;
  shared.buckets[thread] = 0;
  __syncthreads();
  int32_t most = 0;
  for (int32_t i = thread; i < num; i += num_buckets) most = max(most, work[i]);
  atomicMax(&shared.most, most);
  __syncthreads();
  int shift = 0;
  while (shared.most >> shift >= num_buckets) ++shift;
  const auto bucket_of = [&](int32_t i) { return num_buckets - 1 - (work[i] >> shift); };
  for (int32_t i = thread; i < num; i += num_buckets) atomicAdd(&shared.buckets[bucket_of(i)], 1);
  __syncthreads();
  Count before{{shared.buckets[thread]}};
  (void)block_scan(before, shared.scan);
  shared.buckets[thread] = before.of[0];
  __syncthreads();
  for (int32_t i = thread; i < num; i += num_buckets) {
    to[atomicAdd(&shared.buckets[bucket_of(i)], 1)] = from[i];
  }
}

/// Block 0 orders the tiles, block 1 the key tiles.
__global__ void __launch_bounds__(kMaxBuildThreads, 1)
    order_tiles_kernel(int32_t* words, const __grid_constant__ PlanWorkspace work) {
  auto& shared = *reinterpret_cast<OrderShared*>(shared_memory());
  const PlanHeader& header = *reinterpret_cast<const PlanHeader*>(words);
  if (blockIdx.x == 0) {
    order_by_work(shared, work.tiles, work.tile_work, header.num_tiles,
                  reinterpret_cast<PlanTile*>(words + header.tiles));
  } else {
    order_by_work(shared, work.key_tiles, work.key_tile_work, header.num_key_tiles,
                  reinterpret_cast<PlanKeyTile*>(words + header.key_tiles));
  }
}

}  // namespace pdiff::cuda
