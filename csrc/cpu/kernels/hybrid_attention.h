#pragma once

// The body of hybrid attention in float, compiled once per instruction set.
//
// A query tile holds the rows of some tokens, all heads of a KV head's group: row = token * heads +
// head. Scores are kept transposed, keys down and rows across, so that a vector holds the scores of
// one key for kLanes rows: softmax then needs no reduction across lanes and keys no transposition.
//
//   s^T <- k @ q^T,  p^T <- exp2(s^T - m),  out <- alpha * out + p @ v
//
// A key tile is copied to floats once and serves all rows of the tile, one panel of rows at a time.
// A panel's p^T, its q^T and the columns of v in use stay in the first-level cache.

#include <math.h>

#include <cstdint>

#include "common/tile_walk.h"
#include "cpu/hybrid_attention.h"
#include "cpu/kernels/product.h"

namespace pdiff::cpu::PDIFF_ISA {
namespace {

constexpr int kPanelRows = 32;
constexpr int kTileKeys = 128;

constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.693147181f;
constexpr float kNoScore = -1e30f;  // below every score; finite, so that differences are no NaN

PDIFF_INLINE int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

// Hands out pieces of a workspace, each starting on a cache line. With a null base it only counts.
struct Arena {
  float* base;
  int64_t used = 0;
  float* take(int64_t floats) {
    float* piece = base == nullptr ? nullptr : base + used;
    used += (floats + 15) / 16 * 16;
    return piece;
  }
};

// Where the keys or values of one KV head of one sequence lie.
template <typename T>
struct KeyRows {
  const T* base;
  int64_t stride;
  const int32_t* pages;
  int64_t page_stride;
  int32_t page_size;  // 0: packed
};

template <typename T>
PDIFF_INLINE KeyRows<T> key_rows(const PlanView& plan, const PlanSequence& sequence, int kv_head,
                                 const void* data, int64_t stride, int64_t page_stride) {
  const T* base = static_cast<const T*>(data) + int64_t{kv_head} * plan.header.head_dim;
  if (plan.header.page_size == 0) base += sequence.key_begin * stride;
  return {base, stride, plan.pages + sequence.page_begin, page_stride, plan.header.page_size};
}

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

// to[j] <- row key_lo + j
template <typename T>
void copy_keys(const KeyRows<T>& rows, int key_lo, int num_keys, int head_dim, float* to,
               int64_t ld) {
  if (rows.page_size == 0) {
    for (int j = 0; j < num_keys; ++j) {
      load_row(rows.base + (key_lo + j) * rows.stride, head_dim, to + j * ld);
    }
    return;
  }
  int page_idx = key_lo / rows.page_size, slot = key_lo % rows.page_size;
  for (int j = 0; j < num_keys; ++j) {
    const T* page = rows.base + rows.pages[page_idx] * rows.page_stride;
    load_row(page + slot * rows.stride, head_dim, to + j * ld);
    if (++slot == rows.page_size) {
      slot = 0;
      ++page_idx;
    }
  }
}

// Rows of a tile: tokens [token_lo, token_hi) of a sequence, heads [head_lo, head_hi).
struct TileRows {
  int token_lo, token_hi, head_lo, num_heads;
  int num_tokens() const { return token_hi - token_lo; }
  int num_rows() const { return num_tokens() * num_heads; }
};

// to[panel][i][row in panel] <- scale * element i of the row. Rows past the last are zero.
template <typename T>
void transpose_rows(const T* base, int64_t stride, int head_dim, const TileRows& rows, float scale,
                    float* to) {
  const int padded = round_up(rows.num_rows(), kPanelRows);
  for (int row = 0; row < padded; ++row) {
    float* column = to + int64_t{row / kPanelRows} * head_dim * kPanelRows + row % kPanelRows;
    if (row >= rows.num_rows()) {
      for (int i = 0; i < head_dim; ++i) column[i * kPanelRows] = 0.0f;
      continue;
    }
    const T* from = base + (rows.token_lo + row / rows.num_heads) * stride +
                    int64_t{rows.head_lo + row % rows.num_heads} * head_dim;
    alignas(64) float element[256];
    load_row(from, head_dim, element);
    for (int i = 0; i < head_dim; ++i) column[i * kPanelRows] = scale * element[i];
  }
}

// Which keys of a key tile each row of a query tile sees: a prefix of them.
struct PanelView {
  int keys_max, keys_min;  // over the panel's rows
};

// limit[row] <- keys of the tile that the row sees; rows past the last repeat it.
PDIFF_INLINE PanelView panel_limits(const int32_t* visible,  // by token, from the run's start
                                    const TileRows& rows, int panel, int key_offset, int num_keys,
                                    float* limit) {  // [kPanelRows]
  PanelView view{0, num_keys};
  for (int i = 0; i < kPanelRows; ++i) {
    const int row = panel * kPanelRows + i;
    const int last = rows.num_rows() - 1;
    const int token = (row < last ? row : last) / rows.num_heads;
    int keys = visible[token] - key_offset;
    keys = keys < 0 ? 0 : keys > num_keys ? num_keys : keys;
    limit[i] = static_cast<float>(keys);
    if (keys > view.keys_max) view.keys_max = keys;
    if (keys < view.keys_min) view.keys_min = keys;
  }
  return view;
}

// One online softmax step over the scores of `keys` keys for the rows of a panel, in place:
// m' <- max(m, max_j s_j), alpha <- exp2(m - m'), p_j <- exp2(s_j - m'), l <- alpha * l + sum_j
// p_j.
template <bool kMasked>
PDIFF_INLINE void softmax_step(float* s, int keys, int cols, const float* limit, float* m, float* l,
                               float* alpha) {
  constexpr int kChains = 4;
  for (int col = 0; col < cols; col += Vec::kLanes) {
    const Vec seen = load(limit + col);
    const auto is_seen = [&](int j) { return broadcast(static_cast<float>(j)) < seen; };
    Vec peak[kChains], sum[kChains];
    for (int c = 0; c < kChains; ++c) peak[c] = broadcast(kNoScore), sum[c] = zero();
    const auto raise = [&](int j, int chain) {
      Vec score = load(s + j * kPanelRows + col);
      if (kMasked) score = select(is_seen(j), score, broadcast(kNoScore));
      peak[chain] = max(peak[chain], score);
    };
    int j = 0;
    for (; j + kChains <= keys; j += kChains) {
      for (int c = 0; c < kChains; ++c) raise(j + c, c);
    }
    for (int c = 0; j + c < keys; ++c) raise(j + c, c);
    const Vec old_m = load(m + col);
    const Vec new_m = max(old_m, max(max(peak[0], peak[1]), max(peak[2], peak[3])));

    const auto weigh = [&](int j, int chain) {
      float* score = s + j * kPanelRows + col;
      Vec p = exp2(load(score) - new_m);
      if (kMasked) p = select(is_seen(j), p, zero());
      store(score, p);
      sum[chain] = sum[chain] + p;
    };
    j = 0;
    for (; j + kChains <= keys; j += kChains) {
      for (int c = 0; c < kChains; ++c) weigh(j + c, c);
    }
    for (int c = 0; j + c < keys; ++c) weigh(j + c, c);
    const Vec rescale = exp2(old_m - new_m);
    store(alpha + col, rescale);
    store(m + col, new_m);
    store(l + col, fma(load(l + col), rescale, (sum[0] + sum[1]) + (sum[2] + sum[3])));
  }
}

struct ForwardBuffers {
  float* qt;         // [panels][head_dim][kPanelRows], times softmax_scale * log2(e)
  float* out;        // [rows][ld]
  float* k;          // [kTileKeys][ld]
  float* v;          // [kTileKeys][ld]
  float* s;          // [kTileKeys][kPanelRows]
  float* m;          // [rows] running maximum, in units of log2
  float* l;          // [rows] running sum
  float* alpha;      // [kPanelRows]
  float* limit;      // [kPanelRows]
  int32_t* visible;  // [tile_rows]
  int64_t floats;

