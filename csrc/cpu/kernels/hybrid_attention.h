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

#include "cpu/kernels/attention_tile.h"
#include "cpu/kernels/product.h"

namespace pdiff::cpu::PDIFF_ISA {
namespace {

template <typename T>
PDIFF_INLINE void load_row(const T* from, int n, float* to) {
  int i = 0;
  for (; i + Vec::kLanes <= n; i += Vec::kLanes) store(to + i, load(from + i));
  if (i < n) store(to + i, load_first(from + i, n - i));
}

template <typename T>
PDIFF_INLINE void store_row(const float* from, int n, T* to) {
  int i = 0;
  for (; i + Vec::kLanes <= n; i += Vec::kLanes) store(to + i, load(from + i));
  if (i < n) store_first(to + i, load(from + i), n - i);
}

PDIFF_INLINE void fill_zero(float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = 0.0f;
}

template <typename T>
void copy_keys(const KeyRows<T>& keys, const KeyTile& tile, int head_dim, float* to) {
  const int64_t ld = row_floats(head_dim);
  for_each_key(keys, tile.key_lo, tile.num_keys,
               [&](int j, const T* row) { load_row(row, head_dim, to + j * ld); });
}

// to[panel][i][row in panel] <- scale * element i of the row. Rows past the last are zero.
template <typename T>
void transpose_rows(const T* base, int64_t stride, int head_dim, const TileRows& rows, float scale,
                    float* to) {
  const T* from[Vec::kLanes];
  int num_pending = 0;
  const auto flush = [&](int row_lo) {
    float* block = to + int64_t{row_lo / kPanelRows} * head_dim * kPanelRows + row_lo % kPanelRows;
    for (int i = 0; i < head_dim; i += Vec::kLanes) {
      const int n = min(head_dim - i, Vec::kLanes);
      Vec square[Vec::kLanes];
      for (int r = 0; r < Vec::kLanes; ++r) {
        square[r] = r < num_pending ? load_first(from[r] + i, n) * broadcast(scale) : zero();
      }
      transpose(square);
      for (int j = 0; j < n; ++j) store(block + (i + j) * kPanelRows, square[j]);
    }
    num_pending = 0;
  };
  for_each_row(rows, [&](int row, int token, int head) {
    from[num_pending++] = base + token * stride + int64_t{head} * head_dim;
    if (num_pending == Vec::kLanes) flush(row + 1 - Vec::kLanes);
  });
  for (int row = rows.num_rows() - num_pending; row < rows.padded_rows(); row += Vec::kLanes) {
    flush(row);
  }
}

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
  VisibleKeys visible;

  ForwardBuffers(const PlanHeader& plan, Arena& arena)
      : ForwardBuffers(arena, plan.tile_rows, plan.num_heads_q / plan.num_heads_kv, plan.head_dim) {
  }

 private:
  ForwardBuffers(Arena& arena, int tokens, int group_size, int head_dim)
      : visible(arena, tokens, round_up(tokens * group_size, kPanelRows)) {
    const int64_t rows = round_up(tokens * group_size, kPanelRows), ld = row_floats(head_dim);
    qt = arena.take(rows * head_dim);
    out = arena.take(rows * ld);
    k = arena.take(kTileKeys * ld);
    v = arena.take(kTileKeys * ld);
    s = arena.take(kTileKeys * kPanelRows);
    m = arena.take(rows);
    l = arena.take(rows);
    alpha = arena.take(kPanelRows);
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
  transpose_rows(q, params.q_stride, head_dim, rows, params.softmax_scale * kLog2E, x.qt);
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
    float* out = x.out + row * ld;
    for (int i = 0; i < head_dim; i += Vec::kLanes) store(out + i, load(out + i) * inverse);
    const int64_t packed_row = int64_t{sequence.row_begin} + token;
    store_row(out, head_dim,
              static_cast<T*>(params.out) + (packed_row * plan.num_heads_q + head) * head_dim);
    if (params.lse != nullptr) {
      params.lse[int64_t{head} * plan.total_q + packed_row] =
          sees_a_key ? x.m[row] * kLn2 + logf(x.l[row]) : -INFINITY;
    }
  });
}

