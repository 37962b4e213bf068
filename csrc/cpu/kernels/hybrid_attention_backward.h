#pragma once

// The body of hybrid attention's backward in float, compiled once per instruction set.
//
// The rows of a tile are kept both transposed, to be multiplied by keys, and as they are, to be
// summed into keys:
//
//   p^T <- exp2(k @ q^T - lse),  ds^T <- softmax_scale * p^T * (v @ dout^T - delta)
//   dv <- dv + p^T @ dout,  dk <- dk + ds^T @ q,  dq <- dq + ds @ k

#include <cstdint>

#include "cpu/kernels/backward_task.h"
#include "cpu/kernels/element.h"
#include "cpu/kernels/product.h"

namespace pdiff::cpu::PDIFF_ISA {
namespace {

struct BackwardBuffers {
  float* qt;      // [panels][head_dim][kPanelRows], times softmax_scale * log2(e)
  float* dout_t;  // [panels][head_dim][kPanelRows]
  float* q;       // [rows][ld]
  float* dout;    // [rows][ld]
  float* dq;      // [rows][ld]
  float* k;       // [kTileKeys][ld]
  float* v;       // [kTileKeys][ld]
  float* p;       // [kTileKeys][kPanelRows]
  float* ds;      // [kTileKeys][kPanelRows]

