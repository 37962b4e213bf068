#pragma once

#include <cstdint>

#include "cuda/ptx/tensor_copy.cuh"

namespace pdiff::cuda::sm90a {

/// Boxes of `tokens` tokens with `heads` heads each, 64 columns wide, of [num_tokens, num_heads,
/// head_dim] whose tokens are `stride` elements apart.
inline TensorMap map_of_tokens(const void* data, DType dtype, int64_t num_tokens, int num_heads,
                               int head_dim, int64_t stride, int heads, int tokens) {
  return make_tensor_map(data, dtype, {head_dim, num_heads, num_tokens}, {head_dim, stride},
                         {heads, tokens});
}

}  // namespace pdiff::cuda::sm90a
