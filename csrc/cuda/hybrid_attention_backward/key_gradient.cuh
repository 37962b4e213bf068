#pragma once

// Gradients of a tile of keys and values: a block walks the rows that see them.
//
//   p^T <- exp2(scale * k @ q^T - lse),  ds^T <- p^T * (v @ dout^T - delta)
//   dv <- dv + p^T @ dout,  dk <- dk + scale * ds^T @ q
//
// A warp has 16 keys to itself, k, v, dk and dv in registers. It computes the transposed scores of
// 16 rows at a time, and these are, as they come out of the product, the left operand of the next.
// A key's heads of a group are summed on the way: they are rows like any others.

#include <cstdint>

#include "common/visible_walk.h"
#include "cuda/common/shared_tile.cuh"
#include "cuda/hybrid_attention_backward/blocks.cuh"
#include "cuda/hybrid_attention_backward/config.h"
#include "cuda/ptx/math.cuh"

namespace pdiff::cuda::attention_backward {

inline constexpr int kWarpKeys = 16, kBlockRows = 64, kStepRows = 16;
static_assert(kNumWarps * kWarpKeys == kGpuTileKeys);

/// A tile of keys for one KV head.
template <typename T>
struct KeyItem {
  int32_t num_keys;  // 0 when there is none left
  int32_t sequence, key_lo, key_segment;
  const unsigned char *k, *v;  // of the tile's first key
  T *dk, *dv;
  int32_t num_rows;               // packed rows of the sequence
  const unsigned char *q, *dout;  // of its first packed row
  const float *lse, *delta;
};

template <typename T>
__device__ __forceinline__ KeyItem<T> take_key_item(const Problem& problem) {
  const auto& x = problem.tensors;
  const PlanView plan = plan_view_of(x.plan);
  const int32_t ticket = atomicAdd(&problem.tickets[0], 1);
  if (ticket >= plan.header.num_key_tiles * x.num_heads_kv) return {};
  const PlanKeyTile tile = plan.key_tiles[ticket / x.num_heads_kv];
  const int kv_head = ticket % x.num_heads_kv;
  const PlanSequence& sequence = plan.sequences[tile.sequence];

  const int64_t key = int64_t{sequence.key_begin} + tile.key_lo, row = sequence.row_begin;
  const int kv_offset = kv_head * x.head_dim, q_offset = kv_offset * problem.group_size;
  const int64_t kv_at = key * x.num_heads_kv * x.head_dim + kv_offset;
  const int64_t packed_at = (int64_t{kv_head} * x.total_q + row) * problem.group_size;
  KeyItem<T> item;
  item.num_keys = tile.key_hi - tile.key_lo;
  item.sequence = tile.sequence, item.key_lo = tile.key_lo, item.key_segment = tile.key_segment;
  item.k = bytes_at<T>(x.k, key * x.k_stride + kv_offset);
  item.v = bytes_at<T>(x.v, key * x.v_stride + kv_offset);
  item.dk = static_cast<T*>(x.dk) + kv_at;
  item.dv = static_cast<T*>(x.dv) + kv_at;
  item.num_rows = sequence.num_rows * problem.group_size;
  item.q = bytes_at<T>(x.q, row * x.q_stride + q_offset);
  item.dout = bytes_at<T>(x.dout, row * x.num_heads_q * x.head_dim + q_offset);
  item.lse = problem.row_lse + packed_at;
  item.delta = problem.row_delta + packed_at;
  return item;
}

template <typename T, int kHeadDim>
struct KeyGradientMemory {
  unsigned char q[kStages][kTileBytes<kBlockRows, kHeadDim>];
  unsigned char dout[kStages][kTileBytes<kBlockRows, kHeadDim>];
  float lse[kStages][kBlockRows], delta[kStages][kBlockRows];
  VisibleWalk<RowsOfKey> walks[kNumThreads];  // registers are for products
  BlockQueue queue;
  KeyItem<T> item;
};

/// What a warp holds of its keys.
template <typename T, int kHeadDim>
struct KeyGradient {
  static constexpr int kDepth = kHeadDim / 16;

  using Reader = BlockReader<kHeadDim>;

  int lane, warp_key;  // the warp's keys of the tile: [warp_key, warp_key + 16)
  float scale_log2;
  uint32_t k[kDepth][4], v[kDepth][4];
  float dk[1][2 * kDepth][4] = {}, dv[1][2 * kDepth][4] = {};

