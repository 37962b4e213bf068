#pragma once

#include "cpu/dispatch.h"
#include "pdiff/rope_kv_write.h"

namespace pdiff::cpu {

PDIFF_DECLARE_KERNEL(void rope_kv_write_rows(const RopeKvWriteParams& params))

}  // namespace pdiff::cpu
