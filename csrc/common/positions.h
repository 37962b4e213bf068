#pragma once

#include <cstdint>

#include "common/macros.h"

namespace pdiff {

/// Element of an index tensor that may be int32 or int64.
PDIFF_HD int64_t position_of_row(const void* positions, bool are_int64, int64_t row) {
  return are_int64 ? static_cast<const int64_t*>(positions)[row]
                   : static_cast<const int32_t*>(positions)[row];
}

}  // namespace pdiff
