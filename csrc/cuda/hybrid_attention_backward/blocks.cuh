#pragma once

// How the blocks of a work item get to a kernel: two tiles at a time, the next on its way.

#include <cstdint>

#include "common/visible_walk.h"
#include "cuda/common/shared_tile.cuh"
#include "cuda/hybrid_attention_backward/config.h"
#include "cuda/ptx/compiler.cuh"
#include "cuda/ptx/math.cuh"

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

template <typename T>
__device__ __forceinline__ const unsigned char* bytes_at(const void* tensor, int64_t element) {
  return reinterpret_cast<const unsigned char*>(static_cast<const T*>(tensor) + element);
}

/// Rows of two tensors that belong together; where not `valid`, zeros stand for them.
struct RowPair {
  const unsigned char *a, *b;
  bool valid;
};

/// Packed row `packed` of q and dout. The rows of one token lie together, and a gap follows, so an
/// address is two multiply-adds.
template <int kHeadDim>
__device__ __forceinline__ RowPair query_pair(const Problem& problem, const unsigned char* q,
                                              const unsigned char* dout, int packed, bool valid) {
  const int64_t token = problem.by_group.divide(packed), offset = int64_t{packed} * (2 * kHeadDim);
  return {q + offset + token * problem.q_gap, dout + offset + token * problem.dout_gap, valid};
}

__device__ __forceinline__ RowPair key_pair(const Problem& problem, const unsigned char* k,
                                            const unsigned char* v, int key, bool valid) {
  return {k + int64_t{key} * problem.k_bytes, v + int64_t{key} * problem.v_bytes, valid};
}

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
    const RowPair from = row_pair(first_row + i * kRowsAtOnce);
    const int below = i * kTileBytes<kRowsAtOnce, kHeadDim>;
    copy_async_16(a + to + below, from.a + piece * kPieceBytes, from.valid);
    copy_async_16(b + to + below, from.b + piece * kPieceBytes, from.valid);
  }
}

/// Writes rows of sums, first_row and on, that a warp holds in blocks of 16: through its part of a
/// tile that no one else uses any more, so that 16 bytes go at a time. row_at(row) is where a row
/// goes, null if it does not.
template <typename T, int kHeadDim, int kBlocks, typename RowAt>
__device__ __forceinline__ void store_rows(unsigned char* tile, int first_row,
                                           const float (&x)[kBlocks][kHeadDim / 8][4], float scale,
                                           const RowAt& row_at) {
  const int lane = this_thread() % kWarpSize;
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int c = 0; c < kHeadDim / 8; ++c) {
        const int to = pair_offset<kHeadDim>(first_row + 16 * i + 8 * h, 8 * c, lane);
        *reinterpret_cast<uint32_t*>(tile + to) =
            pack2<T>(scale * x[i][c][2 * h], scale * x[i][c][2 * h + 1]);
      }
    }
  }
  __syncwarp();
  constexpr int kPieces = kHeadDim / kPieceElements, kRowsAtOnce = kWarpSize / kPieces;
  const int piece = lane % kPieces;
#pragma unroll
  for (int i = 0; i < 16 * kBlocks; i += kRowsAtOnce) {
    const int row = first_row + i + lane / kPieces;
    T* to = row_at(row);
    if (to == nullptr) continue;
    *reinterpret_cast<uint4*>(to + piece * kPieceElements) =
        *reinterpret_cast<const uint4*>(tile + piece_offset<kHeadDim>(row, piece));
  }
}

/// What the threads tell one another about two blocks, past the barrier between them.
struct BlockQueue {
  int32_t position[kStages][kNumWarps];  // where the owners of a warp go after the stage's block
  uint32_t seen[kStages][kNumThreads];   // what a thread's owner sees of the stage's block
};

/// Goes through the blocks of kBlock positions that the walks of all threads make up together.
/// Calls copy(stage, position) to start the copies of a block, take(walk, position) for what the
/// thread's owner sees of it, and when the copies have arrived accumulate(stage). What the caller
/// started to copy before has arrived with the first block, or when there is none, at the end.
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
  if (position_after(1) == kNowhere) {
    copy_async_wait<0>();
    __syncthreads();
    return;
  }
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
