#pragma once

// How many of a span's best are written by a rule that ends at the first which is not sure.

#include "common/unmask_rule.h"
#include "cuda/common/block_scan.cuh"
#include "cuda/common/block_sort.cuh"

namespace pdiff::cuda::unmasking {

inline constexpr uint32_t kMaxSortedInShared = 2048;

struct SurePrefixShared {
  uint64_t sorted[kMaxSortedInShared];
  Counts<double, 1> of_warps[kWarpSize];
  uint32_t num_sure;
};

/// At least 1 and at most `num`; that many rows of begin .. end - 1 have a key other than 0. They
/// are sorted, larger keys first, in shared memory or, where they are too many, in `memory`
/// [num_rows]. Spans that overlap, as they never should, may spoil each other's order, not more.
__device__ __forceinline__ uint32_t sure_prefix(const UnmaskParams& p, int64_t span, int64_t begin,
                                                int64_t end, const uint32_t* keys, uint64_t* memory,
                                                uint32_t num, SurePrefixShared& shared) {
  const auto num_rows = static_cast<uint32_t>(end - begin);
  uint64_t* sorted = num_rows <= kMaxSortedInShared ? shared.sorted : memory + begin;
  for (uint32_t i = threadIdx.x; i < num_rows; i += blockDim.x) {
    const int64_t row = begin + i;
    sorted[i] = uint64_t{~keys[row]} << 32 | static_cast<uint32_t>(row);
  }
  if (threadIdx.x == 0) shared.num_sure = num;
  block_sort(sorted, num_rows);

  const float threshold = fmaxf(p.threshold[span], 0.0f);
  double entropy_before = 0.0;  // of the ranks before `first`
  for (uint32_t first = 0; first < num; first += blockDim.x) {
    const uint32_t i = first + threadIdx.x;
    const float confidence = i < num ? p.confidence[static_cast<uint32_t>(sorted[i])] : 0.0f;
    Counts<double, 1> entropy{{-static_cast<double>(confidence)}};
    const Counts<double, 1> total = block_scan(entropy, shared.of_warps);
    const bool goes_on =
        i == 0 || i >= num ||
        is_sure(p.rule, threshold, confidence, int64_t{i} + 1, entropy_before + entropy.of[0]);
    if (!goes_on) atomicMin(&shared.num_sure, i);
    __syncthreads();
    if (shared.num_sure < num) break;
    entropy_before += total.of[0];
  }
  return shared.num_sure;
}

}  // namespace pdiff::cuda::unmasking