  ForwardBuffers(const PlanHeader& plan, float* workspace) {
    const int group_size = plan.num_heads_q / plan.num_heads_kv;
    const int rows = round_up(plan.tile_rows * group_size, kPanelRows);
    const int64_t ld = row_floats(plan.head_dim);
    Arena arena{workspace};
    qt = arena.take(int64_t{rows} * plan.head_dim);
    out = arena.take(rows * ld);
    k = arena.take(kTileKeys * ld);
    v = arena.take(kTileKeys * ld);
    s = arena.take(kTileKeys * kPanelRows);
    m = arena.take(rows);
    l = arena.take(rows);
    alpha = arena.take(kPanelRows);
    limit = arena.take(kPanelRows);
    visible = reinterpret_cast<int32_t*>(arena.take(plan.tile_rows));
    floats = arena.used;
  }
};

template <typename T>
void forward_tile(const HybridAttentionParams& params, const PlanTile& tile, int kv_head,
                  float* workspace) {
  const PlanHeader& plan = params.plan.header;
  const PlanSequence& sequence = params.plan.sequences[tile.sequence];
  const SegmentsView segments = segments_of(params.plan, sequence);
  const int group_size = plan.num_heads_q / plan.num_heads_kv;
  const TileRows rows{tile.row_lo, tile.row_hi, kv_head * group_size, group_size};
  const int num_rows = rows.num_rows(), padded_rows = round_up(num_rows, kPanelRows);
  const int head_dim = plan.head_dim;
  const int64_t ld = row_floats(head_dim);
  const ForwardBuffers x(plan, workspace);
  const auto keys =
      key_rows<T>(params.plan, sequence, kv_head, params.k, params.k_stride, params.k_page_stride);
  const auto values =
      key_rows<T>(params.plan, sequence, kv_head, params.v, params.v_stride, params.v_page_stride);

  const T* q = static_cast<const T*>(params.q) + sequence.row_begin * params.q_stride;
  transpose_rows(q, params.q_stride, head_dim, rows, params.softmax_scale * kLog2E, x.qt);
  for (int row = 0; row < padded_rows; ++row) x.m[row] = kNoScore, x.l[row] = 0.0f;
  for (int64_t i = 0; i < padded_rows * ld; ++i) x.out[i] = 0.0f;

  KeyRun run{0, 0};
  for (int next = 0; next_run(segments, tile.segment, tile.row_hi, next, &run);
       next = run.key_lo + 1) {
    visible_in_run(segments, tile.segment, tile.row_lo, tile.row_hi, run, x.visible);
    for (int key_lo = run.key_lo; key_lo < run.key_hi; key_lo += kTileKeys) {
      const int num_keys = run.key_hi - key_lo < kTileKeys ? run.key_hi - key_lo : kTileKeys;
      copy_keys(keys, key_lo, num_keys, head_dim, x.k, ld);
      copy_keys(values, key_lo, num_keys, head_dim, x.v, ld);
      for (int row = 0; row < num_rows; row += kPanelRows) {
        const PanelView view =
            panel_limits(x.visible, rows, row / kPanelRows, key_lo - run.key_lo, num_keys, x.limit);
        if (view.keys_max == 0) continue;
        const int panel_rows = num_rows - row < kPanelRows ? num_rows - row : kPanelRows;
        const int cols = round_up(panel_rows, Vec::kLanes);
        // s^T <- k @ q^T
        product<Init::kZero, Layout::kRowMajor>({.a = x.k,
                                                 .lda = ld,
                                                 .b = x.qt + int64_t{row} * head_dim,
                                                 .ldb = kPanelRows,
                                                 .c = x.s,
                                                 .ldc = kPanelRows,
                                                 .depth = head_dim,
                                                 .scale = nullptr},
                                                view.keys_max, cols);
        if (view.keys_min == view.keys_max) {
          softmax_step<false>(x.s, view.keys_max, cols, x.limit, x.m + row, x.l + row, x.alpha);
        } else {
          softmax_step<true>(x.s, view.keys_max, cols, x.limit, x.m + row, x.l + row, x.alpha);
        }
        // out <- alpha * out + p @ v
        product<Init::kScale, Layout::kDepthMajor>({.a = x.s,
                                                    .lda = kPanelRows,
                                                    .b = x.v,
                                                    .ldb = ld,
                                                    .c = x.out + row * ld,
                                                    .ldc = ld,
                                                    .depth = view.keys_max,
                                                    .scale = x.alpha},
                                                   panel_rows, head_dim);
      }
    }
  }

  for (int row = 0; row < num_rows; ++row) {
    const int64_t token = sequence.row_begin + tile.row_lo + row / group_size;
    const int head = rows.head_lo + row % group_size;
    const bool sees_a_key = x.l[row] != 0.0f;
    const Vec inverse = broadcast(sees_a_key ? 1.0f / x.l[row] : 0.0f);
    float* out = x.out + row * ld;
    for (int i = 0; i < head_dim; i += Vec::kLanes) store(out + i, load(out + i) * inverse);
    store_row(out, head_dim,
              static_cast<T*>(params.out) + (token * plan.num_heads_q + head) * head_dim);
    if (params.lse != nullptr) {
      params.lse[int64_t{head} * plan.total_q + token] =
          sees_a_key ? x.m[row] * kLn2 + logf(x.l[row]) : -INFINITY;
    }
  }
}

// The backward keeps rows of the tile both transposed (to be multiplied by keys) and as they are
// (to be summed into keys):
//
//   p^T <- exp2(k @ q^T - lse),  ds^T <- p^T * (v @ dout^T - delta)
//   dv <- dv + p^T @ dout,  dk <- dk + ds^T @ q,  dq <- dq + ds @ k
struct BackwardBuffers {
  float* qt;         // [panels][head_dim][kPanelRows], times softmax_scale * log2(e)
  float* dout_t;     // [panels][head_dim][kPanelRows]
  float* q;          // [rows][ld], times softmax_scale
  float* dout;       // [rows][ld]
  float* dq;         // [rows][ld]
  float* k;          // [kTileKeys][ld]
  float* v;          // [kTileKeys][ld]
  float* p;          // [kTileKeys][kPanelRows]
  float* ds;         // [kTileKeys][kPanelRows]
  float* lse;        // [rows], in units of log2
  float* delta;      // [rows], sum(dout * out) - dlse
  float* limit;      // [kPanelRows]
  int32_t* visible;  // [tokens]
  int64_t floats;

