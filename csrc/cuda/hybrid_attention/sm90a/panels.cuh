#pragma once

// What Hopper's attention kernels share: tiles of 64-column panels, rings of them, rows to store.

#include <cstdint>

#include "cuda/common/warp.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/math.cuh"

namespace pdiff::cuda::sm90a {

/// How a block of a producer and two consumer warpgroups shares its registers. It begins with 168 a
/// thread, and who asks for more than others have given back waits for ever.
template <int kProducer, int kConsumer>
struct RegisterShares {
  static_assert(kProducer + 2 * kConsumer <= 3 * 168);
  static constexpr int kOfProducer = kProducer, kOfConsumer = kConsumer;
};

/// A place in a ring of kSlots: the k-th use of a slot waits for phase k of its barriers.
template <int kSlots>
struct RingPlace {
  static_assert((kSlots & (kSlots - 1)) == 0, "a place is one number");
  int count = 0;

  __device__ int slot() const { return count % kSlots; }
  __device__ int phase() const { return count / kSlots; }
  __device__ void next() { ++count; }
};

/// Step `step` of 16 columns, the summed ones, of rows that lie as rows.
template <int kPanelBytes>
__device__ __forceinline__ uint64_t column_step(uint64_t panels, int step) {
  return panels + step / 4 * (kPanelBytes >> 4) + step % 4 * 2;
}

/// Step `step` of 16 rows, the summed ones.
__device__ __forceinline__ uint64_t row_step(uint64_t panels, int step) {
  return panels + step * 128;
}

/// Between arithmetic that is to go on while products are under way and the wait for them: the
/// compiler moves the wait up past arithmetic, but not past a branch, which the wait for a phase
/// that is known to be over comes down to.
__device__ __forceinline__ void work_before_wait(CopyBarrier& barrier, int phase_that_is_over) {
  barrier.wait(phase_that_is_over);
}

/// Lane t of four lanes gets x[t] of each of them, in their order.
__device__ __forceinline__ void transpose_across_four_lanes(uint32_t (&x)[4], int t) {
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if ((i & bit) != 0) continue;
      const uint32_t received = __shfl_xor_sync(kAllLanes, (t & bit) != 0 ? x[i] : x[i | bit], bit);
      ((t & bit) != 0 ? x[i] : x[i | bit]) = received;
    }
  }
}

/// Writes row g + 8 half of a warp's accumulator times `scale`, 16 bytes a lane. All lanes call it;
/// `to` is the row of each lane's g, and is not written where not `valid`.
template <typename T, int kColumns>
__device__ __forceinline__ void store_row(T* to, const float (&x)[kColumns / 2], int half,
                                          float scale, bool valid) {
  const int t = static_cast<int>(threadIdx.x) % 4;
#pragma unroll
  for (int j = 0; j < kColumns / 8; j += 4) {
    uint32_t pairs[4];
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      const int i = 4 * (j + b) + 2 * half;
      pairs[b] = pack2<T>(x[i] * scale, x[i + 1] * scale);
    }
    transpose_across_four_lanes(pairs, t);
    if (valid) {
      *reinterpret_cast<uint4*>(to + (j + t) * 8) =
          make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    }
  }
}

}  // namespace pdiff::cuda::sm90a
