#pragma once

#include <cstdint>

namespace pdiff::cuda {

/// The block's dynamic shared memory, aligned to 1024 bytes. There is no other: a kernel lays a
/// struct over it whose size is what the launch asks for.
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(1024) unsigned char pdiff_shared_memory[];
  return pdiff_shared_memory;
}

/// A shared address as instructions take it.
__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

}  // namespace pdiff::cuda