  BackwardBuffers(const PlanHeader& plan, float* workspace);
};

constexpr int kBackwardRows = 128;
PDIFF_INLINE int backward_tokens(int num_heads) {
  return num_heads < kBackwardRows ? kBackwardRows / num_heads : 1;
}

BackwardBuffers::BackwardBuffers(const PlanHeader& plan, float* workspace) {
  const int group_size = plan.num_heads_q / plan.num_heads_kv;
  const int rows = group_size < kBackwardRows ? kBackwardRows : round_up(group_size, kPanelRows);
  const int64_t ld = row_floats(plan.head_dim);
  Arena arena{workspace};
  qt = arena.take(int64_t{rows} * plan.head_dim);
  dout_t = arena.take(int64_t{rows} * plan.head_dim);
  q = arena.take(rows * ld);
  dout = arena.take(rows * ld);
  dq = arena.take(rows * ld);
  k = arena.take(kTileKeys * ld);
  v = arena.take(kTileKeys * ld);
  p = arena.take(kTileKeys * kPanelRows);
  ds = arena.take(kTileKeys * kPanelRows);
  lse = arena.take(rows);
  delta = arena.take(rows);
  limit = arena.take(kPanelRows);
  visible = reinterpret_cast<int32_t*>(arena.take(kBackwardRows));
  floats = arena.used;
}

// p^T <- exp2(s^T - lse), ds^T <- p^T * (dp^T - delta), in place of s^T and dp^T
template <bool kMasked>
PDIFF_INLINE void softmax_gradient(float* p, float* ds, int keys, int cols, const float* limit,
                                   const float* lse, const float* delta) {
  for (int col = 0; col < cols; col += Vec::kLanes) {
    const Vec seen = load(limit + col), lse_v = load(lse + col), delta_v = load(delta + col);
    for (int j = 0; j < keys; ++j) {
      Vec weight = exp2(load(p + j * kPanelRows + col) - lse_v);
      if (kMasked) weight = select(broadcast(static_cast<float>(j)) < seen, weight, zero());
      store(p + j * kPanelRows + col, weight);
      store(ds + j * kPanelRows + col, weight * (load(ds + j * kPanelRows + col) - delta_v));
    }
  }
}

template <typename T>
void backward_tile(const HybridAttentionBackwardParams& params,
                   const HybridAttentionBackwardTask& task, const TileRows& rows, int segment,
                   const BackwardBuffers& x) {
  const PlanHeader& plan = params.plan.header;
  const PlanSequence& sequence = params.plan.sequences[task.sequence];
  const SegmentsView segments = segments_of(params.plan, sequence);
  const int num_rows = rows.num_rows(), padded_rows = round_up(num_rows, kPanelRows);
  const int head_dim = plan.head_dim;
  const int64_t ld = row_floats(head_dim);
  const int64_t row_elements = int64_t{plan.num_heads_q} * head_dim;
  const auto keys = key_rows<T>(params.plan, sequence, task.kv_head, params.k, params.k_stride, 0);
  const auto values =
      key_rows<T>(params.plan, sequence, task.kv_head, params.v, params.v_stride, 0);

  const T* q = static_cast<const T*>(params.q) + sequence.row_begin * params.q_stride;
  const T* out = static_cast<const T*>(params.out) + sequence.row_begin * row_elements;
  const T* dout = static_cast<const T*>(params.dout) + sequence.row_begin * row_elements;
  transpose_rows(q, params.q_stride, head_dim, rows, params.softmax_scale * kLog2E, x.qt);
  transpose_rows(dout, row_elements, head_dim, rows, 1.0f, x.dout_t);
  for (int row = 0; row < padded_rows; ++row) {
    const bool exists = row < num_rows;
    const int token = rows.token_lo + (exists ? row / rows.num_heads : 0);
    const int head = rows.head_lo + (exists ? row % rows.num_heads : 0);
    const int64_t offset = token * row_elements + int64_t{head} * head_dim;
    const int64_t stat = int64_t{head} * plan.total_q + sequence.row_begin + token;
    float* row_q = x.q + row * ld;
    float* row_dout = x.dout + row * ld;
    load_row(q + token * params.q_stride + int64_t{head} * head_dim, head_dim, row_q);
    load_row(dout + offset, head_dim, row_dout);
    Vec delta = zero();
    for (int i = 0; i < head_dim; i += Vec::kLanes) {
      const int left = head_dim - i;
      delta = fma(load(row_dout + i), load_first(out + offset + i, left), delta);
      store(row_q + i, load(row_q + i) * broadcast(params.softmax_scale));
    }
    x.delta[row] = reduce_add(delta) - (params.dlse != nullptr ? params.dlse[stat] : 0.0f);
    x.lse[row] = params.lse[stat] * kLog2E;
  }
  for (int64_t i = 0; i < padded_rows * ld; ++i) x.dq[i] = 0.0f;

  KeyRun run{0, 0};
  for (int next = 0; next_run(segments, segment, rows.token_hi, next, &run);
       next = run.key_lo + 1) {
    visible_in_run(segments, segment, rows.token_lo, rows.token_hi, run, x.visible);
    for (int key_lo = run.key_lo; key_lo < run.key_hi; key_lo += kTileKeys) {
      const int num_keys = run.key_hi - key_lo < kTileKeys ? run.key_hi - key_lo : kTileKeys;
      copy_keys(keys, key_lo, num_keys, head_dim, x.k, ld);
      copy_keys(values, key_lo, num_keys, head_dim, x.v, ld);
      for (int row = 0; row < num_rows; row += kPanelRows) {
        const PanelView view =
            panel_limits(x.visible, rows, row / kPanelRows, key_lo - run.key_lo, num_keys, x.limit);
        if (view.keys_max == 0) continue;
        const int panel_rows = num_rows - row < kPanelRows ? num_rows - row : kPanelRows;
        const int cols = round_up(panel_rows, Vec::kLanes);
        ProductOperands scores{.a = x.k,
                               .lda = ld,
                               .b = x.qt + int64_t{row} * head_dim,
                               .ldb = kPanelRows,
                               .c = x.p,
                               .ldc = kPanelRows,
                               .depth = head_dim,
                               .scale = nullptr};
        product<Init::kZero, Layout::kRowMajor>(scores, view.keys_max, cols);
        scores.a = x.v, scores.b = x.dout_t + int64_t{row} * head_dim, scores.c = x.ds;
        product<Init::kZero, Layout::kRowMajor>(scores, view.keys_max, cols);
        if (view.keys_min == view.keys_max) {
          softmax_gradient<false>(x.p, x.ds, view.keys_max, cols, x.limit, x.lse + row,
                                  x.delta + row);
        } else {
          softmax_gradient<true>(x.p, x.ds, view.keys_max, cols, x.limit, x.lse + row,
                                 x.delta + row);
        }
        ProductOperands to_keys{.a = x.p,
                                .lda = kPanelRows,
                                .b = x.dout + row * ld,
                                .ldb = ld,
                                .c = task.dv + key_lo * ld,
                                .ldc = ld,
                                .depth = panel_rows,
                                .scale = nullptr};
        product<Init::kAdd, Layout::kRowMajor>(to_keys, view.keys_max, head_dim);
        to_keys.a = x.ds, to_keys.b = x.q + row * ld, to_keys.c = task.dk + key_lo * ld;
        product<Init::kAdd, Layout::kRowMajor>(to_keys, view.keys_max, head_dim);
        product<Init::kAdd, Layout::kDepthMajor>({.a = x.ds,
                                                  .lda = kPanelRows,
                                                  .b = x.k,
                                                  .ldb = ld,
                                                  .c = x.dq + row * ld,
                                                  .ldc = ld,
                                                  .depth = view.keys_max,
                                                  .scale = nullptr},
                                                 panel_rows, head_dim);
      }
    }
  }

  T* dq = static_cast<T*>(params.dq) + sequence.row_begin * row_elements;
  for (int row = 0; row < num_rows; ++row) {
    float* row_dq = x.dq + row * ld;
    for (int i = 0; i < head_dim; i += Vec::kLanes) {
      store(row_dq + i, load(row_dq + i) * broadcast(params.softmax_scale));
    }
    store_row(row_dq, head_dim,
              dq + (rows.token_lo + row / rows.num_heads) * row_elements +
                  int64_t{rows.head_lo + row % rows.num_heads} * head_dim);
  }
}

template <typename T>
void backward_task(const HybridAttentionBackwardParams& params,
                   const HybridAttentionBackwardTask& task, float* workspace) {
  const PlanHeader& plan = params.plan.header;
  const PlanSequence& sequence = params.plan.sequences[task.sequence];
  const SegmentsView segments = segments_of(params.plan, sequence);
  const BackwardBuffers buffers(plan, workspace);
  const int64_t part_floats = sequence.num_keys * row_floats(plan.head_dim);
  for (int64_t i = 0; i < part_floats; ++i) task.dk[i] = 0.0f, task.dv[i] = 0.0f;

  const int num_heads = task.head_hi - task.head_lo, tokens = backward_tokens(num_heads);
  int segment = 0;
  for (int token = 0; token < sequence.num_rows; token += tokens) {
    segment = find_segment(segments, segment, segments.num_segments, token);
    const int token_hi = token + tokens < sequence.num_rows ? token + tokens : sequence.num_rows;
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
        for (int i = 0; i < head_dim; i += Vec::kLanes)
          store(sum + i, load(sum + i) + load(row + i));
      }
      const int64_t row = int64_t{sequence.key_begin} + key;
      store_row(sum, head_dim,
                static_cast<T*>(gradient) + (row * plan.num_heads_kv + kv_head) * head_dim);
    }
  };
  add_parts(dk, params.dk);
  add_parts(dv, params.dv);
}

int64_t forward_workspace_floats(const PlanHeader& plan) {
  return ForwardBuffers(plan, nullptr).floats;
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
  return BackwardBuffers(plan, nullptr).floats;
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

const HybridAttentionKernels hybrid_attention_kernels = {
    .forward_workspace_floats = forward_workspace_floats,
    .forward_tile = forward_tile_any,
    .backward_workspace_floats = backward_workspace_floats,
    .backward_task = backward_task_any,
    .backward_finish = backward_finish_any,
};

}  // namespace pdiff::cpu::PDIFF_ISA
