#pragma once

#include <cstdint>

#include "pdiff/dtype.h"

namespace pdiff {

/// out <- gate / (1 + exp(-gate)) * up.
/// Numerics  float arithmetic, one rounding to the tensors' dtype.
struct SwigluParams {
  const void* gate;  // [num_rows, size], rows gate_stride apart
  const void* up;    // [num_rows, size], rows up_stride apart
  void* out;         // [num_rows, size]

  DType dtype;  // of gate, up and out
  int64_t gate_stride, up_stride, num_rows, size;
  int num_threads;
};

namespace cpu {
void swiglu(const SwigluParams& params);  // throws pdiff::Error before any write
}

}  // namespace pdiff
