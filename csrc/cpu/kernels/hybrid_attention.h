#pragma once

// The body of hybrid attention in float, compiled once per instruction set.
//
// Scores are kept transposed, keys down and rows across, so that a vector holds the scores of one
// key for kLanes rows: softmax then needs no reduction across lanes and keys no transposition.
//
//   s^T <- k @ q^T,  p^T <- exp2(s^T - m),  out <- alpha * out + p @ v
//
// A key tile is copied to floats once and serves all rows of the query tile, one panel at a time. A
// panel's p^T, its q^T and the columns of v in use stay in the first-level cache.

#include <math.h>

#include <cstdint>

#include "cpu/kernels/element.h"
#include "cpu/kernels/product.h"
#include "cpu/kernels/rows.h"

namespace pdiff::cpu::PDIFF_ISA {
namespace {

// One step of online softmax over the scores of some keys for one panel, in place:
// m' <- max(m, max_j s_j), alpha <- exp2(m - m'), p_j <- exp2(s_j - m'), l <- alpha * l + sum_j
// p_j.
template <bool kPartial>
PDIFF_INLINE void softmax_step(float* s, int num_keys, int num_rows, const float* visible,
                               int offset, float* m, float* l, float* alpha) {
  constexpr int kChains = 4;
  for (int row = 0; row < num_rows; row += Vec::kLanes) {
    const Vec limit = load(visible + row);
    const auto is_seen = [&](int j) { return broadcast(static_cast<float>(offset + j)) < limit; };
    Vec peak[kChains], sum[kChains];
    for (int c = 0; c < kChains; ++c) peak[c] = broadcast(kNoScore), sum[c] = zero();
    const auto raise = [&](int j, int chain) {
      Vec score = load(s + j * kPanelRows + row);
      if (kPartial) score = select(is_seen(j), score, broadcast(kNoScore));
      peak[chain] = max(peak[chain], score);
    };
    int j = 0;
    for (; j + kChains <= num_keys; j += kChains) {
      for (int c = 0; c < kChains; ++c) raise(j + c, c);
    }
    for (int c = 0; j + c < num_keys; ++c) raise(j + c, c);
    const Vec old_m = load(m + row);
    const Vec new_m = max(old_m, max(max(peak[0], peak[1]), max(peak[2], peak[3])));

    const auto weigh = [&](int j, int chain) {
      float* score = s + j * kPanelRows + row;
      Vec p = exp2(load(score) - new_m);
      if (kPartial) p = select(is_seen(j), p, zero());
      store(score, p);
      sum[chain] = sum[chain] + p;
    };
    j = 0;
    for (; j + kChains <= num_keys; j += kChains) {
      for (int c = 0; c < kChains; ++c) weigh(j + c, c);
    }
    for (int c = 0; j + c < num_keys; ++c) weigh(j + c, c);
    const Vec rescale = exp2(old_m - new_m);
    store(alpha + row, rescale);
    store(m + row, new_m);
    store(l + row, fma(load(l + row), rescale, (sum[0] + sum[1]) + (sum[2] + sum[3])));
  }
}

struct ForwardBuffers {
  float* qt;     // [panels][head_dim][kPanelRows], times softmax_scale * log2(e)
  float* out;    // [rows][ld]
  float* k;      // [kTileKeys][ld]
  float* v;      // [kTileKeys][ld]
  float* s;      // [kTileKeys][kPanelRows]
  float* m;      // [rows] running maximum, in units of log2
  float* l;      // [rows] running sum
  float* alpha;  // [kPanelRows]
  const void** row_starts;
  VisibleKeys visible;

  ForwardBuffers(const PlanHeader& plan, Arena& arena)
      : visible(arena, plan.tile_rows, max_rows(plan)) {
    const int64_t rows = max_rows(plan), ld = row_floats(plan.head_dim);
    qt = arena.take(rows * plan.head_dim);
    out = arena.take(rows * ld);
    k = arena.take(kTileKeys * ld);
    v = arena.take(kTileKeys * ld);
    s = arena.take(kTileKeys * kPanelRows);
    m = arena.take(rows);
    l = arena.take(rows);
    alpha = arena.take(kPanelRows);
    row_starts = arena.take<const void*>(rows);
  }

