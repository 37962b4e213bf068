#pragma once

#include "cpu/dispatch.h"
#include "pdiff/rms_norm.h"

namespace pdiff::cpu {

PDIFF_DECLARE_KERNEL(void rms_norm_rows(const RmsNormParams& params))

}  // namespace pdiff::cpu
