#pragma once

// The backward of hybrid attention on Hopper, once by keys (dk, dv) and once by rows (dq).
//
// A block keeps a tile of 128 owners, keys with their values or packed rows with their gradients,
// and goes through the positions that its owners see, 64 at a time. With a, b for the first tensor
// of each and a', b' for the second:
//
//            owners a, a'   positions b, b'
//   by keys  k, v           q, dout            s^T and dp^T: rows are keys, columns packed rows
//   by rows  q, dout        k, v               s and dp: rows are packed rows, columns keys
//
//   s <- a @ b^T,  dp <- a' @ b'^T,  p <- exp2(s c - lse),  ds <- p * (dp - delta)
//   sum <- sum + ds @ b  (dk or dq),  sum' <- sum' + p @ b'  (dv)
//
// The producer warpgroup walks what the owners see, a thread per key or token, tells which columns
// of the next positions each of them sees, and asks the copy engine for these. The two consumer
// warpgroups have 64 owners each. Nothing is summed between blocks.

#include <cuda_runtime.h>

#include "common/visible_walk.h"
#include "cuda/common/divider.h"
#include "cuda/common/warp.cuh"
#include "cuda/hybrid_attention/sm90a/panels.cuh"
#include "cuda/ptx/math.cuh"
#include "cuda/ptx/tensor_copy.cuh"
#include "cuda/ptx/warpgroup.cuh"

namespace pdiff::cuda::sm90a {

struct BackwardParams {
  const int32_t* plan;  // words, on the device
  int32_t* ticket;      // 0 before the launch
  const float* lse;     // [num_heads_kv, total_q, group_size], in units of log2; +inf: no key seen
  const float* delta;   // as lse: sum(dout * out) - dlse
  void* sum[2];         // by keys: dk, dv; by rows: dq
  float score_scale;    // softmax_scale * log2(e)
  float softmax_scale;
  Divider group;  // by group_size
  int32_t group_size;
  int32_t tokens_per_box;      // of positions that are packed rows
  int32_t rows_per_owner_box;  // by keys: 128; by rows: a tile's tokens * group_size
};

/// The boxes have 128 owners, or as many packed rows as a plan's tile; 64 positions, or as many
/// packed rows as whole tokens make up.
struct BackwardMaps {
  TensorMap owners[2], positions[2];
};

inline constexpr int kBackwardThreads = 384;
inline constexpr int kOwners = 128, kPositions = 64, kBackwardStages = 2;
inline constexpr int kOwnerPanelBytes = kOwners * 128, kPositionPanelBytes = kPositions * 128;

/// A block's tile.
struct OwnerTile {
  int32_t tile, kv_head;  // tile -1: there is no more
  int32_t first, num;  // of all keys, or packed rows of the group: owners are [first, first + num)
};

/// What the producer works on: thread 0 finds it, all of its threads read it.
struct BackwardWork {
  int32_t tile, kv_head;            // tile -1: there is no more
  int32_t first_owner, num_owners;  // keys or tokens of the sequence
  int32_t first_segment;            // that may hold them
  PlanSequence sequence;
  int32_t num_positions;    // of the sequence: tokens
  int64_t first_statistic;  // of the sequence's first packed row
};

/// What the consumers need to know of 64 positions.
struct PositionsMessage {
  bool has_positions, is_last;
};

template <int kHeadDim>
struct BackwardShared {
  static constexpr int kPanels = kHeadDim / 64;

