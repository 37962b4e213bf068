#pragma once

#include "cuda/hybrid_attention_backward/config.h"

namespace pdiff::cuda::sm90a {

/// Whether the Hopper kernels take a call, whose arguments are valid.
bool takes_backward(const HybridAttentionBackwardParams& params);

/// The gradients, once the rows' statistics are there.
template <typename T, int kHeadDim>
void launch_backward(const attention_backward::Problem& problem, const CudaQueue& queue);

}  // namespace pdiff::cuda::sm90a
