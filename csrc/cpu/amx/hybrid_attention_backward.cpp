// The backward of hybrid attention in bfloat16 on tile registers, sums in float.
//
//   p^T <- exp2(k @ q^T - lse),  ds^T <- softmax_scale * p^T * (v @ dout^T - delta)
//   dv <- dv + p^T @ dout,  dk <- dk + ds^T @ q,  dq^T <- dq^T + k^T @ ds^T
//
// p^T and ds^T of all rows of a query tile are kept, so that dv and dk are read and written once
// per pair of tiles. Their rows are operand a as softmax leaves them; ds^T is also put into pairs
// of keys, one panel at a time, for dq^T.

#define PDIFF_ISA amx

#include "cpu/vec/avx512.h"
// The vector layer comes first.
#include "cpu/amx/pack.h"
#include "cpu/kernels/backward_task.h"

namespace pdiff::cpu::amx {
namespace {

struct BackwardBuffers {
  bfloat16* qt;        // [panels][head_dim / 32][2] tiles of pairs of elements
  bfloat16* dout_t;    // as qt
  bfloat16* q;         // [head_dim / 32][panels][2] tiles of pairs of rows
  bfloat16* dout;      // as q
  float* dq_t;         // [panels][padded head_dim][kPanelRows]
  bfloat16* k;         // [kTileKeys][padded head_dim]
  bfloat16* v;         // [kTileKeys][padded head_dim]
  bfloat16* kt;        // [padded head_dim / 16][kKeySteps] tiles
  float* s;            // [kTileKeys][kPanelRows]
  float* dp;           // [kTileKeys][kPanelRows]
  bfloat16* p;         // [kTileKeys][rows]
  bfloat16* ds;        // [kTileKeys][rows]
  bfloat16* ds_pairs;  // [kKeySteps][2] tiles of pairs of keys
  float* ones;         // [rows]