  BackwardBuffers(const PlanHeader& plan, Arena& arena) {
    const int64_t rows = max_backward_rows(plan), ld = row_floats(plan.head_dim);
    qt = arena.take(rows * plan.head_dim);
    dout_t = arena.take(rows * plan.head_dim);
    q = arena.take(rows * ld);
    dout = arena.take(rows * ld);
    dq = arena.take(rows * ld);
    k = arena.take(kTileKeys * ld);
    v = arena.take(kTileKeys * ld);
    p = arena.take(kTileKeys * kPanelRows);
    ds = arena.take(kTileKeys * kPanelRows);
  }
};

// p^T <- exp2(s^T - lse), ds^T <- p^T * (scale * dp^T - delta), in place of s^T and dp^T
template <bool kPartial>
PDIFF_INLINE void softmax_gradient(float* p, float* ds, int num_keys, int num_rows, float scale,
                                   const float* visible, int offset, const float* lse,
                                   const float* delta) {
  for (int row = 0; row < num_rows; row += Vec::kLanes) {
    const Vec limit = load(visible + row), row_lse = load(lse + row), row_delta = load(delta + row);
    for (int j = 0; j < num_keys; ++j) {
      float *p_j = p + j * kPanelRows + row, *ds_j = ds + j * kPanelRows + row;
      Vec weight = exp2(load(p_j) - row_lse);
      if (kPartial) {
        weight = select(broadcast(static_cast<float>(offset + j)) < limit, weight, zero());
      }
      store(p_j, weight);
      store(ds_j, weight * fma(load(ds_j), broadcast(scale), zero() - row_delta));
    }
  }
}

template <typename T>
void backward_task(const HybridAttentionBackwardParams& params,
                   const HybridAttentionBackwardTask& task, float* workspace) {
  const PlanHeader& plan = params.plan.header;
  const PlanSequence& sequence = params.plan.sequences[task.sequence];
  const int head_dim = plan.head_dim;
  const int64_t ld = row_floats(head_dim);
  const auto keys = key_rows<T>(params.plan, sequence, task.kv_head, params.k, params.k_stride, 0);
  const auto values =
      key_rows<T>(params.plan, sequence, task.kv_head, params.v, params.v_stride, 0);
  Arena arena{workspace};
  GradientRows<T> from(plan, arena);
  const BackwardBuffers x(plan, arena);

  const auto add_panel = [&](const KeyTile& tile, const PanelKeys& seen, int row, int num_rows) {
    ProductOperands by_key{.a = x.k,
                           .lda = ld,
                           .b = x.qt + int64_t{row} * head_dim,
                           .ldb = kPanelRows,
                           .c = x.p,
                           .ldc = kPanelRows,
                           .depth = head_dim,
                           .scale = nullptr};
    product<Init::kZero, Layout::kRowMajor>(by_key, seen.num_keys, num_rows);
    by_key.a = x.v, by_key.b = x.dout_t + int64_t{row} * head_dim, by_key.c = x.ds;
    product<Init::kZero, Layout::kRowMajor>(by_key, seen.num_keys, num_rows);
    const auto gradient = seen.partial ? softmax_gradient<true> : softmax_gradient<false>;
    gradient(x.p, x.ds, seen.num_keys, num_rows, params.softmax_scale, from.visible.by_row + row,
             tile.offset, from.lse + row, from.delta + row);
    ProductOperands to_keys{.a = x.p,
                            .lda = kPanelRows,
                            .b = x.dout + row * ld,
                            .ldb = ld,
                            .c = task.dv + tile.key_lo * ld,
                            .ldc = ld,
                            .depth = num_rows,
                            .scale = nullptr};
    product<Init::kAdd, Layout::kRowMajor>(to_keys, seen.num_keys, head_dim);
    to_keys.a = x.ds, to_keys.b = x.q + row * ld, to_keys.c = task.dk + tile.key_lo * ld;
    product<Init::kAdd, Layout::kRowMajor>(to_keys, seen.num_keys, head_dim);
    product<Init::kAdd, Layout::kDepthMajor>({.a = x.ds,
                                              .lda = kPanelRows,
                                              .b = x.k,
                                              .ldb = ld,
                                              .c = x.dq + row * ld,
                                              .ldc = ld,
                                              .depth = seen.num_keys,
                                              .scale = nullptr},
                                             num_rows, head_dim);
  };

  for_each_query_tile(params, task, [&](const TileRows& rows, int segment) {
    const int num_rows = rows.num_rows(), padded_rows = rows.padded_rows();
    from.point_at(params, sequence, rows);
    transpose_rows(from.q, padded_rows, head_dim, params.softmax_scale * kLog2E, x.qt);
    transpose_rows(from.dout, padded_rows, head_dim, 1.0f, x.dout_t);
    for (int row = 0; row < num_rows; ++row) {
      load_row(from.q[row], head_dim, x.q + row * ld);
      load_row(from.dout[row], head_dim, x.dout + row * ld);
    }
    fill_zero(x.dq, num_rows * ld);
    const auto add_key_tile = [&](const KeyTile& tile) {
      copy_keys(keys, tile, head_dim, x.k);
      copy_keys(values, tile, head_dim, x.v);
      for (int row = 0; row < num_rows; row += kPanelRows) {
        const PanelKeys seen = panel_keys(from.visible, tile, row / kPanelRows);
        if (seen.num_keys > 0) add_panel(tile, seen, row, min(num_rows - row, kPanelRows));
      }
    };
    for_each_key_tile(segments_of(params.plan, sequence), segment, rows, from.visible,
                      add_key_tile);
    for (int row = 0; row < num_rows; ++row) store_row(x.dq + row * ld, head_dim, from.dq[row]);
  });
}

int64_t workspace_floats(const PlanHeader& plan) {
  Arena arena{nullptr};
  GradientRows<float>(plan, arena);
  BackwardBuffers(plan, arena);
  return arena.used;
}

void backward_task_any(const HybridAttentionBackwardParams& params,
                       const HybridAttentionBackwardTask& task, float* workspace) {
  with_element(params.dtype,
               [&](auto element) { backward_task<decltype(element)>(params, task, workspace); });
}

void finish_any(const HybridAttentionBackwardParams& params, int32_t sequence, int32_t kv_head,
                int num_parts, const float* dk, const float* dv) {
  with_element(params.dtype, [&](auto element) {
    finish<decltype(element)>(params, sequence, kv_head, num_parts, dk, dv);
  });
}

}  // namespace

const HybridAttentionBackward hybrid_attention_backward = {
    .workspace_floats = workspace_floats,
    .task = backward_task_any,
    .finish = finish_any,
};

}  // namespace pdiff::cpu::PDIFF_ISA