// The backward keeps the rows of a tile both transposed (to be multiplied by keys) and as they are
// (to be summed into keys):
//
//   p^T <- exp2(k @ q^T - lse),  ds^T <- p^T * (v @ dout^T - delta)
//   dv <- dv + p^T @ dout,  dk <- dk + ds^T @ q,  dq <- dq + ds @ k
struct BackwardBuffers {
  static constexpr int kRows = 128;

  float* qt;      // [panels][head_dim][kPanelRows], times softmax_scale * log2(e)
  float* dout_t;  // [panels][head_dim][kPanelRows]
  float* q;       // [rows][ld], times softmax_scale
  float* dout;    // [rows][ld]
  float* dq;      // [rows][ld]
  float* k;       // [kTileKeys][ld]
  float* v;       // [kTileKeys][ld]
  float* p;       // [kTileKeys][kPanelRows]
  float* ds;      // [kTileKeys][kPanelRows]
  float* lse;     // [rows], in units of log2
  float* delta;   // [rows], sum(dout * out) - dlse
  VisibleKeys visible;

  static int tokens(int num_heads) { return max(1, kRows / num_heads); }

  BackwardBuffers(const PlanHeader& plan, Arena& arena) : visible(arena, kRows, max_rows(plan)) {
    const int64_t rows = max_rows(plan), ld = row_floats(plan.head_dim);
    qt = arena.take(rows * plan.head_dim);
    dout_t = arena.take(rows * plan.head_dim);
    q = arena.take(rows * ld);
    dout = arena.take(rows * ld);
    dq = arena.take(rows * ld);
    k = arena.take(kTileKeys * ld);
    v = arena.take(kTileKeys * ld);
    p = arena.take(kTileKeys * kPanelRows);
    ds = arena.take(kTileKeys * kPanelRows);
    lse = arena.take(rows);
    delta = arena.take(rows);
  }

 private:
  static int max_rows(const PlanHeader& plan) {
    return round_up(max(kRows, plan.num_heads_q / plan.num_heads_kv), kPanelRows);
  }
};

// p^T <- exp2(s^T - lse), ds^T <- p^T * (dp^T - delta), in place of s^T and dp^T
template <bool kPartial>
PDIFF_INLINE void softmax_gradient(float* p, float* ds, int num_keys, int num_rows,
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
      store(ds_j, weight * (load(ds_j) - row_delta));
    }
  }
}

