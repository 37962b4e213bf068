#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "machine.h"

namespace pdiff::cuda {

inline uint4 load_shortly(const void* global) {
  if (reinterpret_cast<uintptr_t>(global) % 16 != 0) emulation::fail("loads a misaligned address");
  return *static_cast<const uint4*>(global);
}

inline uint4 load_once(const void* global) {
  const emulation::Constant constant;
  return load_shortly(global);
}

inline void store_once(void* global, uint4 x) {
  if (reinterpret_cast<uintptr_t>(global) % 16 != 0) emulation::fail("stores a misaligned address");
  *static_cast<uint4*>(global) = x;
}

}  // namespace pdiff::cuda
