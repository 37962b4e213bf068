#pragma once

// Hybrid attention on Hopper: one warpgroup brings tiles to shared memory, two multiply.
//
// A block takes tiles of 128 packed rows (a token with all heads of a group is group_size rows)
// until none is left. The first warp of the producer warpgroup walks a tile's runs of keys, asks
// the copy engine for q, k and v, and tells the consumers with each key tile where they are: which
// tile, and which of its columns each row sees. Its second warp follows, and clears rows of v that
// are not in the run: a row's weight for such a key is 0, but 0 * NaN is not. A consumer warpgroup
// has 64 rows. While its tensor cores add p @ v of one key tile, it works on the scores of the
// next:
//
//   s <- q @ k^T
//   m' <- max(m, row_max(s))
//   p <- exp2((s - m') c)
//   l <- l exp2((m - m') c) + row_sum(p)
//   out <- out exp2((m - m') c) + p @ v           c = softmax_scale * log2(e)
//
// Where a tile has few rows and many keys, blocks take parts of its keys, and the last one to be
// done mixes what they have left. Such plans have a kernel of their own (kParts): in the others'
// loop, that code would keep descriptors of products out of uniform registers.

#include <cuda_runtime.h>

#include <climits>

#include "common/tile_walk.h"
#include "cuda/common/warp.cuh"
#include "cuda/hybrid_attention/sm90a/panels.cuh"
#include "cuda/ptx/math.cuh"
#include "cuda/ptx/tensor_copy.cuh"
#include "cuda/ptx/warpgroup.cuh"

namespace pdiff::cuda::sm90a {

struct Params {
  const int32_t* plan;    // words, on the device
  uint32_t* ticket;       // 0 before the launch
  void* out;              // [total_q, num_heads_q, head_dim]
  float* lse;             // [num_heads_q, total_q]; may be null
  uint32_t* arrivals;     // [num_slots, num_heads_kv], zero: parts done, at a tile's first slot
  float* partial_out;     // [num_slots, num_heads_kv, kFewRows, head_dim]
  float2* partial_state;  // [num_slots, num_heads_kv, kFewRows]: m, l
  float score_scale;      // softmax_scale * log2(e), positive
  int32_t rows_per_box;   // of q: as many tokens as fill a tile, times group_size
};

inline constexpr int kRows = kGpuTileRows, kKeys = 128, kBoxKeys = 64, kStages = 2;
inline constexpr int kPanelBytes = 128 * 128;  // of 128 rows or keys
inline constexpr int kNumThreads = 384, kNumConsumerWarps = 8, kLimitSlots = 4;
inline constexpr int32_t kSeesAll = 1 << 30;  // of a row that is none: it must not cost a mask

/// What the consumers need to know of a key tile. A column is a key's place in the tile; column x
/// is key x + offset of its run, and token i sees the first limits[limit_slot][i] keys of the run.
struct KeyTileMessage {
  int32_t tile, kv_head;  // tile -1: there is no more
  int32_t offset;         // negative where the tile starts before its run
  int32_t limit_slot;
  bool has_keys, is_first, is_last, starts_run;
};

template <int kHeadDim>
struct Shared {
  static constexpr int kPanels = kHeadDim / 64;

  alignas(1024) unsigned char q[2][kPanels][kPanelBytes];
  unsigned char k[kStages][kPanels][kPanelBytes];
  unsigned char v[kStages][kPanels][kPanelBytes];
  KeyTileMessage message[kStages];
  int2 v_columns[kStages];  // those that hold keys of the run
  int32_t segments[kRows];  // of the walked tile's tokens
  int32_t limits[kLimitSlots][kRows];
  CopyBarrier q_full[2], q_empty[2], k_full[kStages], k_empty[kStages];
  CopyBarrier v_landed[kStages], v_full[kStages], v_empty[kStages], limits_empty[kLimitSlots];
};

/// The keys of a tile that are a part's, run by run. Parts are cut by tiles of kGpuTileKeys keys,
/// so that a row's are the same however rows and pages lie.
class PartWalk {
 public:
  __device__ PartWalk(const SegmentsView& view, const PlanTile& tile)
      : view_(view),
        tile_(tile),
        num_to_skip_(tile.part * kPartKeyTiles),
        num_left_(tile.num_parts > 1 ? kPartKeyTiles : INT_MAX) {}

