#pragma once

// Copies from global to shared memory that a thread does not wait for (sm_80).

#include "cuda/ptx/shared.cuh"

namespace pdiff::cuda {

/// 16 bytes, both addresses aligned to 16; zeros where not `valid`, and `global` is not read then.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global, bool valid = true) {
  const int num_bytes = valid ? 16 : 0;
  asm volatile(
      "cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)),
      "l"(global), "r"(num_bytes)
      : "memory");
}

/// 16 bytes that are read once: they are the first to leave the second-level cache.
__device__ __forceinline__ void copy_async_once_16(void* shared, const void* global) {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;\n" ::"r"(
                   shared_address(shared)),
               "l"(global), "l"(policy)
               : "memory");
}

/// 4 bytes, both addresses aligned to 4; zeros where not `valid`.
__device__ __forceinline__ void copy_async_4(void* shared, const void* global, bool valid = true) {
  const int num_bytes = valid ? 4 : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(shared_address(shared)),
               "l"(global), "r"(num_bytes)
               : "memory");
}

/// Closes a group of this thread's copies; an empty group counts, too.
__device__ __forceinline__ void copy_async_commit() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}

/// Waits until at most `kGroups` of this thread's latest groups are under way. Other threads see
/// the copies after a barrier.
template <int kGroups>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kGroups) : "memory");
}

}  // namespace pdiff::cuda
