// Hybrid attention in bfloat16 on tile registers, scores and sums in float.
//
// Everything is kept transposed, so that rows lie across: a vector holds one key's scores, or one
// element of the output, for 16 rows.
//
//   s^T <- k @ q^T,  p^T <- exp2(s^T - m),  out^T <- alpha * out^T + v^T @ p^T
//
// Keys are operand a as they lie in memory; q^T is put into pairs once per query tile, v^T into
// rows once per key tile, and p^T comes out of softmax two keys at a time, which is a row of pairs.
//
// Where the rows of a query tile are few, to turn p costs less than to turn v:
//
//   out <- alpha * out + p @ v
//
// The products are the same and are added up in the same order, so a row's bits do not tell how
// many others its tile had.

#define PDIFF_ISA amx

#include "cpu/vec/avx512.h"
// The vector layer comes first.
#include <math.h>

#include "cpu/amx/pack.h"

namespace pdiff::cpu::amx {
namespace {

// The maximum that scores are measured from may lag behind by this much, in units of log2: a weight
// is then at most 2^8, which costs nothing in floating point, and the output is seldom rescaled.
constexpr float kSlack = 8.0f;

// Up to this many rows of a query tile p is turned, above it v. Measured; no more than a panel.
constexpr int kFewRows = kPanelRows;

// Softmax of the scores of some keys for 16 rows, in the running form: raises m if a score exceeds
// it by more than kSlack, then
//
//   alpha <- exp2(m_old - m),  p_j <- exp2(scale * s_j - m),  l <- alpha * l + sum_j p_j
//
// and hands p to put(j, p_j, p_j+1) two keys at a time, zeros from num_keys up to the next multiple
// of 32. Returns whether any m rose, which is when alpha is not 1.
template <bool kPartial, typename Put>
PDIFF_INLINE bool softmax_step(const float* s, int num_keys, float scale, const float* visible,
                               int offset, float* m, float* l, float* alpha, const Put& put) {
  const Vec limit = load(visible), factor = broadcast(scale), none = broadcast(kNoScore);
  const auto is_seen = [&](int j) { return broadcast(static_cast<float>(offset + j)) < limit; };
  constexpr int kChains = 4;
  Vec peak[kChains], sum[kChains];
  for (int c = 0; c < kChains; ++c) peak[c] = none, sum[c] = zero();
  const auto raise = [&](int j, int chain) {
    Vec score = load(s + j * kPanelRows);
    if (kPartial) score = select(is_seen(j), score, none);
    peak[chain] = max(peak[chain], score);
  };
  int j = 0;
  for (; j + kChains <= num_keys; j += kChains) {
    for (int c = 0; c < kChains; ++c) raise(j + c, c);
  }
  for (int c = 0; j + c < num_keys; ++c) raise(j + c, c);
  const Vec top = max(max(peak[0], peak[1]), max(peak[2], peak[3])) * factor;
  const Vec old_m = load(m);
  const Mask rises = old_m + broadcast(kSlack) < top;
  const Vec new_m = select(rises, top, old_m);

  const auto weigh = [&](int j) {
    const Vec weight = exp2_coarse(fma(load(s + j * kPanelRows), factor, zero() - new_m));
    return kPartial ? select(is_seen(j), weight, zero()) : weight;
  };
  j = 0;
  for (; j + kChains <= num_keys; j += kChains) {
    Vec weight[kChains];
    for (int c = 0; c < kChains; ++c) weight[c] = weigh(j + c), sum[c] = sum[c] + weight[c];
    put(j, weight[0], weight[1]);
    put(j + 2, weight[2], weight[3]);
  }
  for (int c = 0; j < num_keys; j += 2, c += 2) {
    const Vec even = weigh(j), odd = j + 1 < num_keys ? weigh(j + 1) : zero();
    sum[c] = sum[c] + even;
    sum[c + 1] = sum[c + 1] + odd;
    put(j, even, odd);
  }
  for (; j < round_up(num_keys, kTileDepth); j += 2) put(j, zero(), zero());

  const Vec rescale = exp2(old_m - new_m);  // exactly 1 where m stays
  store(m, new_m);
  store(l, fma(load(l), rescale, (sum[0] + sum[1]) + (sum[2] + sum[3])));
  store(alpha, rescale);
  return any(rises);
}

struct ForwardBuffers {
  bfloat16* qt;  // [panels][head_dim / 32][2] tiles of pairs
  float* out_t;  // [panels][padded head_dim][kPanelRows]
  bfloat16* k;   // [kTileKeys][padded head_dim]
  bfloat16* vt;  // [padded head_dim / 16][kKeySteps] tiles
  float* s;      // [kTileKeys][kPanelRows]
  bfloat16* p;   // [kKeySteps][2] tiles of pairs
  float* m;      // [rows] running maximum up to kSlack, in units of log2
  float* l;      // [rows] running sum
  float* alpha;  // [kPanelRows]
  const bfloat16** q_rows;
  bfloat16** out_rows;
  VisibleKeys visible;