  /// Goes to the next keys, of which a run's first ones may be another part's; false past the last.
  __device__ bool next(KeyRun* run, KeyInterval* keys) {
    while (num_left_ > 0 && next_run(view_, tile_.segment, tile_.row_hi, next_key_, run)) {
      next_key_ = run->key_lo + 1;
      const int32_t num = (run->key_hi - run->key_lo + kGpuTileKeys - 1) / kGpuTileKeys;
      if (num_to_skip_ >= num) {
        num_to_skip_ -= num;
        continue;
      }
      const int32_t num_taken = min(num - num_to_skip_, num_left_);
      const int32_t lo = run->key_lo + num_to_skip_ * kGpuTileKeys;
      *keys = {lo, min(lo + num_taken * kGpuTileKeys, run->key_hi)};
      num_to_skip_ = 0;
      num_left_ -= num_taken;
      return true;
    }
    return false;
  }

 private:
  const SegmentsView& view_;
  const PlanTile& tile_;
  int32_t next_key_ = 0, num_to_skip_, num_left_;
};

/// The warp that walks tiles and their keys.
template <typename T, int kHeadDim, bool kPaged>
__device__ __forceinline__ void produce(const Params& params, const TensorMap& q_map,
                                        const TensorMap& k_map, const TensorMap& v_map,
                                        Shared<kHeadDim>& shared) {
  constexpr int kPanels = Shared<kHeadDim>::kPanels;
  const PlanView plan = plan_view_of(params.plan);
  const int group_size = plan.header.num_heads_q / plan.header.num_heads_kv;
  const int num_items = plan.header.num_tiles * plan.header.num_heads_kv;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const bool leads = lane == 0;
  RingPlace<2> q_slot;
  RingPlace<kStages> k_slot, v_slot;
  RingPlace<kLimitSlots> limit_slot;

  // Only the lane that goes on alone waits: another one could miss the phase.
  const auto post = [&](const KeyTileMessage& message) {
    shared.k_empty[k_slot.slot()].wait(k_slot.phase() + 1);
    shared.message[k_slot.slot()] = message;
  };

  if (leads) {
    for (const TensorMap* map : {&q_map, &k_map, &v_map}) prefetch_tensor_map(*map);
  }
  int next_item = 0;
  for (int item = static_cast<int>(blockIdx.x); item < num_items;
       item = __shfl_sync(kAllLanes, next_item, 0)) {
    // Long before it is needed: the answer takes its time.
    if (leads) next_item = static_cast<int>(gridDim.x + atomicAdd(params.ticket, 1u));
    const int tile_idx = item / plan.header.num_heads_kv, kv_head = item % plan.header.num_heads_kv;
    const PlanTile tile = plan.tiles[tile_idx];
    const PlanSequence sequence = plan.sequences[tile.sequence];
    const SegmentsView view = segments_of(plan, sequence);
    const int num_tokens = tile.row_hi - tile.row_lo;
    for (int token = lane; token < num_tokens; token += kWarpSize) {
      shared.segments[token] = segment_of_row(view, tile.segment, tile.row_lo + token);
    }

    if (leads) {
      shared.q_empty[q_slot.slot()].wait(q_slot.phase() + 1);
      CopyBarrier& full = shared.q_full[q_slot.slot()];
      full.arrive_and_expect(kPanels * params.rows_per_box * 128);
#pragma unroll
      for (int panel = 0; panel < kPanels; ++panel) {
        copy_box(shared.q[q_slot.slot()][panel], q_map, full, 64 * panel, kv_head * group_size,
                 sequence.row_begin + tile.row_lo);
      }
    }
    q_slot.next();

    // 64 keys to rows [64 half, 64 half + 64) of a tile's panels
    const auto copy_keys = [&](unsigned char (&panels)[kPanels][kPanelBytes], const TensorMap& map,
                               CopyBarrier& full, int half, int key) {
      int token = sequence.key_begin + key;
      if (kPaged) {
        const int page_size = plan.header.page_size;
        token = plan.pages[sequence.page_begin + key / page_size] * page_size + key % page_size;
      }
#pragma unroll
      for (int panel = 0; panel < kPanels; ++panel) {
        copy_box(panels[panel] + half * (kPanelBytes / 2), map, full, 64 * panel, kv_head, token);
      }
    };

    PartWalk walk(view, tile);
    KeyRun run{}, following{};
    KeyInterval keys{}, following_keys{};
    bool has_keys = walk.next(&run, &keys);
    bool is_first = true;
    if (!has_keys) {
      if (leads) {
        post({tile_idx, kv_head, 0, 0, false, true, true, false});
        shared.k_full[k_slot.slot()].arrive();
      }
      k_slot.next();
    }
    while (has_keys) {
      shared.limits_empty[limit_slot.slot()].wait(limit_slot.phase() + 1);
      for (int token = lane; token <= (kRows - 1) / group_size; token += kWarpSize) {
        shared.limits[limit_slot.slot()][token] =
            token < num_tokens
                ? min(visible_to_row(view, shared.segments[token], tile.row_lo + token, run) -
                          (keys.lo - run.key_lo),
                      keys.hi - keys.lo)
                : kSeesAll;
      }
      __syncwarp();
      const bool has_following = walk.next(&following, &following_keys);
      // Boxes of pages start where 64 keys of a page do.
      const int start = kPaged ? keys.lo / kBoxKeys * kBoxKeys : keys.lo;
      for (int key = start; key < keys.hi; key += kKeys) {
        const bool is_last = !has_following && key + kKeys >= keys.hi;
        const int num_halves = key + kBoxKeys < keys.hi ? 2 : 1;
        const int num_bytes = num_halves * kPanels * (kPanelBytes / 2);
        if (leads) {
          post({tile_idx, kv_head, key - keys.lo, limit_slot.slot(), true, is_first, is_last,
                key == start});
          CopyBarrier& full = shared.k_full[k_slot.slot()];
          full.arrive_and_expect(num_bytes);
          for (int half = 0; half < num_halves; ++half) {
            copy_keys(shared.k[k_slot.slot()], k_map, full, half, key + half * kBoxKeys);
          }
          shared.v_empty[v_slot.slot()].wait(v_slot.phase() + 1);
          shared.v_columns[v_slot.slot()] = {max(keys.lo - key, 0), min(keys.hi - key, kKeys)};
          CopyBarrier& landed = shared.v_landed[v_slot.slot()];
          landed.arrive_and_expect(num_bytes);
          for (int half = 0; half < num_halves; ++half) {
            copy_keys(shared.v[v_slot.slot()], v_map, landed, half, key + half * kBoxKeys);
          }
        }
        is_first = false;
        k_slot.next();
        v_slot.next();
      }
      limit_slot.next();
      run = following, keys = following_keys;
      has_keys = has_following;
    }
  }
  if (leads) {
    post({-1, 0, 0, 0, false, false, false, false});
    shared.k_full[k_slot.slot()].arrive();
    shared.v_empty[v_slot.slot()].wait(v_slot.phase() + 1);
    shared.v_columns[v_slot.slot()] = {-1, -1};
    shared.v_landed[v_slot.slot()].arrive();
  }
}

/// The warp that clears rows of v tiles that are not in the run.
template <int kHeadDim>
__device__ __forceinline__ void clear_values(Shared<kHeadDim>& shared) {
  constexpr int kPieces = 128 / 16;  // of a row
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const uint4 zero = make_uint4(0, 0, 0, 0);
  for (RingPlace<kStages> slot;; slot.next()) {
    shared.v_landed[slot.slot()].wait(slot.phase());
    const int2 columns = shared.v_columns[slot.slot()];
    if (columns.x < 0) return;
    if (columns.x > 0 || columns.y < kKeys) {
      for (auto& panel : shared.v[slot.slot()]) {
        uint4* const pieces = reinterpret_cast<uint4*>(panel);
        for (int i = lane; i < columns.x * kPieces; i += kWarpSize) pieces[i] = zero;
        for (int i = columns.y * kPieces + lane; i < kKeys * kPieces; i += kWarpSize) {
          pieces[i] = zero;
        }
      }
      fence_async_copies();
    }
    __syncwarp();
    if (lane == 0) shared.v_full[slot.slot()].arrive();
  }
}

/// Leaves a part's rows g and g + 8 of a tile that has no others; the warp of the last part to come
/// gets the mixture of all, in their order, in place of its own. True if that is this one.
template <int kHeadDim>
__device__ __forceinline__ bool mix_parts(const Params& params, const PlanTile& tile, int kv_head,
                                          int num_heads_kv, float (&out)[kHeadDim / 2],
                                          float (&m)[2], float (&l)[2]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, g = lane / 4, t = lane % 4;
  const int64_t first_slot = int64_t{tile.slot_begin} * num_heads_kv + kv_head;
  const auto row_of = [&](int part, int i) {
    return (first_slot + int64_t{part} * num_heads_kv) * kFewRows + g + 8 * i;
  };
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t row = row_of(tile.part, i);
    if (t == 0) params.partial_state[row] = {m[i], l[i]};
    float* const to = params.partial_out + row * kHeadDim + 2 * t;
#pragma unroll
    for (int j = 0; j < kHeadDim / 8; ++j) {
      *reinterpret_cast<float2*>(to + 8 * j) = {out[4 * j + 2 * i], out[4 * j + 2 * i + 1]};
    }
  }
  __syncwarp();  // the part is left: one lane tells, and hears of the others
  uint32_t num_before = 0;
  if (lane == 0) {
    __threadfence();
    num_before = atomicAdd(params.arrivals + first_slot, 1u);
    __threadfence();
  }
  if (__shfl_sync(kAllLanes, num_before, 0) + 1 != static_cast<uint32_t>(tile.num_parts)) {
    return false;
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    m[i] = -INFINITY, l[i] = 0.0f;
    float2 mixture[kHeadDim / 8] = {};
#pragma unroll 2
    for (int part = 0; part < tile.num_parts; ++part) {
      const int64_t row = row_of(part, i);
      const float2 state = params.partial_state[row];
      const float peak = fmaxf(m[i], state.x);
      const bool sees_none = peak == -INFINITY;
      const float old_share = sees_none ? 0.0f : exp2_fast((m[i] - peak) * params.score_scale);
      const float share = sees_none ? 0.0f : exp2_fast((state.x - peak) * params.score_scale);
      m[i] = peak, l[i] = l[i] * old_share + state.y * share;
      const float* const from = params.partial_out + row * kHeadDim + 2 * t;
#pragma unroll
      for (int j = 0; j < kHeadDim / 8; ++j) {
        const float2 x = *reinterpret_cast<const float2*>(from + 8 * j);
        mixture[j] = {mixture[j].x * old_share + x.x * share,
                      mixture[j].y * old_share + x.y * share};
      }
    }
#pragma unroll
    for (int j = 0; j < kHeadDim / 8; ++j) {
      out[4 * j + 2 * i] = mixture[j].x, out[4 * j + 2 * i + 1] = mixture[j].y;
    }
  }
  return true;
}