template <typename T>
void backward_tile(const HybridAttentionBackwardParams& params,
                   const HybridAttentionBackwardTask& task, const TileRows& rows, int segment,
                   BackwardBuffers& x) {
  const PlanHeader& plan = params.plan.header;
  const PlanSequence& sequence = params.plan.sequences[task.sequence];
  const int num_rows = rows.num_rows(), head_dim = plan.head_dim;
  const int64_t ld = row_floats(head_dim);
  const int64_t token_elements = int64_t{plan.num_heads_q} * head_dim;
  const auto keys = key_rows<T>(params.plan, sequence, task.kv_head, params.k, params.k_stride, 0);
  const auto values =
      key_rows<T>(params.plan, sequence, task.kv_head, params.v, params.v_stride, 0);

  const T* q = static_cast<const T*>(params.q) + sequence.row_begin * params.q_stride;
  const T* out = static_cast<const T*>(params.out) + sequence.row_begin * token_elements;
  const T* dout = static_cast<const T*>(params.dout) + sequence.row_begin * token_elements;
  const Vec scale = broadcast(params.softmax_scale);
  transpose_rows(q, params.q_stride, head_dim, rows, params.softmax_scale * kLog2E, x.qt);
  transpose_rows(dout, token_elements, head_dim, rows, 1.0f, x.dout_t);
  for_each_row(rows, [&](int row, int token, int head) {
    const int64_t offset = token * token_elements + int64_t{head} * head_dim;
    const int64_t stat = int64_t{head} * plan.total_q + sequence.row_begin + token;
    float *row_q = x.q + row * ld, *row_dout = x.dout + row * ld;
    load_row(q + token * params.q_stride + int64_t{head} * head_dim, head_dim, row_q);
    load_row(dout + offset, head_dim, row_dout);
    Vec delta = zero();
    for (int i = 0; i < head_dim; i += Vec::kLanes) {
      delta = fma(load(row_dout + i), load_first(out + offset + i, head_dim - i), delta);
      store(row_q + i, load(row_q + i) * scale);
    }
    x.delta[row] = reduce_add(delta) - (params.dlse != nullptr ? params.dlse[stat] : 0.0f);
    x.lse[row] = params.lse[stat] * kLog2E;
  });
  for (int row = num_rows; row < rows.padded_rows(); ++row) x.lse[row] = x.delta[row] = 0.0f;
  fill_zero(x.dq, num_rows * ld);

  const auto attend = [&](const KeyTile& key_tile) {
    copy_keys(keys, key_tile, head_dim, x.k);
    copy_keys(values, key_tile, head_dim, x.v);
    for (int row = 0; row < num_rows; row += kPanelRows) {
      const PanelKeys seen = panel_keys(x.visible, key_tile, row / kPanelRows);
      if (seen.num_keys == 0) continue;
      const int panel_rows = min(num_rows - row, kPanelRows);
      ProductOperands by_key{.a = x.k,
                             .lda = ld,
                             .b = x.qt + int64_t{row} * head_dim,
                             .ldb = kPanelRows,
                             .c = x.p,
                             .ldc = kPanelRows,
                             .depth = head_dim,
                             .scale = nullptr};
      product<Init::kZero, Layout::kRowMajor>(by_key, seen.num_keys, panel_rows);
      by_key.a = x.v, by_key.b = x.dout_t + int64_t{row} * head_dim, by_key.c = x.ds;
      product<Init::kZero, Layout::kRowMajor>(by_key, seen.num_keys, panel_rows);
      const auto gradient = seen.partial ? softmax_gradient<true> : softmax_gradient<false>;
      gradient(x.p, x.ds, seen.num_keys, panel_rows, x.visible.by_row + row, key_tile.offset,
               x.lse + row, x.delta + row);
      ProductOperands to_keys{.a = x.p,
                              .lda = kPanelRows,
                              .b = x.dout + row * ld,
                              .ldb = ld,
                              .c = task.dv + key_tile.key_lo * ld,
                              .ldc = ld,
                              .depth = panel_rows,
                              .scale = nullptr};
      product<Init::kAdd, Layout::kRowMajor>(to_keys, seen.num_keys, head_dim);
      to_keys.a = x.ds, to_keys.b = x.q + row * ld, to_keys.c = task.dk + key_tile.key_lo * ld;
      product<Init::kAdd, Layout::kRowMajor>(to_keys, seen.num_keys, head_dim);
      product<Init::kAdd, Layout::kDepthMajor>({.a = x.ds,
                                                .lda = kPanelRows,
                                                .b = x.k,
                                                .ldb = ld,
                                                .c = x.dq + row * ld,
                                                .ldc = ld,
                                                .depth = seen.num_keys,
                                                .scale = nullptr},
                                               panel_rows, head_dim);
    }
  };
  for_each_key_tile(segments_of(params.plan, sequence), segment, rows, x.visible, attend);

  T* dq = static_cast<T*>(params.dq) + sequence.row_begin * token_elements;
  for_each_row(rows, [&](int row, int token, int head) {
    float* row_dq = x.dq + row * ld;
    for (int i = 0; i < head_dim; i += Vec::kLanes) store(row_dq + i, load(row_dq + i) * scale);
    store_row(row_dq, head_dim, dq + token * token_elements + int64_t{head} * head_dim);
  });
}

