#pragma once

#include <cstdint>

#include "cuda/common/divider.h"
#include "pdiff/attention_plan.h"
#include "pdiff/device.h"
#include "pdiff/hybrid_attention.h"

namespace pdiff::cuda::attention {

/// A block: four warps of 32 rows each. With 32 rows every fragment of keys or values serves two
/// products; with more the output would not fit into registers.
inline constexpr int kNumWarps = 4, kNumThreads = kNumWarps * 32;
inline constexpr int kTileRows = kGpuTileRows, kTileKeys = kGpuTileKeys;
inline constexpr int kWarpRows = kTileRows / kNumWarps;

/// Two key tiles in shared memory: one is computed on while the next one arrives.
inline constexpr int kNumStages = 2;

/// With few rows each warp has every fourth step of this many keys, with copies of two steps on
/// their way: enough bytes in flight for the memory to be the limit.
inline constexpr int kStepKeys = kTileKeys / kNumWarps, kNumSteps = 3;

/// Blocks on one multiprocessor: one works on a softmax while another one multiplies.
template <int kHeadDim>
inline constexpr int kBlocksPerSm = 2;

/// Of the head_dim / 16 steps of q @ k^T, how many keep their part of q in registers. The others
/// read it again for every key tile.
template <int kHeadDim>
inline constexpr int kQueryStepsInRegisters = kHeadDim == 128 ? 0 : 4;

/// A row's maximum is followed only when it has grown by more than this many powers of 2: weights
/// stay far from overflow, and the output rarely has to be scaled. Decided by the row alone, so its
/// bits do not depend on its neighbours.
inline constexpr float kMaxGrowth = 8.0f;

/// Below any score, yet finite: what is not masked minus it makes sense.
inline constexpr float kNoMaximum = -3e38f;

/// What a kernel gets, by value.
struct ForwardParams {
  const int32_t* plan;
  const void* q;
  const void* k;
  const void* v;
  void* out;
  float* lse;
  int32_t q_bytes, k_bytes, v_bytes;  // from token to token
  int64_t k_page_bytes, v_page_bytes;
  int32_t total_q, num_heads_kv, group_size, page_size;
  Divider by_group, by_page;
  float scale;           // of scores, to exponents of 2; above 0
  uint32_t* ticket;      // [1], zero: items taken beyond the first of each block
  uint32_t* arrivals;    // [num_slots, num_heads_kv], zero: parts done, at a tile's first slot
  float* partial_out;    // [num_slots, num_heads_kv, kFewRows, head_dim]
  float* partial_state;  // [num_slots, num_heads_kv, kFewRows, 2]: maximum, sum
};

/// Puts the kernel of an element type and width into a stream; defined in instances/.
template <typename T, int kHeadDim>
void launch_forward(const ForwardParams& params, const CudaQueue& queue);

}  // namespace pdiff::cuda::attention
