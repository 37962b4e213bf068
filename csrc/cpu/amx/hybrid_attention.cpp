// Hybrid attention in bfloat16 on tile registers, scores and sums in float.
//
// Everything is kept transposed, so that rows lie across: a vector holds one key's scores, or one
// element of the output, for 16 rows.
//
//   s^T <- k @ q^T,  p^T <- exp2(s^T - m),  out^T <- alpha * out^T + v^T @ p^T
//
// Keys are operand a as they lie in memory; q^T is put into pairs once per query tile, v^T into
// rows once per key tile, and p^T comes out of softmax two keys at a time, which is a row of pairs.

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

// Softmax of the scores of some keys for 16 rows, in the running form: raises m if a score exceeds
// it by more than kSlack, then
//
//   alpha <- exp2(m_old - m),  p_j <- exp2(scale * s_j - m),  l <- alpha * l + sum_j p_j
//
// and writes p as rows of pairs of keys, zero from num_keys up to the next multiple of 32. Returns
// whether any m rose, which is when alpha is not 1.
template <bool kPartial>
PDIFF_INLINE bool softmax_step(const float* s, int num_keys, float scale, const float* visible,
                               int offset, float* m, float* l, float* alpha, bfloat16* p) {
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
  const auto store_pair = [&](int j, Vec even, Vec odd) {
    _mm512_store_si512(p + pair_offset(j), narrow_pairs(even, odd));
  };
  j = 0;
  for (; j + kChains <= num_keys; j += kChains) {
    Vec weight[kChains];
    for (int c = 0; c < kChains; ++c) weight[c] = weigh(j + c), sum[c] = sum[c] + weight[c];
    store_pair(j, weight[0], weight[1]);
    store_pair(j + 2, weight[2], weight[3]);
  }
  for (int c = 0; j < num_keys; j += 2, c += 2) {
    const Vec even = weigh(j), odd = j + 1 < num_keys ? weigh(j + 1) : zero();
    sum[c] = sum[c] + even;
    sum[c + 1] = sum[c + 1] + odd;
    store_pair(j, even, odd);
  }
  for (; j < round_up(num_keys, kTileDepth); j += 2) store_pair(j, zero(), zero());

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

// The keys of a tile for one panel; kWide if it has more than 16 rows.
template <bool kWide>
PDIFF_INLINE void attend(const ForwardBuffers& x, const PanelKeys& seen, int panel, int padded_dim,
                         float scale, int offset) {
  const int num_steps = padded_dim / kTileDepth;
  const int key_steps = (seen.num_keys + kTileDepth - 1) / kTileDepth;
  const int row = panel * kPanelRows;
  // s^T <- k @ q^T
  for (int step = 0; step < key_steps; ++step) {
    multiply_block<false, kWide>({.a = x.k + int64_t{step} * kTileDepth * padded_dim,
                                  .a_row = padded_dim,
                                  .a_below = kTileRows * padded_dim,
                                  .a_step = kTileDepth,
                                  .b = x.qt + int64_t{row} * padded_dim,
                                  .c = x.s + step * kTileDepth * kPanelRows,
                                  .c_row = kPanelRows},
                                 num_steps);
  }
  bool rose = false;
  for (int half = 0; half < (kWide ? kPanelRows : kTileRows); half += kTileRows) {
    const auto step = seen.partial ? softmax_step<true> : softmax_step<false>;
    rose |= step(x.s + half, seen.num_keys, scale, x.visible.by_row + row + half, offset,
                 x.m + row + half, x.l + row + half, x.alpha + half,
                 x.p + half / kTileRows * kTileElements);
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
  for_each_key_tile(segments_of(params.plan, sequence), tile.segment, rows, x.visible,
                    attend_panels);
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
  unpack_rows(x.out_t, x.l, num_rows, head_dim, x.out_rows);
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