/// A consumer warpgroup: 64 of the tile's rows. A thread has columns 8j + 2t and 8j + 2t + 1 of
/// rows g and g + 8 of its warp's 16.
template <typename T, int kHeadDim, bool kPaged, bool kParts>
__device__ __forceinline__ void consume(const Params& params, Shared<kHeadDim>& shared) {
  constexpr int kSteps = kHeadDim / 16;
  const PlanHeader plan = *reinterpret_cast<const PlanHeader*>(params.plan);
  const int group_size = plan.num_heads_q / plan.num_heads_kv;
  const int thread = static_cast<int>(threadIdx.x) - 128;
  // From one lane: so the compiler sees that descriptors are the same in all of them.
  const int warp = __shfl_sync(kAllLanes, thread / kWarpSize, 0), warpgroup = warp / 4;
  const int lane = thread % kWarpSize, t = lane % 4;
  const int first_row = warp * 16 + lane / 4;
  const int token[2] = {first_row / group_size, (first_row + 8) / group_size};
  const bool leads = lane == 0;
  RingPlace<2> q_slot;
  RingPlace<kStages> k_slot, v_slot;
  float out[kHeadDim / 2], s[kKeys / 2];
  uint32_t p[kKeys / 4];
  float m[2], l[2];
  int32_t limit[2] = {0, 0};

  const auto multiply_by_keys = [&] {  // s <- q @ k^T
    const uint64_t q = describe_panels(shared.q[q_slot.slot()][0] + warpgroup * (kPanelBytes / 2));
    const uint64_t k = describe_panels(shared.k[k_slot.slot()][0]);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      multiply_panels<T, kKeys>(s, column_step<kPanelBytes>(q, step),
                                column_step<kPanelBytes>(k, step), step > 0);
    }
    products_commit();
  };
  const auto multiply_by_values = [&] {  // out <- out + p @ v
    const uint64_t v = describe_panels(shared.v[v_slot.slot()][0], kPanelBytes);
#pragma unroll
    for (int step = 0; step < kKeys / 16; ++step) {
      multiply_fragment<T, kHeadDim>(
          out, {p[4 * step], p[4 * step + 1], p[4 * step + 2], p[4 * step + 3]}, row_step(v, step),
          true);
    }
    products_commit();
  };
  const auto release = [&](CopyBarrier& barrier) {
    if (leads) barrier.arrive();
  };

  for (;;) {
    shared.k_full[k_slot.slot()].wait(k_slot.phase());
    KeyTileMessage message = shared.message[k_slot.slot()];
    if (message.tile < 0) return;
    const int tile_idx = message.tile, kv_head = message.kv_head;
    shared.q_full[q_slot.slot()].wait(q_slot.phase());
#pragma unroll
    for (float& x : out) x = 0.0f;
    m[0] = m[1] = -INFINITY;
    l[0] = l[1] = 0.0f;
    float rescale[2];

    // Hides what is not seen, then m, l, s <- p; rescale is what out has to be multiplied by.
    const auto softmax = [&] {
      if (message.starts_run) {
#pragma unroll
        for (int i = 0; i < 2; ++i) limit[i] = shared.limits[message.limit_slot][token[i]];
        __syncwarp();
        release(shared.limits_empty[message.limit_slot]);
      }
      // Columns are counted from the thread's first one, so that those of the scores are constants.
      const int low = -message.offset - 2 * t, high[2] = {limit[0] + low, limit[1] + low};
      const bool sees_all =
          (!kPaged || message.offset >= 0) && min(limit[0], limit[1]) - message.offset >= kKeys;
      if (!__all_sync(kAllLanes, sees_all)) {
#pragma unroll
        for (int i = 0; i < kKeys / 2; ++i) {
          const int column = i / 4 * 8 + i % 2;
          if ((kPaged && column < low) || column >= high[i % 4 / 2]) s[i] = -INFINITY;
        }
      }
      float scaled_max[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float peak = m[i];
#pragma unroll
        for (int j = 0; j < kKeys / 2; j += 4) {
          peak = fmaxf(peak, fmaxf(s[j + 2 * i], s[j + 2 * i + 1]));
        }
        peak = fmaxf(peak, __shfl_xor_sync(kAllLanes, peak, 1));
        peak = fmaxf(peak, __shfl_xor_sync(kAllLanes, peak, 2));
        // A row that has seen no key yet: -inf - -inf would be NaN. Where the maximum stays, the
        // factor is 1 to the bit, so what a row does not see leaves no trace.
        scaled_max[i] = peak == -INFINITY ? 0.0f : peak * params.score_scale;
        rescale[i] = peak == -INFINITY ? 1.0f : exp2_fast((m[i] - peak) * params.score_scale);
        l[i] *= rescale[i];
        m[i] = peak;
      }
#pragma unroll
      for (int i = 0; i < kKeys / 2; ++i) {
        const int row = i % 4 / 2;
        s[i] = exp2_fast(s[i] * params.score_scale - scaled_max[row]);
        l[row] += s[i];
      }
    };
    const auto round_weights = [&] {
#pragma unroll
      for (int i = 0; i < kKeys / 4; ++i) p[i] = pack2<T>(s[2 * i], s[2 * i + 1]);
    };

    bool is_last = message.is_last;
    if (message.has_keys) {
      products_begin();
      multiply_by_keys();
      products_wait<0>();
      settle(s);
      release(shared.k_empty[k_slot.slot()]);
      softmax();
      round_weights();
    } else {
      __syncwarp();  // everyone has read the message
      release(shared.k_empty[k_slot.slot()]);
    }
    const bool has_keys = message.has_keys;
    k_slot.next();

    while (!is_last) {
      shared.k_full[k_slot.slot()].wait(k_slot.phase());
      message = shared.message[k_slot.slot()];
      is_last = message.is_last;
      products_begin();
      multiply_by_keys();
      shared.v_full[v_slot.slot()].wait(v_slot.phase());
      products_begin();
      multiply_by_values();
      products_wait<1>();
      settle(s);
      release(shared.k_empty[k_slot.slot()]);
      softmax();
      work_before_wait(shared.v_full[v_slot.slot()], v_slot.phase());
      products_wait<0>();
      settle(out);
      release(shared.v_empty[v_slot.slot()]);
#pragma unroll
      for (int i = 0; i < kHeadDim / 2; ++i) out[i] *= rescale[i % 4 / 2];
      round_weights();
      k_slot.next();
      v_slot.next();
    }
    release(shared.q_empty[q_slot.slot()]);
    q_slot.next();
    if (has_keys) {
      shared.v_full[v_slot.slot()].wait(v_slot.phase());
      products_begin();
      multiply_by_values();
      products_wait<0>();
      settle(out);
      release(shared.v_empty[v_slot.slot()]);
      v_slot.next();
    }

    const PlanView view = plan_view_of(params.plan);
    const PlanTile tile = view.tiles[tile_idx];
    const int first_token = view.sequences[tile.sequence].row_begin + tile.row_lo;
    const int num_rows = (tile.row_hi - tile.row_lo) * group_size;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      l[i] += __shfl_xor_sync(kAllLanes, l[i], 1);
      l[i] += __shfl_xor_sync(kAllLanes, l[i], 2);
    }
    if (kParts && tile.num_parts > 1) {
      if (warp > 0 || !mix_parts<kHeadDim>(params, tile, kv_head, plan.num_heads_kv, out, m, l)) {
        continue;
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float inverse = l[i] == 0.0f ? 0.0f : 1.0f / l[i];
      const int row = first_row + 8 * i;
      const bool is_row = row < num_rows;
      const int64_t row_token = first_token + token[i];
      const int head = kv_head * group_size + row - token[i] * group_size;
      T* const to =
          static_cast<T*>(params.out) + (row_token * plan.num_heads_q + head) * int64_t{kHeadDim};
      store_row<T, kHeadDim>(to, out, i, inverse, is_row);
      if (is_row && t == 0 && params.lse != nullptr) {
        constexpr float kLn2 = 0.693147181f;
        params.lse[int64_t{head} * plan.total_q + row_token] =
            l[i] == 0.0f ? -INFINITY : kLn2 * (m[i] * params.score_scale + log2_fast(l[i]));
      }
    }
  }
}