template <typename T>
void backward_task(const HybridAttentionBackwardParams& params,
                   const HybridAttentionBackwardTask& task, float* workspace) {
  const PlanHeader& plan = params.plan.header;
  const PlanSequence& sequence = params.plan.sequences[task.sequence];
  const SegmentsView segments = segments_of(params.plan, sequence);
  Arena arena{workspace};
  BackwardBuffers buffers(plan, arena);
  fill_zero(task.dk, sequence.num_keys * row_floats(plan.head_dim));
  fill_zero(task.dv, sequence.num_keys * row_floats(plan.head_dim));

  const int num_heads = task.head_hi - task.head_lo;
  const int tokens = BackwardBuffers::tokens(num_heads);
  int segment = 0;
  for (int token = 0; token < sequence.num_rows; token += tokens) {
    segment = find_segment(segments, segment, segments.num_segments, token);
    const int token_hi = min(token + tokens, sequence.num_rows);
    backward_tile<T>(params, task, {token, token_hi, task.head_lo, num_heads}, segment, buffers);
  }
}

template <typename T>
void backward_finish(const HybridAttentionBackwardParams& params, int32_t sequence_idx,
                     int32_t kv_head, int num_parts, const float* dk, const float* dv) {
  const PlanHeader& plan = params.plan.header;
  const PlanSequence& sequence = params.plan.sequences[sequence_idx];
  const int head_dim = plan.head_dim;
  const int64_t ld = row_floats(head_dim), part_floats = sequence.num_keys * ld;
  const auto add_parts = [&](const float* parts, void* gradient) {
    for (int key = 0; key < sequence.num_keys; ++key) {
      alignas(64) float sum[256];
      load_row(parts + key * ld, head_dim, sum);
      for (int part = 1; part < num_parts; ++part) {
        const float* row = parts + part * part_floats + key * ld;
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

int64_t forward_workspace_floats(const PlanHeader& plan) {
  Arena arena{nullptr};
  ForwardBuffers(plan, arena);
  return arena.used;
}

void forward_tile_any(const HybridAttentionParams& params, const PlanTile& tile, int kv_head,
                      float* workspace) {
  if (params.dtype == DType::kFloat32) {
    forward_tile<float>(params, tile, kv_head, workspace);
  } else {
    forward_tile<bfloat16>(params, tile, kv_head, workspace);
  }
}

int64_t backward_workspace_floats(const PlanHeader& plan) {
  Arena arena{nullptr};
  BackwardBuffers(plan, arena);
  return arena.used;
}

void backward_task_any(const HybridAttentionBackwardParams& params,
                       const HybridAttentionBackwardTask& task, float* workspace) {
  if (params.dtype == DType::kFloat32) {
    backward_task<float>(params, task, workspace);
  } else {
    backward_task<bfloat16>(params, task, workspace);
  }
}

void backward_finish_any(const HybridAttentionBackwardParams& params, int32_t sequence,
                         int32_t kv_head, int num_parts, const float* dk, const float* dv) {
  if (params.dtype == DType::kFloat32) {
    backward_finish<float>(params, sequence, kv_head, num_parts, dk, dv);
  } else {
    backward_finish<bfloat16>(params, sequence, kv_head, num_parts, dk, dv);
  }
}

}  // namespace

const HybridAttentionForward hybrid_attention_forward = {
    .workspace_floats = forward_workspace_floats,
    .tile = forward_tile_any,
};

const HybridAttentionBackward hybrid_attention_backward = {
    .workspace_floats = backward_workspace_floats,
    .task = backward_task_any,
    .finish = backward_finish_any,
};

}  // namespace pdiff::cpu::PDIFF_ISA