  alignas(1024) unsigned char owners[2][2][kPanels][kOwnerPanelBytes];  // [slot][which]
  unsigned char positions[kBackwardStages][2][kPanels][kPositionPanelBytes];
  uint64_t seen[kBackwardStages][kOwners];  // columns that a key or a token sees
  float lse[kBackwardStages][kPositions], delta[kBackwardStages][kPositions];  // by keys
  OwnerTile tile[2];
  BackwardWork work;
  PositionsMessage message[kBackwardStages];
  int32_t first_of_warp[2][4];
  int32_t num_landed;
  CopyBarrier owners_full[2], owners_empty[2];
  CopyBarrier full[kBackwardStages], empty[kBackwardStages], landed;
};

/// Bits of tokens to bits of their packed rows; the last columns, of no token, follow the others.
__device__ __forceinline__ uint64_t spread_over_groups(uint64_t tokens, int num_tokens,
                                                       int group_size) {
  if (group_size == 1 || tokens == 0) return tokens;
  if (tokens == bits_between(0, num_tokens)) return ~uint64_t{0};
  uint64_t columns = 0;
#pragma unroll 1
  for (int token = 0; token < num_tokens; ++token) {
    const int column = token * group_size;
    if ((tokens >> token & 1) != 0) columns |= bits_between(column, column + group_size);
  }
  return columns;
}

/// `item` or, if that is none of its own, a later one: the plan's key tiles are taken two at a
/// time, and a tile whose keys the forward shares out is listed once per part. One thread.
template <bool kByKeys>
__device__ __forceinline__ int next_item(const BackwardParams& params, int item) {
  const PlanHeader& header = *reinterpret_cast<const PlanHeader*>(params.plan);
  const int num_items = (kByKeys ? header.num_key_tiles : header.num_tiles) * header.num_heads_kv;
  const int32_t* const tiles = params.plan + (kByKeys ? header.key_tiles : header.tiles);
#pragma unroll 1
  while (item < num_items) {
    const int tile = item / header.num_heads_kv;
    const bool is_own =
        kByKeys ? reinterpret_cast<const PlanKeyTile*>(tiles)[tile].key_lo % kOwners == 0
                : reinterpret_cast<const PlanTile*>(tiles)[tile].part == 0;
    if (is_own) break;
    item = static_cast<int>(gridDim.x) + atomicAdd(params.ticket, 1);
  }
  return item;
}

/// Finds the work of an item. One thread.
template <bool kByKeys>
__device__ __forceinline__ void find_work(const BackwardParams& params, int item,
                                          BackwardWork& work) {
  const PlanView plan = plan_view_of(params.plan);
  const int num_heads_kv = plan.header.num_heads_kv;
  const int num_tiles = kByKeys ? plan.header.num_key_tiles : plan.header.num_tiles;
  if (item >= num_tiles * num_heads_kv) {
    work.tile = -1;
    return;
  }
  work.tile = item / num_heads_kv;
  work.kv_head = item % num_heads_kv;
  if constexpr (kByKeys) {
    const PlanKeyTile& tile = plan.key_tiles[work.tile];
    work.sequence = plan.sequences[tile.sequence];
    work.first_owner = tile.key_lo;
    work.num_owners = min(work.sequence.num_keys - tile.key_lo, kOwners);
    work.first_segment = tile.key_segment;
    work.num_positions = work.sequence.num_rows;
  } else {
    const PlanTile& tile = plan.tiles[work.tile];
    work.sequence = plan.sequences[tile.sequence];
    work.first_owner = tile.row_lo;
    work.num_owners = tile.row_hi - tile.row_lo;
    work.first_segment = tile.segment;
    work.num_positions = work.sequence.num_keys;
  }
  const int64_t row =
      static_cast<int64_t>(work.kv_head) * plan.header.total_q + work.sequence.row_begin;
  work.first_statistic = row * params.group_size;
}

/// The producer warpgroup.
template <typename T, int kHeadDim, bool kByKeys>
__device__ __forceinline__ void produce_positions(const BackwardParams& params,
                                                  const BackwardMaps& maps,
                                                  BackwardShared<kHeadDim>& shared) {
  constexpr int kPanels = kHeadDim / 64, kThreads = 128, kBarrier = 1;
  const int thread = static_cast<int>(threadIdx.x);
  const bool leads = thread == 0;
  const BackwardWork& work = shared.work;
  // Positions are walked in keys, or in tokens whose heads fit.
  const int stride = kByKeys ? params.tokens_per_box : kPositions;
  RingPlace<2> owner_slot;
  RingPlace<kBackwardStages> stage;

  if (leads) {
    for (const TensorMap& map : maps.owners) prefetch_tensor_map(map);
    for (const TensorMap& map : maps.positions) prefetch_tensor_map(map);
    const int item = next_item<kByKeys>(params, static_cast<int>(blockIdx.x));
    find_work<kByKeys>(params, item, shared.work);
  }
  for (;;) {
    barrier_wait(kBarrier, kThreads);
    if (work.tile < 0) break;
    int ticket = 0;  // long before it is needed: the answer takes its time
    if (leads) ticket = static_cast<int>(gridDim.x) + atomicAdd(params.ticket, 1);
    const bool owns = thread < work.num_owners;
    const auto seen_by_owner = [&] {
      const PlanView plan = plan_view_of(params.plan);
      const int owner = work.first_owner + thread;
      if constexpr (kByKeys) {
        return owns ? rows_of_key(plan, work.sequence, work.first_segment, owner, 1) : RowsOfKey{};
      } else {
        const SegmentsView view = segments_of(plan, work.sequence);
        return owns ? keys_of_row(view, work.first_segment, owner) : KeysOfRow{};
      }
    };
    VisibleWalk walk(seen_by_owner());
    // Only the thread that goes on alone waits: another one could miss the phase.
    if (leads) {
      shared.owners_empty[owner_slot.slot()].wait(owner_slot.phase() + 1);
      CopyBarrier& barrier = shared.owners_full[owner_slot.slot()];
      const int begin = kByKeys ? work.sequence.key_begin : work.sequence.row_begin;
      shared.tile[owner_slot.slot()] = {work.tile, work.kv_head, begin + work.first_owner,
                                        work.num_owners * (kByKeys ? 1 : params.group_size)};
      barrier.arrive_and_expect(2 * kPanels * params.rows_per_owner_box * 128);
#pragma unroll 1
      for (int i = 0; i < 2 * kPanels; ++i) {
        const int which = i / kPanels, panel = i % kPanels;
        copy_box(shared.owners[owner_slot.slot()][which][panel], maps.owners[which], barrier,
                 64 * panel, kByKeys ? work.kv_head : work.kv_head * params.group_size,
                 begin + work.first_owner);
      }
    }
    owner_slot.next();

    // Where the earliest owner goes on; all threads meet.
    const auto meet = [&](int slot, int position) {
      const uint32_t first =
          __reduce_min_sync(kAllLanes, static_cast<uint32_t>(walk.next_from(position)));
      if (thread % kWarpSize == 0)
        shared.first_of_warp[slot][thread / kWarpSize] = static_cast<int32_t>(first);
      barrier_wait(kBarrier, kThreads);
      const int32_t* of_warp = shared.first_of_warp[slot];
      return min(min(of_warp[0], of_warp[1]), min(of_warp[2], of_warp[3]));
    };
    int position = meet(stage.slot(), 0);
    if (position == kNowhere) {  // owners that nobody sees, or that see nothing
      if (leads) {
        shared.empty[stage.slot()].wait(stage.phase() + 1);
        shared.message[stage.slot()] = {false, true};
        shared.full[stage.slot()].arrive();
      }
      stage.next();
    }
    while (position != kNowhere) {
      uint64_t bits = walk.take(position, stride);
      // The block of positions as a range in ascending order that lies within the sequence: what it
      // holds of positions walked before counts as not seen.
      int first = kByKeys ? work.num_positions - position - stride : position;
      if constexpr (kByKeys) bits = __brevll(bits) >> (64 - stride);
      const int astray = kByKeys ? -first : first + stride - work.num_positions;
      if (astray > 0 && kByKeys) first = 0, bits >>= astray;
      if (astray > 0 && !kByKeys) {
        const int shift = min(astray, first);
        first -= shift, bits <<= shift;
      }
      if constexpr (kByKeys) bits = spread_over_groups(bits, stride, params.group_size);
      // By keys half of the threads bring lse of a column, the others delta.
      const int column = thread % kPositions;
      const bool has_column = kByKeys && column < stride * params.group_size;
      float statistic = thread < kPositions ? INFINITY : 0.0f;
      if (has_column && first + params.group.divide(column) < work.num_positions) {
        const int64_t row =
            work.first_statistic + static_cast<int64_t>(first) * params.group_size + column;
        statistic = (thread < kPositions ? params.lse : params.delta)[row];
      }
      shared.empty[stage.slot()].wait(stage.phase() + 1);
      shared.seen[stage.slot()][thread] = owns ? bits : ~uint64_t{0};
      if (has_column) {
        (thread < kPositions ? shared.lse : shared.delta)[stage.slot()][column] = statistic;
      }
      const int next = meet((stage.count + 1) % 2, position + stride);
      const bool is_short = work.num_positions < stride;
      const auto start_copies = [&](CopyBarrier& barrier) {
        barrier.arrive_and_expect(2 * kPanels *
                                  (kByKeys ? stride * params.group_size : kPositions) * 128);
#pragma unroll 1
        for (int i = 0; i < 2 * kPanels; ++i) {
          const int which = i / kPanels, panel = i % kPanels;
          copy_box(shared.positions[stage.slot()][which][panel], maps.positions[which], barrier,
                   64 * panel, kByKeys ? work.kv_head * params.group_size : work.kv_head,
                   first + (kByKeys ? work.sequence.row_begin : work.sequence.key_begin));
        }
      };
      if (leads) shared.message[stage.slot()] = {true, next == kNowhere};
      if (!is_short) {
        if (leads) start_copies(shared.full[stage.slot()]);
      } else {
        // Of a sequence so short that the box reaches into the next one: what it brings of that is
        // cleared, for 0 * NaN is NaN.
        if (leads) start_copies(shared.landed);
        shared.landed.wait(shared.num_landed);
        const int end = work.num_positions * (kByKeys ? params.group_size : 1);
        for (int i = end * 8 + thread; i < kPositions * 8; i += kThreads) {
          for (auto& tensor : shared.positions[stage.slot()]) {
            for (auto& panel : tensor) reinterpret_cast<uint4*>(panel)[i] = make_uint4(0, 0, 0, 0);
          }
        }
        fence_async_copies();
        barrier_wait(kBarrier, kThreads);
        if (leads) {
          ++shared.num_landed;
          shared.full[stage.slot()].arrive();
        }
      }
      stage.next();
      position = next;
    }
    barrier_wait(kBarrier, kThreads);  // nobody reads the work any more
    if (leads) find_work<kByKeys>(params, next_item<kByKeys>(params, ticket), shared.work);
  }
  if (leads) {
    shared.owners_empty[owner_slot.slot()].wait(owner_slot.phase() + 1);
    shared.tile[owner_slot.slot()] = {-1, 0, 0, 0};
    shared.owners_full[owner_slot.slot()].arrive();
  }
}

/// A consumer warpgroup: 64 of the owners.
template <typename T, int kHeadDim, bool kByKeys>
__device__ __forceinline__ void sum_gradients(const BackwardParams& params,
                                              BackwardShared<kHeadDim>& shared) {
  constexpr int kDepthSteps = kHeadDim / 16, kPositionSteps = kPositions / 16;
  const PlanHeader& plan = *reinterpret_cast<const PlanHeader*>(params.plan);
  const int thread = static_cast<int>(threadIdx.x) - 128;
  // From one lane: so the compiler sees that descriptors are the same in all of them.
  const int warpgroup = __shfl_sync(kAllLanes, thread / 128, 0);
  const int lane = thread % kWarpSize, t = lane % 4;
  const int first_row = thread / kWarpSize * 16 + lane / 4;
  const bool leads = lane == 0;
  RingPlace<2> owner_slot;
  RingPlace<kBackwardStages> stage;
  float sum[kHeadDim / 2], sum_of_values[kByKeys ? kHeadDim / 2 : 1];
  float s[kPositions / 2], beside[kPositions / 2];
  uint32_t fragments[kPositions / 4];  // of p, then of ds
  // By keys there are two sums and no registers for both products: dp takes the place of s, and
  // rounded weights are all there is of p.
  float (&dp)[kPositions / 2] = kByKeys ? s : beside;

  // x <- owners @ positions^T
  const auto multiply = [&](float (&x)[kPositions / 2], int which) {
    const uint64_t a = describe_panels(shared.owners[owner_slot.slot()][which][0] +
                                       warpgroup * (kOwnerPanelBytes / 2));
    const uint64_t b = describe_panels(shared.positions[stage.slot()][which][0]);
#pragma unroll
    for (int step = 0; step < kDepthSteps; ++step) {
      multiply_panels<T, kPositions>(x, column_step<kOwnerPanelBytes>(a, step),
                                     column_step<kPositionPanelBytes>(b, step), step > 0);
    }
    products_commit();
  };
  // x <- x + fragments @ positions
  const auto add = [&](float (&x)[kHeadDim / 2], const uint32_t (&fragments)[kPositions / 4],
                       int which) {
    const uint64_t b =
        describe_panels(shared.positions[stage.slot()][which][0], kPositionPanelBytes);
#pragma unroll
    for (int step = 0; step < kPositionSteps; ++step) {
      multiply_fragment<T, kHeadDim>(x,
                                     {fragments[4 * step], fragments[4 * step + 1],
                                      fragments[4 * step + 2], fragments[4 * step + 3]},
                                     row_step(b, step), true);
    }
    products_commit();
  };

  for (;; owner_slot.next()) {
    shared.owners_full[owner_slot.slot()].wait(owner_slot.phase());
    if (shared.tile[owner_slot.slot()].tile < 0) return;
#pragma unroll
    for (float& x : sum) x = 0.0f;
#pragma unroll
    for (float& x : sum_of_values) x = 0.0f;
    // Of rows g and g + 8: where their packed row's statistics lie, whose columns they see.
    float row_lse[2], row_delta[2];
    int owner[2];
    if constexpr (!kByKeys) {
      const OwnerTile tile = shared.tile[owner_slot.slot()];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = first_row + 8 * i;
        owner[i] = min(params.group.divide(row), kOwners - 1);
        const int64_t packed =
            (static_cast<int64_t>(tile.kv_head) * plan.total_q + tile.first) * params.group_size +
            row;
        row_lse[i] = row < tile.num ? params.lse[packed] : INFINITY;
        row_delta[i] = row < tile.num ? params.delta[packed] : 0.0f;
      }
    }

    bool is_first = true, is_last = false;
    RingPlace<kBackwardStages> before = stage;  // whose products may be under way
    while (!is_last) {
      shared.full[stage.slot()].wait(stage.phase());
      const PositionsMessage message = shared.message[stage.slot()];
      is_last = message.is_last;
      if (!message.has_positions) {
        __syncwarp();  // everyone has read the message
        if (leads) shared.empty[stage.slot()].arrive();
        stage.next();
        break;
      }
      products_begin();
      multiply(s, 0);
      if constexpr (!kByKeys) multiply(dp, 1);
      if (!is_first) {
        products_wait<kByKeys ? 1 : 2>();
        if (leads) shared.empty[before.slot()].arrive();
      }
      is_first = false;
      products_wait<kByKeys ? 0 : 1>();
      settle(s);
      const uint64_t seen[2] = {shared.seen[stage.slot()][kByKeys ? first_row : owner[0]],
                                shared.seen[stage.slot()][kByKeys ? first_row + 8 : owner[1]]};
      const bool sees_all = __all_sync(kAllLanes, (seen[0] & seen[1]) == ~uint64_t{0});
      if (!sees_all) {
        const uint64_t mine[2] = {seen[0] >> 2 * t, seen[1] >> 2 * t};
#pragma unroll
        for (int i = 0; i < kPositions / 2; ++i) {
          const int column = i / 4 * 8 + i % 2;
          if ((mine[i % 4 / 2] >> column & 1) == 0) s[i] = -INFINITY;
        }
      }
#pragma unroll
      for (int i = 0; i < kPositions / 2; i += 2) {
        float2 lse{row_lse[i % 4 / 2], row_lse[i % 4 / 2]};
        if constexpr (kByKeys) {
          lse = *reinterpret_cast<const float2*>(&shared.lse[stage.slot()][i / 4 * 8 + 2 * t]);
        }
        const float2 p{exp2_fast(s[i] * params.score_scale - lse.x),
                       exp2_fast(s[i + 1] * params.score_scale - lse.y)};
        if constexpr (kByKeys) {
          fragments[i / 2] = pack2<T>(p.x, p.y);
        } else {
          s[i] = p.x, s[i + 1] = p.y;
        }
      }
      const auto weights = [&](int i) {
        return kByKeys ? unpack2<T>(fragments[i / 2]) : float2{s[i], s[i + 1]};
      };
      if constexpr (kByKeys) {
        products_begin();
        multiply(dp, 1);
        add(sum_of_values, fragments, 1);
      }
      if constexpr (!kByKeys) work_before_wait(shared.full[stage.slot()], stage.phase());
      products_wait<0>();
      settle(dp);
#pragma unroll
      for (int i = 0; i < kPositions / 2; i += 2) {
        float2 delta{row_delta[i % 4 / 2], row_delta[i % 4 / 2]};
        if constexpr (kByKeys) {
          delta = *reinterpret_cast<const float2*>(&shared.delta[stage.slot()][i / 4 * 8 + 2 * t]);
        }
        dp[i] -= delta.x, dp[i + 1] -= delta.y;
      }
      if (!sees_all) {  // what is not seen has weight 0, and a value that may be NaN
#pragma unroll
        for (int i = 0; i < kPositions / 2; i += 2) {
          const float2 p = weights(i);
          if (p.x == 0.0f) dp[i] = 0.0f;
          if (p.y == 0.0f) dp[i + 1] = 0.0f;
        }
      }
#pragma unroll
      for (int i = 0; i < kPositions / 2; i += 2) {
        const float2 p = weights(i);
        fragments[i / 2] = pack2<T>(p.x * dp[i], p.y * dp[i + 1]);
      }
      products_begin();
      add(sum, fragments, 0);
      before = stage;
      stage.next();
    }
    products_wait<0>();
    settle(sum);
    settle(sum_of_values);
    const OwnerTile tile = shared.tile[owner_slot.slot()];
    __syncwarp();
    if (leads) {
      if (!is_first) shared.empty[before.slot()].arrive();
      shared.owners_empty[owner_slot.slot()].arrive();
    }

#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = first_row + 8 * i;
      int64_t at;
      if constexpr (kByKeys) {
        at = (static_cast<int64_t>(tile.first) + row) * plan.num_heads_kv + tile.kv_head;
      } else {
        const int token = params.group.divide(row);
        at = (static_cast<int64_t>(tile.first) + token) * plan.num_heads_q +
             tile.kv_head * params.group_size + row - token * params.group_size;
      }
      store_row<T, kHeadDim>(static_cast<T*>(params.sum[0]) + at * kHeadDim, sum, i,
                             params.softmax_scale, row < tile.num);
      if constexpr (kByKeys) {
        store_row<T, kHeadDim>(static_cast<T*>(params.sum[1]) + at * kHeadDim, sum_of_values, i,
                               1.0f, row < tile.num);
      }
    }
  }
}