template <typename T, int kHeadDim, bool kPaged, bool kParts>
__global__ void __launch_bounds__(kNumThreads, 1)
    forward_kernel(const Params params, const __grid_constant__ TensorMap q_map,
                   const __grid_constant__ TensorMap k_map,
                   const __grid_constant__ TensorMap v_map) {
  using Shares = RegisterShares<96, 200>;
  auto& shared = *reinterpret_cast<Shared<kHeadDim>*>(shared_memory());
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    for (int i = 0; i < 2; ++i) {
      shared.q_full[i].init(1);
      shared.q_empty[i].init(kNumConsumerWarps);
    }
    for (int i = 0; i < kStages; ++i) {
      shared.k_full[i].init(1);
      shared.k_empty[i].init(kNumConsumerWarps);
      shared.v_landed[i].init(1);
      shared.v_full[i].init(1);
      shared.v_empty[i].init(kNumConsumerWarps);
    }
    for (CopyBarrier& barrier : shared.limits_empty) barrier.init(kNumConsumerWarps);
    fence_barriers();
  }
  __syncthreads();
  if (thread < 128) {
    lower_registers<Shares::kOfProducer>();
    if (thread < 32) {
      produce<T, kHeadDim, kPaged>(params, q_map, k_map, v_map, shared);
    } else if (thread < 64) {
      clear_values(shared);
    }
  } else {
    raise_registers<Shares::kOfConsumer>();
    consume<T, kHeadDim, kPaged, kParts>(params, shared);
  }
}

}  // namespace pdiff::cuda::sm90a
