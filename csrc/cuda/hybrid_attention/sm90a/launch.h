#pragma once

#include "pdiff/device.h"
#include "pdiff/hybrid_attention.h"

namespace pdiff::cuda::sm90a {

/// Whether the Hopper kernel takes a call, whose arguments are valid.
bool takes_forward(const HybridAttentionParams& params);

/// `ticket` is zero, in device memory.
void launch_forward(const HybridAttentionParams& params, float score_scale, int32_t* ticket,
                    const CudaQueue& queue);

}  // namespace pdiff::cuda::sm90a
