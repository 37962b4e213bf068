#pragma once

#include <cstdint>

namespace pdiff {

/// Element types of tensors that cross the C++ boundary; the values are part of the binary
/// interface.
enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

/// Storage of a bfloat16: the upper half of a float's bits. Arithmetic happens in float.
struct bfloat16 {
  uint16_t bits;
};

/// Storage of an IEEE half.
struct float16 {
  uint16_t bits;
};

}  // namespace pdiff
