#pragma once

#include <cstdint>

#include "pdiff/dtype.h"

namespace pdiff {

/// out <- x / sqrt(mean(x^2) + eps) * weight, row by row.
/// Numerics  float arithmetic, one rounding to the tensors' dtype.
struct RmsNormParams {
  const void* x;       // [num_rows, size], rows x_stride apart
  const void* weight;  // [size]
  void* out;           // [num_rows, size]

  DType dtype;  // of x, weight and out
  int64_t x_stride, num_rows, size;
  float eps;
  int num_threads;
};

namespace cpu {
void rms_norm(const RmsNormParams& params);  // throws pdiff::Error before any write
}

}  // namespace pdiff
