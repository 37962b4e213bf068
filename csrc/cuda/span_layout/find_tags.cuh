#pragma once

// Step 1: the tags among the tokens, chunk by chunk, each chunk's in order.

#include "cuda/common/block_scan.cuh"
#include "cuda/ptx/shared.cuh"
#include "cuda/span_layout/config.h"

namespace pdiff::cuda {

enum TagKind : int32_t { kNoTag = 0, kOpens = 1, kCloses = 2, kSync = 3 };

/// A tag is one word: where it is in the batch, and its kind.
__device__ __forceinline__ int32_t tag_at(int32_t position, int32_t kind) {
  return position << 2 | kind;
}
__device__ __forceinline__ int32_t position_of(int32_t tag) { return tag >> 2; }
__device__ __forceinline__ int32_t kind_of(int32_t tag) { return tag & 3; }
__device__ __forceinline__ bool is_bracket(int32_t tag) { return kind_of(tag) != kSync; }

__device__ __forceinline__ int32_t kind_of_token(int64_t id, const SpanTagIds& tags) {
  if (id == tags.sync) return kSync;
  if (id == tags.async_start) return kOpens;
  return id == tags.async_end ? kCloses : kNoTag;
}

__global__ void __launch_bounds__(kFindThreads)
    find_tags_kernel(const __grid_constant__ PlanFromTokensParams p, PlanWorkspace work) {
  constexpr int kRounds = kChunkTokens / kFindThreads;
  auto* masks = reinterpret_cast<uint32_t*>(shared_memory());  // [kChunkTokens / 32] tags among 32
  static_assert(kChunkTokens / kWarpSize == kWarpSize);
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarpSize, warp = thread / kWarpSize;
  const int32_t begin = static_cast<int32_t>(blockIdx.x) * kChunkTokens;
  int32_t kinds[kRounds];
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const int32_t i = begin + round * kFindThreads + thread;
    kinds[round] = i < p.total_tokens ? kind_of_token(p.token_ids[i], p.tags) : kNoTag;
  }
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const uint32_t mask = __ballot_sync(kAllLanes, kinds[round] != kNoTag);
    if (lane == 0) masks[round * (kFindThreads / kWarpSize) + warp] = mask;
  }
  __syncthreads();
  const int32_t own = __popc(masks[lane]), through = warp_inclusive_sum(own);
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const int idx = round * (kFindThreads / kWarpSize) + warp;
    const int32_t before = __shfl_sync(kAllLanes, through - own, idx);
    if (kinds[round] == kNoTag) continue;
    const int32_t rank = before + __popc(masks[idx] & ((1u << lane) - 1));
    work.chunk_tags[begin + rank] = tag_at(begin + round * kFindThreads + thread, kinds[round]);
  }
  if (thread == kWarpSize - 1) work.chunk_counts[blockIdx.x] = through;
}

}  // namespace pdiff::cuda
