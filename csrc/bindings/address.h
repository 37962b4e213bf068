#pragma once

#include <cstdint>

namespace pdiff::bindings {

// Tensors arrive as the integer of data_ptr(); 0 stands for None.
template <typename T>
T* address(std::uintptr_t value) {
  return reinterpret_cast<T*>(value);
}

}  // namespace pdiff::bindings
