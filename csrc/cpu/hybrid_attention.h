#pragma once

#include <cstdint>

#include "pdiff/hybrid_attention.h"

namespace pdiff::cpu {

/// One backward task: query heads [head_lo, head_hi) of one KV head over one sequence.
struct HybridAttentionBackwardTask {
  int32_t sequence, kv_head, head_lo, head_hi;
  float* dk;  // [num_keys + 31, row_floats(head_dim)], this task's part; written, not added to
  float* dv;  // as dk
};

/// What an instruction set provides. A task takes a workspace of its own, aligned to a cache line.
struct HybridAttentionForward {
  int64_t (*workspace_floats)(const PlanHeader& plan);
  void (*tile)(const HybridAttentionParams& params, const PlanTile& tile, int kv_head,
               float* workspace);
};

struct HybridAttentionBackward {
  int64_t (*workspace_floats)(const PlanHeader& plan);
  void (*task)(const HybridAttentionBackwardParams& params, const HybridAttentionBackwardTask& task,
               float* workspace);
  /// Adds `num_parts` parts that lie one after another and writes dk and dv of one KV head.
  void (*finish)(const HybridAttentionBackwardParams& params, int32_t sequence, int32_t kv_head,
                 int num_parts, const float* dk, const float* dv);
};

/// Floats per row of a buffer of vectors of head_dim: room for whole tiles of 32, and an odd number
/// of cache lines, so that a column of rows spreads over all sets of the first-level cache.
constexpr int64_t row_floats(int64_t head_dim) { return (head_dim + 31) / 32 * 32 + 16; }

/// Floats of one part of dk or dv. Tiles of 32 keys may add zeros past the last key.
constexpr int64_t part_floats(const PlanHeader& plan, const PlanSequence& sequence) {
  return (int64_t{sequence.num_keys} + 31) * row_floats(plan.head_dim);
}

namespace generic {
extern const HybridAttentionForward hybrid_attention_forward;
extern const HybridAttentionBackward hybrid_attention_backward;
}  // namespace generic
namespace avx2 {
extern const HybridAttentionForward hybrid_attention_forward;
extern const HybridAttentionBackward hybrid_attention_backward;
}  // namespace avx2
namespace avx512 {
extern const HybridAttentionForward hybrid_attention_forward;
extern const HybridAttentionBackward hybrid_attention_backward;
}  // namespace avx512
namespace amx {  // bfloat16 only
extern const HybridAttentionForward hybrid_attention_forward;
extern const HybridAttentionBackward hybrid_attention_backward;
}  // namespace amx

}  // namespace pdiff::cpu