  __device__ __forceinline__ KeyGradient(int thread, float scale_log2)
      : lane(thread % kWarpSize),
        warp_key(thread / kWarpSize * kWarpKeys),
        scale_log2(scale_log2) {}

  __device__ __forceinline__ void load_keys(const unsigned char* k_tile,
                                            const unsigned char* v_tile) {
    const Reader reader(lane);
#pragma unroll
    for (int c = 0; c < kDepth; ++c) {
      reader.load(k[c], k_tile, warp_key, 16 * c);
      reader.load(v[c], v_tile, warp_key, 16 * c);
    }
  }

  /// Adds rows [row, row + 16) of a stage. Bits 8 j + e of `seen[i]`: does key lane / 4 + 8 i see
  /// row `row` + 8 j + 2 (lane % 4) + e?
  template <bool kMasked>
  __device__ __forceinline__ void add_rows(const KeyGradientMemory<T, kHeadDim>& shared, int stage,
                                           int row, const uint32_t (&seen)[2]) {
    const Reader reader(lane);
    const BlockReader<kHeadDim, BlockOrder::kAlong> row_reader(lane);
    const unsigned char *q = shared.q[stage], *dout = shared.dout[stage];
    // s^T <- k @ q^T, dp^T <- v @ dout^T
    float s[2][4] = {}, dp[2][4] = {};
#pragma unroll
    for (int c = 0; c < kDepth; ++c) {
      uint32_t x[4];
      row_reader.load(x, q, row, 16 * c);
      multiply_add<T>(s[0], k[c], x[0], x[1]);
      multiply_add<T>(s[1], k[c], x[2], x[3]);
      row_reader.load(x, dout, row, 16 * c);
      multiply_add<T>(dp[0], v[c], x[0], x[1]);
      multiply_add<T>(dp[1], v[c], x[2], x[3]);
    }
    // p^T <- exp2(s^T - lse), ds^T <- p^T * (dp^T - delta)
    uint32_t p[4], ds[4];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int pair = row + 8 * j + 2 * (lane % 4);
      const float2 lse = *reinterpret_cast<const float2*>(&shared.lse[stage][pair]);
      const float2 delta = *reinterpret_cast<const float2*>(&shared.delta[stage][pair]);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float x = scale_log2 * s[j][2 * i] - lse.x, y = scale_log2 * s[j][2 * i + 1] - lse.y;
        if (kMasked) {
          x = (seen[i] >> (8 * j) & 1) != 0 ? x : -INFINITY;
          y = (seen[i] >> (8 * j + 1) & 1) != 0 ? y : -INFINITY;
        }
        x = exp2_fast(x), y = exp2_fast(y);
        p[2 * j + i] = pack2<T>(x, y);
        ds[2 * j + i] = pack2<T>(x * (dp[j][2 * i] - delta.x), y * (dp[j][2 * i + 1] - delta.y));
      }
    }
    // dv <- dv + p^T @ dout, dk <- dk + ds^T @ q
#pragma unroll
    for (int c = 0; c < kDepth; ++c) {
      uint32_t x[4];
      reader.load_transposed(x, dout, row, 16 * c);
      multiply_add<T>(dv[0][2 * c], p, x[0], x[1]);
      multiply_add<T>(dv[0][2 * c + 1], p, x[2], x[3]);
    }
#pragma unroll
    for (int c = 0; c < kDepth; ++c) {
      uint32_t x[4];
      reader.load_transposed(x, q, row, 16 * c);
      multiply_add<T>(dk[0][2 * c], ds, x[0], x[1]);
      multiply_add<T>(dk[0][2 * c + 1], ds, x[2], x[3]);
    }
  }

  /// Adds a stage's rows. Of what thread key + 16 h of the warp has taken: bit r says that row
  /// 32 h + r sees the key.
  __device__ __forceinline__ void add_block(const KeyGradientMemory<T, kHeadDim>& shared,
                                            int stage) {
    const int thread = this_thread();
    lane = thread % kWarpSize;  // anew, or addresses would be kept from block to block
    const uint32_t* warp_seen = shared.queue.seen[stage] + (thread - lane);
    if (__all_sync(kAllLanes, warp_seen[lane] == ~0u)) {
#pragma unroll
      for (int row = 0; row < kBlockRows; row += kStepRows) add_rows<false>(shared, stage, row, {});
      return;
    }
#pragma unroll 1
    for (int row = 0; row < kBlockRows; row += kStepRows) {
      const uint32_t* half = warp_seen + row / 32 * kWarpKeys;
      const int shift = row % 32;
      const bool any = (half[lane % kWarpKeys] >> shift & 0xffff) != 0;
      if (!__any_sync(kAllLanes, any)) continue;
      add_rows<true>(
          shared, stage, row,
          {half[lane / 4] >> (shift + lane % 4 * 2), half[lane / 4 + 8] >> (shift + lane % 4 * 2)});
    }
  }
};

