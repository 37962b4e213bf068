#pragma once

#include "pdiff/dtype.h"
#include "pdiff/error.h"

namespace pdiff::cpu {

/// Element types of the CPU kernels. For host files, not for those of one instruction set.
inline void check_dtype(const char* name, DType dtype) {
  PDIFF_CHECK(dtype == DType::kFloat32 || dtype == DType::kBFloat16, name,
              ": expected 0 (float32) or 1 (bfloat16), got ", static_cast<int32_t>(dtype));
}

}  // namespace pdiff::cpu
