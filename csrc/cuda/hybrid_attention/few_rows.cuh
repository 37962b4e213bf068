#pragma once

// A tile of up to 16 rows, bound by reading its keys. Of every key tile each warp takes a quarter,
// which it copies for itself: no warp waits for another before the end, when their results are
// mixed. Parts of a tile whose keys are shared out are mixed by the block that comes last. Both
// happen in a fixed order.

#include <climits>
#include <cstdint>

#include "cuda/common/shared_tile.cuh"
#include "cuda/common/vector.cuh"
#include "cuda/hybrid_attention/keys.cuh"
#include "cuda/hybrid_attention/shared.cuh"
#include "cuda/hybrid_attention/softmax.cuh"
#include "cuda/ptx/compiler.cuh"

namespace pdiff::cuda::attention {

/// One element of a row's output over several sets of keys, each with its own maximum:
/// out = sum of 2^(max_i - max) * out_i, and so the sum of weights.
struct Mixture {
  float max = kNoMaximum, sum = 0.0f, out = 0.0f;

  template <int kNum>
  __device__ __forceinline__ void add(const float2 (&states)[kNum], const float (&outs)[kNum]) {
    float largest = max;
#pragma unroll
    for (int i = 0; i < kNum; ++i) largest = fmaxf(largest, states[i].x);
    const float before = exp2_fast(max - largest);
    max = largest, sum *= before, out *= before;
#pragma unroll
    for (int i = 0; i < kNum; ++i) {
      const float factor = exp2_fast(states[i].x - max);
      sum = __fmaf_rn(factor, states[i].y, sum);
      out = __fmaf_rn(factor, outs[i], out);
    }
  }
};

template <typename T, int kHeadDim, bool kPaged>
class FewRows {
 public:
  __device__ __forceinline__ FewRows(const ForwardParams& params, Shared<kHeadDim>& shared,
                                     int thread)
      : params_(params),
        shared_(shared),
        thread_(thread),
        lane_(thread % kWarpSize),
        warp_(thread / kWarpSize) {}

  /// Attends to the part's keys, and leaves the warp's results in shared memory.
  __device__ __forceinline__ void run() {
    const PlanTile& tile = shared_.walk.tile;
    const int32_t num_tiles = tile.num_parts > 1 ? kPartKeyTiles : INT_MAX;
    Walk reading{{}, num_tiles, false};
    reading.has_keys =
        first_keys(shared_.walk, &reading.cursor) &&
        (tile.part == 0 || advance_keys(shared_.walk, &reading.cursor, tile.part * kPartKeyTiles));
    Walk at = reading;
#pragma unroll
    for (int step = 0; step < kNumSteps - 1; ++step) copy_step(reading, step);
    load_queries();
    for (int step = 0; at.has_keys; step = next_step(step)) {
      copy_async_wait<kNumSteps - 2>();
      __syncwarp();  // the step is there, and the one before is no longer read
      copy_step(reading, step == 0 ? kNumSteps - 1 : step - 1);
      if (at.cursor.key == at.cursor.run.key_lo || !knows_run_) enter_run(at.cursor.run);
      if (num_keys(at.cursor) > 0) attend(shared_.few.steps[warp_][step], at.cursor.offset());
      next(at);
    }
    copy_async_wait<0>();
    __syncthreads();  // everyone's steps make room for the results
    leave_results();
    __syncthreads();
  }

