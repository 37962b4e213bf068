#pragma once

#include <cstdint>

#include "cuda/common/divider.h"
#include "pdiff/device.h"
#include "pdiff/hybrid_attention.h"

namespace pdiff::cuda::attention_backward {

inline constexpr int kNumWarps = 4, kNumThreads = kNumWarps * 32;

// Accumulators fill half of a multiprocessor's registers, and two blocks share one: while one waits
// at a barrier or works out exponentials, the other multiplies.
inline constexpr int kBlocksPerSm = 2;

inline constexpr int kStages = 2;  // one to compute with, one on its way

inline constexpr float kLog2E = 1.44269504f;

/// What the kernels take. A packed row is one head of a token: packed row r of a KV head's group is
/// token r / group_size, head r % group_size.
struct Problem {
  HybridAttentionBackwardParams tensors;
  int32_t group_size;
  Divider by_group;
  // Bytes between the packed rows of one token and those of the next, and from token to token.
  int32_t q_gap, dout_gap, k_bytes, v_bytes;
  // Of the workspace:
  float* row_lse;    // [num_heads_kv, packed rows] in units of log2; +inf where no key is seen
  float* row_delta;  // [num_heads_kv, packed rows] sum(dout * out) - dlse
  int32_t* tickets;  // [2] work items that the key and the query kernel have taken
};

/// Puts the kernels of one element type and head size into a stream.
template <typename T, int kHeadDim>
void launch_kernels(const Problem& problem, const CudaQueue& queue);

/// Shared memory that a block of them asks for at most.
template <typename T, int kHeadDim>
int64_t max_block_bytes();

}  // namespace pdiff::cuda::attention_backward
