#pragma once

#include "cpu/dispatch.h"
#include "pdiff/swiglu.h"

namespace pdiff::cpu {

PDIFF_DECLARE_KERNEL(void swiglu_rows(const SwigluParams& params))

}  // namespace pdiff::cpu