  /// Mixes the results of the warps, and of the parts if this one is the last to come.
  __device__ __forceinline__ void write() {
    const TileRows rows = shared_.rows;
    const PlanTile& tile = shared_.walk.tile;
    const int thread = opaque(thread_);
    if (tile.num_parts == 1) {
      for (int i = thread; i < rows.num_rows * kHeadDim; i += kNumThreads) {
        write_element(rows, i, mixture_of_warps(i));
      }
      return;
    }
    const int64_t first_slot = int64_t{tile.slot_begin} * params_.num_heads_kv + rows.kv_head;
    const int64_t slot = first_slot + int64_t{tile.part} * params_.num_heads_kv;
    for (int i = thread; i < rows.num_rows * kHeadDim; i += kNumThreads) {
      const Mixture mixture = mixture_of_warps(i);
      params_.partial_out[slot * (kFewRows * kHeadDim) + i] = mixture.out;
      if (i % kHeadDim == 0) {
        float* state = params_.partial_state + (slot * kFewRows + i / kHeadDim) * 2;
        state[0] = mixture.max, state[1] = mixture.sum;
      }
    }
    __syncthreads();  // the part is written: one thread tells, and hears of the others
    if (thread_ == 0) {
      __threadfence();
      const uint32_t num_before = atomicAdd(params_.arrivals + first_slot, 1u);
      __threadfence();
      shared_.is_last_part = num_before + 1 == static_cast<uint32_t>(tile.num_parts);
    }
    __syncthreads();
    if (!shared_.is_last_part) return;
    for (int i = thread; i < rows.num_rows * kHeadDim; i += kNumThreads) {
      write_element(rows, i, mixture_of_parts(first_slot, tile.num_parts, i));
    }
  }

 private:
  using Step = typename FewRowsTiles<kHeadDim>::Step;
  static constexpr int kPartsAtOnce = 8;

  /// Where the warp is among the part's key tiles.
  struct Walk {
    KeyCursor cursor;
    int32_t num_left;
    bool has_keys;
  };

  __device__ __forceinline__ static int next_step(int step) {
    return step + 1 == kNumSteps ? 0 : step + 1;
  }

  __device__ __forceinline__ void next(Walk& walk) const {
    walk.has_keys = --walk.num_left > 0 && advance_keys(shared_.walk, &walk.cursor);
  }

  /// Keys of the tile that are the warp's.
  __device__ __forceinline__ int32_t num_keys(const KeyCursor& cursor) const {
    return min(kStepKeys, max(cursor.run.key_hi - cursor.key - warp_ * kStepKeys, 0));
  }

  /// Starts to copy the keys at hand, if there are any, and goes to the next ones.
  __device__ __forceinline__ void copy_step(Walk& walk, int step) {
    if (walk.has_keys) {
      const int32_t num = num_keys(walk.cursor);
      const int32_t key = walk.cursor.key + (num > 0 ? warp_ * kStepKeys : 0);
      Step& to = shared_.few.steps[warp_][step];
      copy_keys_async<kPaged, kStepKeys, kHeadDim, kWarpSize>(
          to.k, to.v, opaque(lane_), params_, shared_.keys,
          key_rows<kPaged, kStepKeys>(params_, shared_.keys, key, num));
      next(walk);
    }
    copy_async_commit();
  }

  /// Fragments straight from global memory: every warp has the same few rows.
  __device__ __forceinline__ void load_queries() {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const RowPlace place = place_of(params_, shared_.rows, h * 8 + lane_ / 4);
      const unsigned char* q = query_at(params_, place, kHeadDim) + lane_ % 4 * 4;
#pragma unroll
      for (int i = 0; i < kHeadDim / 8; ++i) {
        q_[i / 2][i % 2 * 2 + h] = *reinterpret_cast<const uint32_t*>(q + i * 16);
      }
    }
  }

  __device__ __forceinline__ void enter_run(const KeyRun& run) {
    knows_run_ = true;
    const int32_t visible = visible_to(params_, shared_, lane_ % kFewRows, run);
#pragma unroll
    for (int h = 0; h < 2; ++h) visible_[h] = __shfl_sync(kAllLanes, visible, h * 8 + lane_ / 4);
  }

  __device__ __forceinline__ void attend(const Step& step, int32_t offset) {
    // s <- q @ k^T
    float s[1][kStepKeys / 8][4] = {};
    const BlockReader<kHeadDim, BlockOrder::kAlong> key_reader(lane_);
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; ++k) {
      uint32_t b[4];
      key_reader.load(b, step.k, 0, k * 16);
      multiply_add<T>(s[0][0], q_[k], b[0], b[1]);
      multiply_add<T>(s[0][1], q_[k], b[2], b[3]);
    }
    const int32_t first = offset + warp_ * kStepKeys;
    mask_scores<1, kStepKeys>(s, lane_, [&](int, int h) { return visible_[h] - first; });

