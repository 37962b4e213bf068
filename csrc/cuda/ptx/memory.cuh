#pragma once

// 16-byte accesses of global memory, past the first-level cache.

namespace pdiff::cuda {

/// Memory that is read again soon, or that this kernel writes later.
__device__ __forceinline__ uint4 load_shortly(const void* global) {
  uint4 x;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(global)
               : "memory");
  return x;
}

/// Memory that is touched once, and that nobody writes.

__device__ __forceinline__ uint4 load_once(const void* global) {
  uint4 x;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(global));
  return x;
}

/// The first to leave the second-level cache.
__device__ __forceinline__ void store_once(void* global, uint4 x) {
  asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(global), "r"(x.x), "r"(x.y),
               "r"(x.z), "r"(x.w)
               : "memory");
}

}  // namespace pdiff::cuda
