#pragma once

// 16-byte accesses of global memory that is touched once, past the first-level cache.

namespace pdiff::cuda {

__device__ __forceinline__ uint4 load_once(const void* global) {
  uint4 x;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(global));
  return x;
}

__device__ __forceinline__ void store_once(void* global, uint4 x) {
  asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(global), "r"(x.x), "r"(x.y),
               "r"(x.z), "r"(x.w)
               : "memory");
}

}  // namespace pdiff::cuda
