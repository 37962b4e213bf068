#pragma once

// A sort by one block, in place, in shared or global memory.

#include <cstdint>

namespace pdiff::cuda {

/// Ascending, bitonic. Every comparison puts the smaller key first, so what lies past the end
/// counts as the largest keys and is never touched. Sorts what any thread wrote before the call;
/// when it returns, every thread sees the result.
__device__ __forceinline__ void block_sort(uint64_t* keys, uint32_t num) {
  uint32_t size = 1;
  while (size < num) size *= 2;
  __syncthreads();
  for (uint32_t run = 1; run < size; run *= 2) {
    for (uint32_t distance = run; distance > 0; distance /= 2) {
      // First a pair of runs meets end to end, then halves meet in step.
      const uint32_t partner = distance == run ? 2 * run - 1 : distance;
      for (uint32_t i = threadIdx.x; i < size / 2; i += blockDim.x) {
        const uint32_t a = 2 * i - (i & (distance - 1)), b = a ^ partner;
        if (b >= num) continue;
        const uint64_t key_a = keys[a], key_b = keys[b];
        if (key_a > key_b) {
          keys[a] = key_b;
          keys[b] = key_a;
        }
      }
      __syncthreads();
    }
  }
}

}  // namespace pdiff::cuda