/// The key of the tile whose walk is the thread's: two lanes have one each.
__device__ __forceinline__ int own_key(int thread) {
  return thread / kWarpSize * kWarpKeys + thread % kWarpKeys;
}

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kNumThreads, kBlocksPerSm)
    key_gradient_kernel(const __grid_constant__ Problem problem) {
  const auto& x = problem.tensors;
  auto& shared = *reinterpret_cast<KeyGradientMemory<T, kHeadDim>*>(shared_memory());
  while (true) {
    take_item(shared.item, [&] { return take_key_item<T>(problem); });
    if (shared.item.num_keys == 0) return;

    copy_row_pairs_async<kGpuTileKeys, kHeadDim>(
        shared.q[0], shared.dout[0],
        [&, k = shared.item.k, v = shared.item.v, num_keys = shared.item.num_keys](int row) {
          return key_pair(problem, k, v, row, row < num_keys);
        });
    copy_async_commit();

    const int thread = this_thread(), key = own_key(thread);
    const PlanView plan = plan_view_of(x.plan);
    shared.walks[thread] = VisibleWalk(
        key < shared.item.num_keys
            ? rows_of_key(plan, plan.sequences[shared.item.sequence], shared.item.key_segment,
                          shared.item.key_lo + key, problem.group_size)
            : RowsOfKey{});

    copy_async_wait<0>();
    __syncthreads();
    KeyGradient<T, kHeadDim> gradient(this_thread(), x.softmax_scale * kLog2E);
    gradient.load_keys(shared.q[0], shared.dout[0]);
    // for_each_block meets before it copies into what was just read.

    const auto copy = [&](int stage, int position) {
      const KeyItem<T> item = shared.item;
      const auto packed_row = [&](int row) { return item.num_rows - 1 - position - row; };
      copy_row_pairs_async<kBlockRows, kHeadDim>(shared.q[stage], shared.dout[stage], [&](int row) {
        const int packed = packed_row(row);
        return query_pair<kHeadDim>(problem, item.q, item.dout, max(packed, 0), packed >= 0);
      });
      const int thread = this_thread(), row = thread % kBlockRows, packed = packed_row(row);
      const float* from = thread < kBlockRows ? item.lse : item.delta;
      float* to = thread < kBlockRows ? shared.lse[stage] : shared.delta[stage];
      copy_async_4(to + row, from + max(packed, 0), packed >= 0);
    };
    const auto take = [&](VisibleWalk<RowsOfKey>& walk, int position) {
      const int thread = this_thread();
      const uint64_t bits = walk.take(position, kBlockRows);
      // A key past the tile's end sees whatever the warp's others do: what it sums is not written.
      const int num_keys = shared.item.num_keys;
      if (own_key(thread) >= num_keys) {
        return thread / kWarpSize * kWarpKeys < num_keys ? ~0u : 0u;
      }
      return static_cast<uint32_t>(bits >> (thread % kWarpSize / kWarpKeys * 32));
    };
    for_each_block<kBlockRows>(shared.walks, shared.queue, copy, take,
                               [&](int stage) { gradient.add_block(shared, stage); });

    __syncthreads();  // everyone has left the tiles, through which the sums go
    const auto store = [&](unsigned char* tile, const auto& sums, float scale, T* first) {
      const int64_t stride = int64_t{x.num_heads_kv} * kHeadDim;
      const int num_keys = shared.item.num_keys;
      store_rows<T, kHeadDim>(
          tile, this_thread() / kWarpSize * kWarpKeys, sums, scale,
          [&](int key) { return key < num_keys ? first + key * stride : nullptr; });
    };
    store(shared.q[0], gradient.dk, x.softmax_scale, shared.item.dk);
    store(shared.dout[0], gradient.dv, 1.0f, shared.item.dv);
  }
}

}  // namespace pdiff::cuda::attention_backward
