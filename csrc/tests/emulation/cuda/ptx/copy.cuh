#pragma once

#include "cuda/ptx/shared.cuh"

namespace pdiff::cuda {

inline void copy_async_16(void* shared, const void* global, bool valid = true) {
  emulation::copy_async(shared, global, 16, valid);
}

inline void copy_async_once_16(void* shared, const void* global) {
  emulation::copy_async(shared, global, 16, true);
}

inline void copy_async_4(void* shared, const void* global, bool valid = true) {
  emulation::copy_async(shared, global, 4, valid);
}

inline void copy_async_commit() { emulation::copy_async_commit(); }

template <int kGroups>
void copy_async_wait() {
  emulation::copy_async_wait(kGroups);
}

}  // namespace pdiff::cuda