  ForwardBuffers(const PlanHeader& plan, Arena& arena)
      : visible(arena, plan.tile_rows, max_rows(plan)) {
    const int64_t rows = max_rows(plan), padded_dim = round_up(plan.head_dim, kTileDepth);
    qt = arena.take<bfloat16>(rows * padded_dim);
    out_t = arena.take(rows * padded_dim);
    k = arena.take<bfloat16>(kTileKeys * padded_dim);
    vt = arena.take<bfloat16>(kTileKeys * padded_dim);
    s = arena.take(kTileKeys * kPanelRows);
    p = arena.take<bfloat16>(kTileKeys * kPanelRows);
    m = arena.take(rows);
    l = arena.take(rows);
    alpha = arena.take(kPanelRows);
    q_rows = arena.take<const bfloat16*>(rows);
    out_rows = arena.take<bfloat16*>(rows);
  }

 private:
  static int max_rows(const PlanHeader& plan) {
    return round_up(plan.tile_rows * (plan.num_heads_q / plan.num_heads_kv), kPanelRows);
  }
};

// s^T <- k @ q^T for the panel at `row`; kWide if it has more than 16 rows.
template <bool kWide>
PDIFF_INLINE void score_keys(const ForwardBuffers& x, int row, int key_steps, int padded_dim) {
  for (int step = 0; step < key_steps; ++step) {
    multiply_block<false, kWide>({.a = x.k + int64_t{step} * kTileDepth * padded_dim,
                                  .a_row = padded_dim,
                                  .a_below = kTileRows * padded_dim,
                                  .a_step = kTileDepth,
                                  .b = x.qt + int64_t{row} * padded_dim,
                                  .c = x.s + step * kTileDepth * kPanelRows,
                                  .c_row = kPanelRows},
                                 padded_dim / kTileDepth);
  }
}

// Softmax of the scores that lie in x.s, for 16 rows from `half` of the panel at `row` on.
template <typename Put>
PDIFF_INLINE bool softmax_of(const ForwardBuffers& x, const PanelKeys& seen, int row, int half,
                             float scale, int offset, const Put& put) {
  const float* visible = x.visible.by_row + row + half;
  float *m = x.m + row + half, *l = x.l + row + half, *alpha = x.alpha + half;
  if (seen.partial) {
    return softmax_step<true>(x.s + half, seen.num_keys, scale, visible, offset, m, l, alpha, put);
  }
  return softmax_step<false>(x.s + half, seen.num_keys, scale, visible, offset, m, l, alpha, put);
}

// The keys of a tile for one panel; kWide if it has more than 16 rows.
template <bool kWide>
PDIFF_INLINE void attend(const ForwardBuffers& x, const PanelKeys& seen, int panel, int padded_dim,
                         float scale, int offset) {
  const int key_steps = (seen.num_keys + kTileDepth - 1) / kTileDepth;
  const int row = panel * kPanelRows;
  score_keys<kWide>(x, row, key_steps, padded_dim);
  bool rose = false;
  for (int half = 0; half < (kWide ? kPanelRows : kTileRows); half += kTileRows) {
    bfloat16* p = x.p + half / kTileRows * kTileElements;
    rose |= softmax_of(x, seen, row, half, scale, offset, [&](int j, Vec even, Vec odd) {
      _mm512_store_si512(p + pair_offset(j), narrow_pairs(even, odd));
    });
  }
  // out^T <- alpha * out^T + v^T @ p^T
  float* out_t = x.out_t + int64_t{row} * padded_dim;
  if (rose) {
    for (int half = 0; half < (kWide ? kPanelRows : kTileRows); half += kTileRows) {
      const Vec alpha = load(x.alpha + half);
      for (int i = 0; i < padded_dim; ++i) {
        float* element = out_t + i * kPanelRows + half;
        store(element, load(element) * alpha);
      }
    }
  }
  for (int i = 0; i < padded_dim; i += kTileDepth) {
    multiply_block<true, kWide>({.a = x.vt + int64_t{i} * kTileKeys,
                                 .a_row = kTileDepth,
                                 .a_below = kKeySteps * kTileElements,
                                 .a_step = kTileElements,
                                 .b = x.p,
                                 .c = out_t + i * kPanelRows,
                                 .c_row = kPanelRows},
                                key_steps);
  }
}

// to[row][key] <- 16 rows of weights, of which s holds the transpose
PDIFF_INLINE void turn_weights(const float* s, int num_keys, bfloat16* to) {
  for (int key = 0; key < num_keys; key += kTileDepth) {
    Vec low[kTileRows], high[kTileRows];
    for (int i = 0; i < kTileRows; ++i) {
      low[i] = load(s + (key + i) * kPanelRows);
      high[i] = load(s + (key + kTileRows + i) * kPanelRows);
    }
    transpose(low);
    transpose(high);
    for (int row = 0; row < kTileRows; ++row) {
      _mm512_store_si512(to + row * kTileKeys + key, narrow_two(low[row], high[row]));
    }
  }
}

// The keys of a tile for a panel that is all of the query tile; kTall if it has more than 16 rows.
// out[row][padded_dim] lies in x.out_t, and pairs of keys' values in x.vt.
template <bool kTall>
PDIFF_INLINE void attend_few(const ForwardBuffers& x, const PanelKeys& seen, int padded_keys,
                             int padded_dim, float scale, int offset) {
  const int key_steps = (seen.num_keys + kTileDepth - 1) / kTileDepth;
  score_keys<kTall>(x, 0, key_steps, padded_dim);
  for (int half = 0; half < (kTall ? kPanelRows : kTileRows); half += kTileRows) {
    float* s = x.s + half;
    const bool rose = softmax_of(x, seen, 0, half, scale, offset, [&](int j, Vec even, Vec odd) {
      store(s + j * kPanelRows, even);
      store(s + (j + 1) * kPanelRows, odd);
    });
    turn_weights(s, seen.num_keys, x.p + half * kTileKeys);
    if (!rose) continue;
    for (int row = half; row < half + kTileRows; ++row) {
      const Vec alpha = broadcast(x.alpha[row]);
      float* out = x.out_t + row * padded_dim;
      for (int i = 0; i < padded_dim; i += Vec::kLanes) store(out + i, load(out + i) * alpha);
    }
  }
  // out <- alpha * out + p @ v
  for (int i = 0; i < padded_dim; i += kTileDepth) {
    multiply_block<true, true, kTall>({.a = x.p,
                                       .a_row = kTileKeys,
                                       .a_below = kTileRows * kTileKeys,
                                       .a_step = kTileDepth,
                                       .b = x.vt + int64_t{i} * padded_keys,
                                       .c = x.out_t + i,
                                       .c_row = padded_dim},
                                      key_steps);
  }
}

void forward_tile(const HybridAttentionParams& params, const PlanTile& tile, int kv_head,
                  float* workspace) {
  const PlanHeader& plan = params.plan.header;
  const PlanSequence& sequence = params.plan.sequences[tile.sequence];
  const int group_size = plan.num_heads_q / plan.num_heads_kv, head_dim = plan.head_dim;
  const int padded_dim = round_up(head_dim, kTileDepth);
  const TileRows rows{tile.row_lo, tile.row_hi, kv_head * group_size, group_size};
  const int num_rows = rows.num_rows();
  const auto keys = key_rows<bfloat16>(params.plan, sequence, kv_head, params.k, params.k_stride,
                                       params.k_page_stride);
  const auto values = key_rows<bfloat16>(params.plan, sequence, kv_head, params.v, params.v_stride,
                                         params.v_page_stride);
  Arena arena{workspace};
  ForwardBuffers x(plan, arena);
  configure_tiles();

  const float scale = params.softmax_scale * kLog2E;
  const auto* q = static_cast<const bfloat16*>(params.q) + sequence.row_begin * params.q_stride;
  row_pointers(q, params.q_stride, head_dim, rows, x.q_rows);
  pack_pairs_of_elements(x.q_rows, rows.padded_rows(), head_dim, x.qt);
  for (int row = 0; row < rows.padded_rows(); ++row) x.m[row] = kNoScore, x.l[row] = 0.0f;
  for (int i = 0; i < rows.padded_rows() * padded_dim; i += 16) store(x.out_t + i, zero());

  const bool has_few_rows = num_rows <= kFewRows;
  const auto attend_all = [&](const KeyTile& key_tile) {
    const PanelKeys seen = panel_keys(x.visible, key_tile, 0);
    if (seen.num_keys == 0) return;
    const int padded_keys = round_up(key_tile.num_keys, kTileDepth);
    const bfloat16* rows_of_v[kTileKeys] = {};
    for_each_key(values, key_tile.key_lo, key_tile.num_keys,
                 [&](int j, const bfloat16* row) { rows_of_v[j] = row; });
    pack_keys(keys, key_tile, head_dim, x.k);
    pack_pairs_of_rows(rows_of_v, padded_keys, head_dim, x.vt);
    const auto step = num_rows > kTileRows ? attend_few<true> : attend_few<false>;
    step(x, seen, padded_keys, padded_dim, scale, key_tile.offset);
  };
  const auto attend_panels = [&](const KeyTile& key_tile) {
    pack_keys(keys, key_tile, head_dim, x.k);
    pack_keys_transposed(values, key_tile, head_dim, x.vt);
    for (int panel = 0; panel * kPanelRows < num_rows; ++panel) {
      const PanelKeys seen = panel_keys(x.visible, key_tile, panel);
      if (seen.num_keys == 0) continue;
      const bool wide = num_rows - panel * kPanelRows > kTileRows;
      const auto step = wide ? attend<true> : attend<false>;
      step(x, seen, panel, padded_dim, scale, key_tile.offset);
    }
  };
  const SegmentsView segments = segments_of(params.plan, sequence);
  if (has_few_rows) {
    for_each_key_tile(segments, tile.segment, rows, x.visible, attend_all);
  } else {
    for_each_key_tile(segments, tile.segment, rows, x.visible, attend_panels);
  }
  _tile_release();

  // out <- out^T / l
  for_each_row(rows, [&](int row, int token, int head) {
    const bool sees_a_key = x.l[row] != 0.0f;
    if (params.lse != nullptr) {
      params.lse[int64_t{head} * plan.total_q + sequence.row_begin + token] =
          sees_a_key ? x.m[row] * kLn2 + logf(x.l[row]) : -INFINITY;
    }
    x.l[row] = sees_a_key ? 1.0f / x.l[row] : 0.0f;
  });
  const int64_t token_elements = int64_t{plan.num_heads_q} * head_dim;
  auto* out = static_cast<bfloat16*>(params.out) + sequence.row_begin * token_elements;
  row_pointers(out, token_elements, head_dim, rows, x.out_rows);
  if (!has_few_rows) return unpack_rows(x.out_t, x.l, num_rows, head_dim, x.out_rows);
  for (int row = 0; row < num_rows; ++row) {
    const Vec factor = broadcast(x.l[row]);
    for (int i = 0; i < head_dim; i += Vec::kLanes) {
      store_first(x.out_rows[row] + i, load(x.out_t + row * padded_dim + i) * factor, head_dim - i);
    }
  }
}

int64_t forward_workspace_floats(const PlanHeader& plan) {
  Arena arena{nullptr};
  ForwardBuffers(plan, arena);
  return arena.used;
}

}  // namespace

const HybridAttentionForward hybrid_attention_forward = {
    .workspace_floats = forward_workspace_floats,
    .tile = forward_tile,
};

}  // namespace pdiff::cpu::amx
