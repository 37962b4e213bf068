#pragma once

// Gradients of a tile of query rows: a block walks the keys that they see.
//
//   p <- exp2(scale * q @ k^T - lse),  ds <- p * (dout @ v^T - delta),  dq <- dq + scale * ds @ k
//
// A warp has 32 rows to itself, so that what it reads of k and v serves two products of 16 rows
// each: shared memory could not feed the tensor cores with less.

#include <cstdint>

#include "common/visible_walk.h"
#include "cuda/common/shared_tile.cuh"
#include "cuda/hybrid_attention_backward/blocks.cuh"
#include "cuda/hybrid_attention_backward/config.h"
#include "cuda/ptx/math.cuh"

namespace pdiff::cuda::attention_backward {

inline constexpr int kWarpRows = 32, kTileRows = kNumWarps * kWarpRows, kBlockKeys = 32;
static_assert(kWarpRows == kWarpSize && kTileRows == kNumThreads && kTileRows == kGpuTileRows);

/// A tile of query rows for one KV head.
template <typename T>
struct QueryItem {
  int32_t num_rows;  // packed rows of the tile; 0 when there is none left
  int32_t row_lo, segment;
  SegmentsView segments;          // of the sequence
  const unsigned char *q, *dout;  // of the tile's first packed row
  T* dq;
  const float *lse, *delta;
  int32_t num_keys;            // of the sequence
  const unsigned char *k, *v;  // of its first key
};

template <typename T>
__device__ __forceinline__ QueryItem<T> take_query_item(const Problem& problem) {
  const auto& x = problem.tensors;
  const PlanView plan = plan_view_of(x.plan);
  int32_t ticket;
  PlanTile tile;
  do {
    ticket = atomicAdd(&problem.tickets[1], 1);
    if (ticket >= plan.header.num_tiles * x.num_heads_kv) return {};
    tile = plan.tiles[ticket / x.num_heads_kv];
  } while (tile.part > 0);  // the forward shares out its keys, and it is listed once per part
  const int kv_head = ticket % x.num_heads_kv;
  const PlanSequence& sequence = plan.sequences[tile.sequence];

  const int64_t key = sequence.key_begin, row = int64_t{sequence.row_begin} + tile.row_lo;
  const int kv_offset = kv_head * x.head_dim, q_offset = kv_offset * problem.group_size;
  const int64_t out_at = row * x.num_heads_q * x.head_dim + q_offset;
  const int64_t packed_at = (int64_t{kv_head} * x.total_q + row) * problem.group_size;
  QueryItem<T> item;
  item.num_rows = (tile.row_hi - tile.row_lo) * problem.group_size;
  item.row_lo = tile.row_lo, item.segment = tile.segment;
  item.segments = segments_of(plan, sequence);
  item.q = bytes_at<T>(x.q, row * x.q_stride + q_offset);
  item.dout = bytes_at<T>(x.dout, out_at);
  item.dq = static_cast<T*>(x.dq) + out_at;
  item.lse = problem.row_lse + packed_at;
  item.delta = problem.row_delta + packed_at;
  item.num_keys = sequence.num_keys;
  item.k = bytes_at<T>(x.k, key * x.k_stride + kv_offset);
  item.v = bytes_at<T>(x.v, key * x.v_stride + kv_offset);
  return item;
}

template <typename T, int kHeadDim>
struct QueryGradientMemory {
  unsigned char q[kTileBytes<kTileRows, kHeadDim>], dout[kTileBytes<kTileRows, kHeadDim>];
  unsigned char k[kStages][kTileBytes<kBlockKeys, kHeadDim>];
  unsigned char v[kStages][kTileBytes<kBlockKeys, kHeadDim>];
  float lse[kTileRows], delta[kTileRows];     // registers are for products
  VisibleWalk<KeysOfRow> walks[kNumThreads];  // of the row of that number
  BlockQueue queue;
  QueryItem<T> item;
};

/// What a warp holds of its rows. Of rows and columns of 16: index i for rows, n for keys.
template <typename T, int kHeadDim>
struct QueryGradient {
  static constexpr int kDepth = kHeadDim / 16;

  using Reader = BlockReader<kHeadDim>;

  int lane, warp_row;
  float scale_log2;
  float dq[2][2 * kDepth][4] = {};

  __device__ __forceinline__ QueryGradient(int thread, float scale_log2)
      : lane(thread % kWarpSize),
        warp_row(thread / kWarpSize * kWarpRows),
        scale_log2(scale_log2) {}

