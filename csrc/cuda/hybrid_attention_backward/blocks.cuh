#pragma once

// How the blocks of a work item get to a kernel: two tiles at a time, the next on its way.

#include <cstdint>

#include "common/visible_walk.h"
#include "cuda/common/shared_tile.cuh"
#include "cuda/hybrid_attention_backward/config.h"
#include "cuda/ptx/compiler.cuh"

namespace pdiff::cuda::attention_backward {

/// The thread's number, asked for anew: nothing that follows from it is kept in registers
/// meanwhile.
__device__ __forceinline__ int this_thread() { return opaque(static_cast<int>(threadIdx.x)); }

/// Puts what take() returns where all threads find it, once they have left the item before. In
/// shared memory, because registers are for products.
template <typename Item, typename Take>
__device__ __forceinline__ void take_item(Item& shared, const Take& take) {
  __syncthreads();
  if (threadIdx.x == 0) shared = take();
  __syncthreads();
}

/// The rows of two tensors that belong together.
template <typename T>
struct RowPair {
  const T *a, *b;
  bool valid;
};

/// Starts to copy two tiles of rows; row_pair(row) says from where.
template <int kRows, int kHeadDim, typename RowPairAt>
__device__ __forceinline__ void copy_row_pairs_async(unsigned char* a, unsigned char* b,
                                                     const RowPairAt& row_pair) {
  constexpr int kPieces = kHeadDim / kPieceElements, kRowsAtOnce = kNumThreads / kPieces;
  static_assert(kRowsAtOnce % 8 == 0, "a thread's pieces lie under one another");
  const int thread = this_thread();
  const int piece = thread % kPieces, first_row = thread / kPieces;
  const int to = piece_offset<kHeadDim>(first_row, piece);
#pragma unroll
  for (int i = 0; i < kRows / kRowsAtOnce; ++i) {
    const auto from = row_pair(first_row + i * kRowsAtOnce);
    const int below = i * kTileBytes<kRowsAtOnce, kHeadDim>;
    copy_async_16(a + to + below, from.a + piece * kPieceElements, from.valid);
    copy_async_16(b + to + below, from.b + piece * kPieceElements, from.valid);
  }
}

/// What the threads tell one another about two blocks, past the barrier between them.
struct BlockQueue {
  int32_t position[kStages][kNumWarps];  // where the owners of a warp go after the stage's block
  uint32_t seen[kStages][kNumThreads];   // what a thread's owner sees of the stage's block
};

/// Goes through the blocks of kBlock positions that the walks of all threads make up together.
/// Calls copy(stage, position) to start the copies of a block, take(walk, position) for what the
/// thread's owner sees of it, and when the copies have arrived accumulate(stage).
template <int kBlock, typename Walk, typename Copy, typename Take, typename Accumulate>
__device__ __forceinline__ void for_each_block(Walk (&walks)[kNumThreads], BlockQueue& queue,
                                               const Copy& copy, const Take& take,
                                               const Accumulate& accumulate) {
  const auto publish = [&](int stage, int32_t position) {
    const int thread = this_thread();
    const uint32_t first = __reduce_min_sync(kAllLanes, static_cast<uint32_t>(position));
    if (thread % kWarpSize == 0) {
      queue.position[stage][thread / kWarpSize] = static_cast<int32_t>(first);
    }
  };
  const auto position_after = [&](int stage) {
    int32_t first = queue.position[stage][0];
#pragma unroll
    for (int w = 1; w < kNumWarps; ++w) first = min(first, queue.position[stage][w]);
    return first;
  };
  const auto start_block = [&](int stage, int32_t position) {
    if (position == kNowhere) return;
    copy(stage, position);
    copy_async_commit();
    const int thread = this_thread();
    Walk& walk = walks[thread];
    queue.seen[stage][thread] = take(walk, position);
    publish(stage, walk.next_from(position + kBlock));
  };

  publish(1, walks[threadIdx.x].next_from(0));
  __syncthreads();
  if (position_after(1) == kNowhere) return;
  start_block(0, position_after(1));
  for (int stage = 0;; stage ^= 1) {
    copy_async_wait<0>();
    __syncthreads();  // the block is here, and everyone has left the other stage
    start_block(stage ^ 1, position_after(stage));
    accumulate(stage);
    if (position_after(stage) == kNowhere) return;
  }
}

}  // namespace pdiff::cuda::attention_backward
