#pragma once

// What the attention backwards of every instruction set do alike. A task walks the query tiles of a
// sequence in order, adds to its own dk and dv, and writes dq of each tile when it leaves it.

#include <cstdint>

#include "cpu/kernels/rows.h"

namespace pdiff::cpu::PDIFF_ISA {
namespace {

// Query rows times heads per tile.
constexpr int kBackwardRows = 256;

PDIFF_INLINE int max_backward_rows(const PlanHeader& plan) {
  return round_up(max(kBackwardRows, plan.num_heads_q / plan.num_heads_kv), kPanelRows);
}

// The rows of the query tile in hand: where they lie, null past the last, and what softmax needs.
template <typename T>
struct GradientRows {
  const T** q;
  const T** dout;
  T** dq;
  float* lse;    // in units of log2
  float* delta;  // softmax_scale * (sum(dout * out) - dlse)
  VisibleKeys visible;

  GradientRows(const PlanHeader& plan, Arena& arena)
      : visible(arena, kBackwardRows, max_backward_rows(plan)) {
    const int64_t rows = max_backward_rows(plan);
    q = arena.take<const T*>(rows);
    dout = arena.take<const T*>(rows);
    dq = arena.take<T*>(rows);
    lse = arena.take(rows);
    delta = arena.take(rows);
  }

  void point_at(const HybridAttentionBackwardParams& params, const PlanSequence& sequence,
                const TileRows& rows) {
    const PlanHeader& plan = params.plan.header;
    const int head_dim = plan.head_dim;
    const int64_t token_elements = int64_t{plan.num_heads_q} * head_dim;
    const int64_t offset = sequence.row_begin * token_elements;
    row_pointers(static_cast<const T*>(params.q) + sequence.row_begin * params.q_stride,
                 params.q_stride, head_dim, rows, q);
    row_pointers(static_cast<const T*>(params.dout) + offset, token_elements, head_dim, rows, dout);
    row_pointers(static_cast<T*>(params.dq) + offset, token_elements, head_dim, rows, dq);
    const T* out = static_cast<const T*>(params.out) + offset;
    for_each_row(rows, [&](int row, int token, int head) {
      const T* row_out = out + token * token_elements + int64_t{head} * head_dim;
      const int64_t stat = int64_t{head} * plan.total_q + sequence.row_begin + token;
      Vec sum = zero();
      for (int i = 0; i < head_dim; i += Vec::kLanes) {
        const int left = head_dim - i;
        sum = fma(load_first(dout[row] + i, left), load_first(row_out + i, left), sum);
      }
      const float dlse = params.dlse == nullptr ? 0.0f : params.dlse[stat];
      delta[row] = params.softmax_scale * (reduce_add(sum) - dlse);
      lse[row] = params.lse[stat] * kLog2E;
    });
    for (int row = rows.num_rows(); row < rows.padded_rows(); ++row) lse[row] = delta[row] = 0.0f;
  }
};

// tile(rows, segment) for every query tile of the task, in order; dk and dv start from zero.
template <typename Tile>
PDIFF_INLINE void for_each_query_tile(const HybridAttentionBackwardParams& params,
                                      const HybridAttentionBackwardTask& task, const Tile& tile) {
  const PlanSequence& sequence = params.plan.sequences[task.sequence];
  const SegmentsView segments = segments_of(params.plan, sequence);
  const int64_t num_floats = part_floats(params.plan.header, sequence);
  fill_zero(task.dk, num_floats);
  fill_zero(task.dv, num_floats);
  const int num_heads = task.head_hi - task.head_lo, tokens = max(1, kBackwardRows / num_heads);
  int segment = 0;
  for (int token = 0; token < sequence.num_rows; token += tokens) {
    segment = find_segment(segments, segment, segments.num_segments, token);
    const int token_hi = min(token + tokens, sequence.num_rows);
    tile(TileRows{token, token_hi, task.head_lo, num_heads}, segment);
  }
}

template <typename T>
void finish(const HybridAttentionBackwardParams& params, int32_t sequence_idx, int32_t kv_head,
            int num_parts, const float* dk, const float* dv) {
  const PlanHeader& plan = params.plan.header;
  const PlanSequence& sequence = params.plan.sequences[sequence_idx];
  const int head_dim = plan.head_dim;
  const int64_t ld = row_floats(head_dim), next_part = part_floats(plan, sequence);
  const auto add_parts = [&](const float* parts, void* gradient) {
    for (int key = 0; key < sequence.num_keys; ++key) {
      alignas(64) float sum[256];
      load_row(parts + key * ld, head_dim, sum);
      for (int part = 1; part < num_parts; ++part) {
        const float* row = parts + part * next_part + key * ld;
        for (int i = 0; i < head_dim; i += Vec::kLanes) {
          store(sum + i, load(sum + i) + load(row + i));
        }
      }
      const int64_t packed_key = int64_t{sequence.key_begin} + key;
      store_row(sum, head_dim,
                static_cast<T*>(gradient) + (packed_key * plan.num_heads_kv + kv_head) * head_dim);
    }
  };
  add_parts(dk, params.dk);
  add_parts(dv, params.dv);
}

}  // namespace
}  // namespace pdiff::cpu::PDIFF_ISA