  /// x <- rows @ keys^T
  __device__ __forceinline__ void multiply(float (&x)[2][4][4], const unsigned char* rows,
                                           const unsigned char* keys) const {
    const Reader reader(lane);
    const BlockReader<kHeadDim, BlockOrder::kAlong> key_reader(lane);
#pragma unroll
    for (int c = 0; c < kDepth; ++c) {
      uint32_t a[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) reader.load(a[i], rows, warp_row + 16 * i, 16 * c);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        uint32_t b[4];
        key_reader.load(b, keys, 16 * n, 16 * c);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          multiply_add<T>(x[i][2 * n], a[i], b[0], b[1]);
          multiply_add<T>(x[i][2 * n + 1], a[i], b[2], b[3]);
        }
      }
    }
  }

  /// Adds a stage's keys. Bit k of what the thread of a row has taken: does it see key k?
  template <bool kMasked>
  __device__ __forceinline__ void add_keys(const QueryGradientMemory<T, kHeadDim>& shared,
                                           int stage) {
    float s[2][4][4] = {}, dp[2][4][4] = {};
    multiply(s, shared.q, shared.k[stage]);
    multiply(dp, shared.dout, shared.v[stage]);
    // ds <- exp2(s - lse) * (dp - delta)
    uint32_t ds[2][2][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = warp_row + 16 * i + 8 * h + lane / 4;
        const float lse = shared.lse[row], delta = shared.delta[row];
        const uint32_t seen = kMasked ? shared.queue.seen[stage][row] >> lane % 4 * 2 : 0;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float x = scale_log2 * s[i][j][2 * h] - lse;
          float y = scale_log2 * s[i][j][2 * h + 1] - lse;
          if (kMasked) {
            x = (seen >> (8 * j) & 1) != 0 ? x : -INFINITY;
            y = (seen >> (8 * j + 1) & 1) != 0 ? y : -INFINITY;
          }
          ds[i][j / 2][j % 2 * 2 + h] = pack2<T>(exp2_fast(x) * (dp[i][j][2 * h] - delta),
                                                 exp2_fast(y) * (dp[i][j][2 * h + 1] - delta));
        }
      }
    }
    // dq <- dq + ds @ k
    const Reader reader(lane);
#pragma unroll
    for (int c = 0; c < kDepth; ++c) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        uint32_t b[4];
        reader.load_transposed(b, shared.k[stage], 16 * n, 16 * c);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          multiply_add<T>(dq[i][2 * c], ds[i][n], b[0], b[1]);
          multiply_add<T>(dq[i][2 * c + 1], ds[i][n], b[2], b[3]);
        }
      }
    }
  }

  __device__ __forceinline__ void add_block(const QueryGradientMemory<T, kHeadDim>& shared,
                                            int stage) {
    const int thread = this_thread();  // anew, or addresses would be kept from block to block
    lane = thread % kWarpSize, warp_row = thread - lane;
    const uint32_t seen = shared.queue.seen[stage][thread];
    if (__all_sync(kAllLanes, seen == ~0u)) {
      add_keys<false>(shared, stage);
    } else if (__any_sync(kAllLanes, seen != 0)) {
      add_keys<true>(shared, stage);
    }
  }
};

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kNumThreads, kBlocksPerSm)
    query_gradient_kernel(const __grid_constant__ Problem problem) {
  const auto& x = problem.tensors;
  auto& shared = *reinterpret_cast<QueryGradientMemory<T, kHeadDim>*>(shared_memory());
  while (true) {
    take_item(shared.item, [&] { return take_query_item<T>(problem); });
    if (shared.item.num_rows == 0) return;

    copy_row_pairs_async<kTileRows, kHeadDim>(
        shared.q, shared.dout,
        [&, q = shared.item.q, dout = shared.item.dout, num_rows = shared.item.num_rows](int row) {
          return query_pair<kHeadDim>(problem, q, dout, min(row, num_rows - 1), row < num_rows);
        });
    copy_async_commit();

    const int row = this_thread();
    const bool owns_row = row < shared.item.num_rows;
    shared.lse[row] = owns_row ? shared.item.lse[row] : INFINITY;
    shared.delta[row] = owns_row ? shared.item.delta[row] : 0.0f;
    shared.walks[row] =
        VisibleWalk(owns_row ? keys_of_row(shared.item.segments, shared.item.segment,
                                           shared.item.row_lo + problem.by_group.divide(row))
                             : KeysOfRow{});

    const auto copy = [&](int stage, int position) {
      copy_row_pairs_async<kBlockKeys, kHeadDim>(
          shared.k[stage], shared.v[stage],
          [&, k = shared.item.k, v = shared.item.v, num_keys = shared.item.num_keys](int row) {
            return key_pair(problem, k, v, position + row, position + row < num_keys);
          });
    };
    const auto take = [&](VisibleWalk<KeysOfRow>& walk, int position) {
      const auto bits = static_cast<uint32_t>(walk.take(position, kBlockKeys));
      // A row past the tile's end sees what the warp's others do: its weights are 0 anyway.
      const int row = this_thread(), num_rows = shared.item.num_rows;
      if (row >= num_rows) return row / kWarpSize * kWarpRows < num_rows ? ~0u : 0u;
      return bits;
    };
    QueryGradient<T, kHeadDim> gradient(this_thread(), x.softmax_scale * kLog2E);
    for_each_block<kBlockKeys>(shared.walks, shared.queue, copy, take,
                               [&](int stage) { gradient.add_block(shared, stage); });
    store_rows<T, kHeadDim>(shared.q, this_thread() / kWarpSize * kWarpRows, gradient.dq,
                            x.softmax_scale,
                            [&, dq = shared.item.dq, num_rows = shared.item.num_rows](int row) {
                              const int64_t token = problem.by_group.divide(row);
                              T* to = dq + int64_t{row} * kHeadDim + token * (problem.dout_gap / 2);
                              return row < num_rows ? to : nullptr;
                            });
  }
}

}  // namespace pdiff::cuda::attention_backward
