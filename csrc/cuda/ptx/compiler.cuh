#pragma once

namespace pdiff::cuda {

/// The same number, of which the compiler knows nothing: what depends on it is worked out here, not
/// long before, to be kept in registers that a loop needs for better things.
__device__ __forceinline__ int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

}  // namespace pdiff::cuda
