#pragma once

#include "cuda/hybrid_attention/config.h"
#include "pdiff/device.h"
#include "pdiff/hybrid_attention.h"

namespace pdiff::cuda::sm90a {

/// Whether the Hopper kernel takes a call, whose arguments are valid.
bool takes_forward(const HybridAttentionParams& params);

/// Takes scale and workspace from the portable kernel's parameters.
void launch_forward(const HybridAttentionParams& params, const attention::ForwardParams& forward,
                    const CudaQueue& queue);

}  // namespace pdiff::cuda::sm90a
