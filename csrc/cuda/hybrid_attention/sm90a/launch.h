#pragma once

#include "pdiff/device.h"
#include "pdiff/hybrid_attention.h"

namespace pdiff::cuda::sm90a {

/// Why the Hopper kernel does not take a call; empty if it does. The call's arguments are valid.
const char* why_not(const HybridAttentionParams& params);

/// `ticket` is zero, in device memory.
void launch_forward(const HybridAttentionParams& params, float score_scale, int32_t* ticket,
                    const CudaQueue& queue);

}  // namespace pdiff::cuda::sm90a
