#pragma once

#include "pdiff/dtype.h"
#include "pdiff/error.h"

namespace pdiff::cpu {

/// For host files, not for those of one instruction set.
inline void check_dtype(const char* name, DType dtype) {
  const auto code = static_cast<int32_t>(dtype);
  PDIFF_CHECK(code >= 0 && code <= 2, name,
              ": expected 0 (float32), 1 (bfloat16) or 2 (float16), got ", code);
}

}  // namespace pdiff::cpu