    // s <- weights; o <- o * factor
    float factor[1][2];
    if (weigh_scores<1, kStepKeys>(s, states_, params_.scale, factor)) scale_rows(o_, factor);

    // o <- o + weights @ v, the weights rounded to T
    const uint32_t a[4] = {pack2<T>(s[0][0][0], s[0][0][1]), pack2<T>(s[0][0][2], s[0][0][3]),
                           pack2<T>(s[0][1][0], s[0][1][1]), pack2<T>(s[0][1][2], s[0][1][3])};
    const BlockReader<kHeadDim> value_reader(lane_);
#pragma unroll
    for (int n = 0; n < kHeadDim / 16; ++n) {
      uint32_t b[4];
      value_reader.load_transposed(b, step.v, 0, n * 16);
      multiply_add<T>(o_[0][2 * n], a, b[0], b[1]);
      multiply_add<T>(o_[0][2 * n + 1], a, b[2], b[3]);
    }
  }

  __device__ __forceinline__ void leave_results() {
    auto& results = shared_.few.results;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = h * 8 + lane_ / 4;
      const float sum = row_sum(states_.sum[0][h]);
      if (lane_ % 4 == 0) results.state[warp_][row] = {states_.max[0][h], sum};
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
        *reinterpret_cast<float2*>(&results.out[warp_][row][n * 8 + lane_ % 4 * 2]) = {
            o_[0][n][2 * h], o_[0][n][2 * h + 1]};
      }
    }
  }

  /// Of element i % kHeadDim of row i / kHeadDim.
  __device__ __forceinline__ Mixture mixture_of_warps(int i) const {
    const auto& results = shared_.few.results;
    const int row = i / kHeadDim, column = i % kHeadDim;
    float2 states[kNumWarps];
    float outs[kNumWarps];
#pragma unroll
    for (int w = 0; w < kNumWarps; ++w) {
      states[w] = results.state[w][row];
      outs[w] = results.out[w][row][column];
    }
    Mixture mixture;
    mixture.add(states, outs);
    return mixture;
  }

  __device__ __forceinline__ Mixture mixture_of_parts(int64_t first_slot, int32_t num_parts,
                                                      int i) const {
    Mixture mixture;
    for (int32_t first = 0; first < num_parts; first += kPartsAtOnce) {
      float2 states[kPartsAtOnce];
      float outs[kPartsAtOnce];
#pragma unroll
      for (int p = 0; p < kPartsAtOnce; ++p) {
        const bool is_part = first + p < num_parts;
        const int64_t slot = first_slot + int64_t{is_part ? first + p : 0} * params_.num_heads_kv;
        const float* state = params_.partial_state + (slot * kFewRows + i / kHeadDim) * 2;
        states[p] = {is_part ? state[0] : kNoMaximum, is_part ? state[1] : 0.0f};
        outs[p] = is_part ? params_.partial_out[slot * (kFewRows * kHeadDim) + i] : 0.0f;
      }
      mixture.add(states, outs);
    }
    return mixture;
  }

  __device__ __forceinline__ void write_element(const TileRows& rows, int i,
                                                const Mixture& mixture) const {
    const RowPlace place = place_of(params_, rows, i / kHeadDim);
    const int column = i % kHeadDim;
    static_cast<T*>(params_.out)[out_offset(params_, place, kHeadDim) + column] =
        from_float<T>(mixture.out * inverse_sum(mixture.sum));
    if (column == 0 && params_.lse != nullptr) {
      params_.lse[lse_offset(params_, place)] = log_sum(mixture.max, mixture.sum);
    }
  }

  const ForwardParams& params_;
  Shared<kHeadDim>& shared_;
  const int thread_, lane_, warp_;
  uint32_t q_[kHeadDim / 16][4];
  float o_[1][kHeadDim / 8][4] = {};
  RowStates<1> states_;
  int32_t visible_[2] = {};  // of the run, to rows g and g + 8
  bool knows_run_ = false;   // a part may begin in the middle of one
};

}  // namespace pdiff::cuda::attention