 private:
  static int max_rows(const PlanHeader& plan) {
    return round_up(plan.tile_rows * (plan.num_heads_q / plan.num_heads_kv), kPanelRows);
  }
};

template <typename T>
void forward_tile(const HybridAttentionParams& params, const PlanTile& tile, int kv_head,
                  float* workspace) {
  const PlanHeader& plan = params.plan.header;
  const PlanSequence& sequence = params.plan.sequences[tile.sequence];
  const int group_size = plan.num_heads_q / plan.num_heads_kv, head_dim = plan.head_dim;
  const TileRows rows{tile.row_lo, tile.row_hi, kv_head * group_size, group_size};
  const int num_rows = rows.num_rows();
  const int64_t ld = row_floats(head_dim);
  const auto keys =
      key_rows<T>(params.plan, sequence, kv_head, params.k, params.k_stride, params.k_page_stride);
  const auto values =
      key_rows<T>(params.plan, sequence, kv_head, params.v, params.v_stride, params.v_page_stride);
  Arena arena{workspace};
  ForwardBuffers x(plan, arena);

  const T* q = static_cast<const T*>(params.q) + sequence.row_begin * params.q_stride;
  const auto q_rows = reinterpret_cast<const T**>(x.row_starts);
  row_pointers(q, params.q_stride, head_dim, rows, q_rows);
  transpose_rows(q_rows, rows.padded_rows(), head_dim, params.softmax_scale * kLog2E, x.qt);
  for (int row = 0; row < rows.padded_rows(); ++row) x.m[row] = kNoScore, x.l[row] = 0.0f;
  fill_zero(x.out, rows.padded_rows() * ld);

  const auto attend = [&](const KeyTile& key_tile) {
    copy_keys(keys, key_tile, head_dim, x.k);
    copy_keys(values, key_tile, head_dim, x.v);
    for (int row = 0; row < num_rows; row += kPanelRows) {
      const PanelKeys seen = panel_keys(x.visible, key_tile, row / kPanelRows);
      if (seen.num_keys == 0) continue;
      const int panel_rows = min(num_rows - row, kPanelRows);
      // s^T <- k @ q^T
      product<Init::kZero, Layout::kRowMajor>({.a = x.k,
                                               .lda = ld,
                                               .b = x.qt + int64_t{row} * head_dim,
                                               .ldb = kPanelRows,
                                               .c = x.s,
                                               .ldc = kPanelRows,
                                               .depth = head_dim,
                                               .scale = nullptr},
                                              seen.num_keys, panel_rows);
      const auto step = seen.partial ? softmax_step<true> : softmax_step<false>;
      step(x.s, seen.num_keys, panel_rows, x.visible.by_row + row, key_tile.offset, x.m + row,
           x.l + row, x.alpha);
      // out <- alpha * out + p @ v
      product<Init::kScale, Layout::kDepthMajor>({.a = x.s,
                                                  .lda = kPanelRows,
                                                  .b = x.v,
                                                  .ldb = ld,
                                                  .c = x.out + row * ld,
                                                  .ldc = ld,
                                                  .depth = seen.num_keys,
                                                  .scale = x.alpha},
                                                 panel_rows, head_dim);
    }
  };
  for_each_key_tile(segments_of(params.plan, sequence), tile.segment, rows, x.visible, attend);

  for_each_row(rows, [&](int row, int token, int head) {
    const bool sees_a_key = x.l[row] != 0.0f;
    const Vec inverse = broadcast(sees_a_key ? 1.0f / x.l[row] : 0.0f);
    const float* out = x.out + row * ld;
    const int64_t packed_row = int64_t{sequence.row_begin} + token;
    T* to = static_cast<T*>(params.out) + (packed_row * plan.num_heads_q + head) * head_dim;
    for (int i = 0; i < head_dim; i += Vec::kLanes) {
      store_first(to + i, load(out + i) * inverse, head_dim - i);
    }
    if (params.lse != nullptr) {
      params.lse[int64_t{head} * plan.total_q + packed_row] =
          sees_a_key ? x.m[row] * kLn2 + logf(x.l[row]) : -INFINITY;
    }
  });
}

int64_t workspace_floats(const PlanHeader& plan) {
  Arena arena{nullptr};
  ForwardBuffers(plan, arena);
  return arena.used;
}

void forward_tile_any(const HybridAttentionParams& params, const PlanTile& tile, int kv_head,
                      float* workspace) {
  with_element(params.dtype, [&](auto element) {
    forward_tile<decltype(element)>(params, tile, kv_head, workspace);
  });
}

}  // namespace

const HybridAttentionForward hybrid_attention_forward = {
    .workspace_floats = workspace_floats,
    .tile = forward_tile_any,
};

}  // namespace pdiff::cpu::PDIFF_ISA