  BackwardBuffers(const PlanHeader& plan, Arena& arena) {
    const int64_t rows = max_backward_rows(plan), dim = round_up(plan.head_dim, kTileDepth);
    qt = arena.take<bfloat16>(rows * dim);
    dout_t = arena.take<bfloat16>(rows * dim);
    q = arena.take<bfloat16>(rows * dim);
    dout = arena.take<bfloat16>(rows * dim);
    dq_t = arena.take(rows * dim);
    k = arena.take<bfloat16>(kTileKeys * dim);
    v = arena.take<bfloat16>(kTileKeys * dim);
    kt = arena.take<bfloat16>(kTileKeys * dim);
    s = arena.take(kTileKeys * kPanelRows);
    dp = arena.take(kTileKeys * kPanelRows);
    p = arena.take<bfloat16>(kTileKeys * rows);
    ds = arena.take<bfloat16>(kTileKeys * rows);
    ds_pairs = arena.take<bfloat16>(kTileKeys * kPanelRows);
    ones = arena.take(rows);
  }
};

// What softmax_gradient reads and writes of one panel.
struct PanelGradient {
  const float *s, *dp;                 // [num_keys][kPanelRows]
  const float *visible, *lse, *delta;  // [kPanelRows]
  bfloat16 *p, *ds;                    // [padded_keys][row_elements]
  int64_t row_elements;
  bfloat16* ds_pairs;
};

// p <- exp2(log2(e) * scale * s - lse), ds <- p * (scale * dp - delta), zero from num_keys up to
// padded_keys, a multiple of 32.
template <bool kPartial>
PDIFF_INLINE void softmax_gradient(const PanelGradient& x, int num_keys, int padded_keys,
                                   float scale, int offset) {
  constexpr int kHalves = 2;
  Vec limit[kHalves], minus_lse[kHalves], minus_delta[kHalves];
  for (int h = 0; h < kHalves; ++h) {
    limit[h] = load(x.visible + h * kTileRows);
    minus_lse[h] = zero() - load(x.lse + h * kTileRows);
    minus_delta[h] = zero() - load(x.delta + h * kTileRows);
  }
  const Vec factor = broadcast(scale * kLog2E), dp_factor = broadcast(scale);
  int j = 0;
  for (; j < num_keys; j += 2) {
    Vec p[2][kHalves], ds[2][kHalves];
    for (int i = 0; i < 2; ++i) {
      const Vec key = broadcast(static_cast<float>(offset + j + i));
      for (int h = 0; h < kHalves; ++h) {
        const int at = (j + i) * kPanelRows + h * kTileRows;
        p[i][h] = exp2_coarse(fma(load(x.s + at), factor, minus_lse[h]));
        if (kPartial) p[i][h] = select(key < limit[h], p[i][h], zero());
        ds[i][h] = p[i][h] * fma(load(x.dp + at), dp_factor, minus_delta[h]);
        if (j + i >= num_keys) p[i][h] = ds[i][h] = zero();
      }
      const int64_t row = (j + i) * x.row_elements;
      _mm512_store_si512(x.p + row, narrow_two(p[i][0], p[i][1]));
      _mm512_store_si512(x.ds + row, narrow_two(ds[i][0], ds[i][1]));
    }
    for (int h = 0; h < kHalves; ++h) {
      _mm512_store_si512(x.ds_pairs + pair_offset(j) + h * kTileElements,
                         narrow_pairs(ds[0][h], ds[1][h]));
    }
  }
  const __m512i none = _mm512_setzero_si512();
  for (; j < padded_keys; ++j) {
    _mm512_store_si512(x.p + j * x.row_elements, none);
    _mm512_store_si512(x.ds + j * x.row_elements, none);
    _mm512_store_si512(x.ds_pairs + pair_offset(j) + j % 2 * kTileElements, none);
  }
}

void backward_task(const HybridAttentionBackwardParams& params,
                   const HybridAttentionBackwardTask& task, float* workspace) {
  const PlanHeader& plan = params.plan.header;
  const PlanSequence& sequence = params.plan.sequences[task.sequence];
  const int head_dim = plan.head_dim, padded_dim = round_up(head_dim, kTileDepth);
  const int dim_steps = padded_dim / kTileDepth;
  const int64_t ld = row_floats(head_dim);
  const auto keys =
      key_rows<bfloat16>(params.plan, sequence, task.kv_head, params.k, params.k_stride, 0);
  const auto values =
      key_rows<bfloat16>(params.plan, sequence, task.kv_head, params.v, params.v_stride, 0);
  Arena arena{workspace};
  GradientRows<bfloat16> from(plan, arena);
  const BackwardBuffers x(plan, arena);
  const int64_t row_elements = max_backward_rows(plan);
  for (int row = 0; row < row_elements; ++row) x.ones[row] = 1.0f;
  configure_tiles();

  // One panel's p and ds, and its share of dq.
  const auto add_panel = [&](const KeyTile& tile, const PanelKeys& seen, int panel) {
    const int key_steps = (seen.num_keys + kTileDepth - 1) / kTileDepth;
    const int row = panel * kPanelRows;
    for (int step = 0; step < key_steps; ++step) {
      BlockOperands by_key{.a = x.k + int64_t{step} * kTileDepth * padded_dim,
                           .a_row = padded_dim,
                           .a_below = kTileRows * padded_dim,
                           .a_step = kTileDepth,
                           .b = x.qt + int64_t{row} * padded_dim,
                           .c = x.s + step * kTileDepth * kPanelRows,
                           .c_row = kPanelRows};
      multiply_block<false, true>(by_key, dim_steps);
      by_key.a = x.v + int64_t{step} * kTileDepth * padded_dim;
      by_key.b = x.dout_t + int64_t{row} * padded_dim;
      by_key.c = x.dp + step * kTileDepth * kPanelRows;
      multiply_block<false, true>(by_key, dim_steps);
    }
    const PanelGradient gradient{.s = x.s,
                                 .dp = x.dp,
                                 .visible = from.visible.by_row + row,
                                 .lse = from.lse + row,
                                 .delta = from.delta + row,
                                 .p = x.p + row,
                                 .ds = x.ds + row,
                                 .row_elements = row_elements,
                                 .ds_pairs = x.ds_pairs};
    const auto step = seen.partial ? softmax_gradient<true> : softmax_gradient<false>;
    step(gradient, seen.num_keys, round_up(tile.num_keys, kTileDepth), params.softmax_scale,
         tile.offset);
    for (int i = 0; i < padded_dim; i += kTileDepth) {
      multiply_block<true, true>({.a = x.kt + int64_t{i} * kTileKeys,
                                  .a_row = kTileDepth,
                                  .a_below = kKeySteps * kTileElements,
                                  .a_step = kTileElements,
                                  .b = x.ds_pairs,
                                  .c = x.dq_t + (int64_t{row} * padded_dim + i * kPanelRows),
                                  .c_row = kPanelRows},
                                 key_steps);
    }
  };

  for_each_query_tile(params, task, [&](const TileRows& rows, int segment) {
    const int padded_rows = rows.padded_rows(), num_panels = padded_rows / kPanelRows;
    from.point_at(params, sequence, rows);
    pack_pairs_of_elements(from.q, padded_rows, head_dim, x.qt);
    pack_pairs_of_elements(from.dout, padded_rows, head_dim, x.dout_t);
    pack_pairs_of_rows(from.q, padded_rows, head_dim, x.q);
    pack_pairs_of_rows(from.dout, padded_rows, head_dim, x.dout);
    fill_zero(x.dq_t, int64_t{padded_rows} * padded_dim);
    const auto add_key_tile = [&](const KeyTile& tile) {
      pack_keys(keys, tile, head_dim, x.k);
      pack_keys(values, tile, head_dim, x.v);
      pack_keys_transposed(keys, tile, head_dim, x.kt);
      int first = num_panels, last = -1;
      for (int panel = 0; panel < num_panels; ++panel) {
        const PanelKeys seen = panel_keys(from.visible, tile, panel);
        if (seen.num_keys > 0) {
          first = min(first, panel);
          last = panel;
        }
        if (seen.num_keys > 0 || first < panel) add_panel(tile, seen, panel);
      }
      // dv <- dv + p^T @ dout, dk <- dk + ds^T @ q, over the panels that see the tile
      for (int key = 0; key < tile.num_keys; key += kTileDepth) {
        for (int i = 0; i < padded_dim; i += kTileDepth) {
          const int64_t sum = (tile.key_lo + key) * ld + i;
          const int64_t b = int64_t{i} * padded_rows + first * 2 * kTileElements;
          const int64_t a = key * row_elements + first * kPanelRows;
          BlockOperands to_keys{.a = x.p + a,
                                .a_row = row_elements,
                                .a_below = kTileRows * row_elements,
                                .a_step = kTileDepth,
                                .b = x.dout + b,
                                .c = task.dv + sum,
                                .c_row = ld};
          multiply_block<true, true>(to_keys, last + 1 - first);
          to_keys.a = x.ds + a, to_keys.b = x.q + b, to_keys.c = task.dk + sum;
          multiply_block<true, true>(to_keys, last + 1 - first);
        }
      }
    };
    for_each_key_tile(segments_of(params.plan, sequence), segment, rows, from.visible,
                      add_key_tile);
    unpack_rows(x.dq_t, x.ones, rows.num_rows(), head_dim, from.dq);
  });
  _tile_release();
}

int64_t workspace_floats(const PlanHeader& plan) {
  Arena arena{nullptr};
  GradientRows<bfloat16>(plan, arena);
  BackwardBuffers(plan, arena);
  return arena.used;
}

}  // namespace

const HybridAttentionBackward hybrid_attention_backward = {
    .workspace_floats = workspace_floats,
    .task = backward_task,
    .finish = finish<bfloat16>,
};

}  // namespace pdiff::cpu::amx