template <typename T, int kHeadDim, bool kByKeys>
__global__ void __launch_bounds__(kBackwardThreads, 1)
    backward_kernel(const BackwardParams params, const __grid_constant__ BackwardMaps maps) {
  using Shares = RegisterShares<88, 208>;
  auto& shared = *reinterpret_cast<BackwardShared<kHeadDim>*>(shared_memory());
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    constexpr int kNumConsumerWarps = 8;
    for (int i = 0; i < 2; ++i) {
      shared.owners_full[i].init(1);
      shared.owners_empty[i].init(kNumConsumerWarps);
    }
    for (int i = 0; i < kBackwardStages; ++i) {
      shared.full[i].init(1);
      shared.empty[i].init(kNumConsumerWarps);
    }
    shared.landed.init(1);
    shared.num_landed = 0;
    fence_barriers();
  }
  // Columns that no box brings have weight 0: their lse is +inf, their rows must not be NaN.
  for (int stage = 0; stage < kBackwardStages; ++stage) {
    if (thread < kPositions) shared.lse[stage][thread] = INFINITY, shared.delta[stage][thread] = 0;
  }
  for (int i = thread; i < static_cast<int>(sizeof(shared.positions)) / 16; i += kBackwardThreads) {
    reinterpret_cast<uint4*>(shared.positions)[i] = make_uint4(0, 0, 0, 0);
  }
  fence_async_copies();
  __syncthreads();
  if (thread < 128) {
    lower_registers<Shares::kOfProducer>();
    produce_positions<T, kHeadDim, kByKeys>(params, maps, shared);
  } else {
    raise_registers<Shares::kOfConsumer>();
    sum_gradients<T, kHeadDim, kByKeys>(params, shared);
  }
}

}  // namespace pdiff::cuda::sm90a
