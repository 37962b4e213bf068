#pragma once

// select_spans: the num_unmask best rows of each span, by a radix selection of their keys.

#include "common/gumbel.h"
#include "cuda/unmask/filter.cuh"
#include "cuda/unmask/sure_prefix.cuh"

namespace pdiff::cuda::unmasking {

inline constexpr int kSelectWarps = 8, kDigits = 256;

struct SelectShared {
  uint32_t num_keys[kDigits];  // by digit
  uint32_t of_warps[kSelectWarps];
  uint32_t digit, num_left;
  uint32_t num_live;
  unsigned long long best;
};

/// Confidence, or with alg_temp the Gumbel key whose k best are k draws without replacement; as
/// ordered bits, 0 for a row that is never written.
__device__ __forceinline__ uint32_t rank_key(const UnmaskParams& p, int64_t span, int64_t row) {
  const float confidence = p.confidence[row], alg_temp = p.alg_temp[span];
  if (p.is_nan[row] != 0) return 0;
  if (!(alg_temp > 0.0f)) return ordered_bits(confidence);
  const RandomStream stream = random_stream(p, row, span, RandomUse::kPosition);
  return ordered_bits(confidence / alg_temp + gumbel(random_word(stream, 0)));
}

/// Of the threads before this one, and of all: how many say yes.
struct Rank {
  uint32_t before, total;
};

__device__ __forceinline__ Rank block_rank(bool yes, uint32_t* of_warps) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const uint32_t ballot = __ballot_sync(kAllLanes, yes);
  __syncthreads();
  if (lane == 0) of_warps[warp] = __popc(ballot);
  __syncthreads();
  Rank rank{static_cast<uint32_t>(__popc(ballot & ((1u << lane) - 1))), 0};
  for (int i = 0; i < kSelectWarps; ++i) {
    if (i < warp) rank.before += of_warps[i];
    rank.total += of_warps[i];
  }
  return rank;
}

/// kPrefix: whether the rule ends at the first position that is not sure.
template <bool kPrefix>
__global__ void __launch_bounds__(kSelectWarps* kWarpSize)
    select_spans_kernel(const __grid_constant__ UnmaskParams p,
                        const __grid_constant__ Workspace workspace) {
  constexpr int kThreads = kSelectWarps * kWarpSize;
  auto& shared = *reinterpret_cast<SelectShared*>(shared_memory());
  uint32_t* keys = workspace.rank_keys;
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t span = blockIdx.x;
  const int64_t begin = max(int64_t{0}, int64_t{p.cu_rows_span[span]});
  const int64_t end = min(p.num_rows, int64_t{p.cu_rows_span[span + 1]});
  const auto quota = static_cast<uint32_t>(max(p.num_unmask[span], 0));
  if (begin >= end) return;

  if (thread == 0) shared.num_live = 0, shared.best = 0;
  __syncthreads();
  uint32_t num_live = 0;
  unsigned long long best = 0;
  for (int64_t row = begin + thread; row < end; row += kThreads) {  // each thread its own rows
    const uint32_t key = keys[row] = rank_key(p, span, row);
    num_live += key != 0;
    const uint64_t ranked = uint64_t{key} << 32 | ~static_cast<uint32_t>(row - begin);
    best = max(best, static_cast<unsigned long long>(ranked));
  }
  // A maximum of 64 bits is a loop of exchanges: one thread of a warp is enough in it.
  best = warp_reduce(best, [](auto a, auto b) { return max(a, b); });
  num_live = warp_sum(num_live);
  if (thread % kWarpSize == 0) {
    atomicAdd(&shared.num_live, num_live);
    atomicMax(&shared.best, best);
  }
  __syncthreads();
  num_live = shared.num_live;
  uint32_t num = min(quota, num_live);
  if (num == 0) return;
  if constexpr (kPrefix) {
    num = sure_prefix(p, span, begin, end, keys, workspace.sorted, num,
                      *reinterpret_cast<SurePrefixShared*>(shared_memory() + sizeof(SelectShared)));
  }

  // Keys above `lowest` are written, and of those equal to it the first `num_left`.
  uint32_t lowest = 0, num_left = 0;
  if (num < num_live) {
    num_left = num;
    for (int shift = 24; shift >= 0; shift -= 8) {
      for (int i = thread; i < kDigits; i += kThreads) shared.num_keys[i] = 0;
      __syncthreads();
      for (int64_t row = begin + thread; row < end; row += kThreads) {
        const uint32_t key = keys[row];
        const bool is_equal_so_far = shift == 24 || key >> (shift + 8) == lowest >> (shift + 8);
        if (is_equal_so_far && key != 0) atomicAdd(&shared.num_keys[key >> shift & 0xff], 1u);
      }
      __syncthreads();
      // Thread t has digit 255 - t: how many keys have a larger one?
      const uint32_t own = shared.num_keys[kDigits - 1 - thread];
      uint32_t until = own;
#pragma unroll
      for (int distance = 1; distance < kWarpSize; distance *= 2) {
        const uint32_t other = __shfl_up_sync(kAllLanes, until, distance);
        if (thread % kWarpSize >= distance) until += other;
      }
      if (thread % kWarpSize == kWarpSize - 1) shared.of_warps[thread / kWarpSize] = until;
      __syncthreads();
      for (int warp = 0; warp < thread / kWarpSize; ++warp) until += shared.of_warps[warp];
      if (until - own < num_left && num_left <= until) {
        shared.digit = static_cast<uint32_t>(kDigits - 1 - thread);
        shared.num_left = num_left - (until - own);
      }
      __syncthreads();
      lowest |= shared.digit << shift;
      num_left = shared.num_left;
    }
  }

  const uint32_t best_row = ~static_cast<uint32_t>(shared.best);
  const float threshold = p.threshold[span];
  int32_t num_written = 0;
  for (int64_t first = begin; first < end; first += kThreads) {
    const int64_t row = first + thread;
    const uint32_t key = row < end ? keys[row] : 0;
    const Rank tie = block_rank(key != 0 && key == lowest, shared.of_warps);
    bool is_chosen = key > lowest || (key != 0 && key == lowest && tie.before < num_left);
    num_left -= min(num_left, tie.total);
    if (!is_chosen) continue;
    const bool is_best = static_cast<uint32_t>(row - begin) == best_row;
    if (p.rule == UnmaskRule::kThreshold && !is_best && !(p.confidence[row] >= threshold)) continue;
    const int64_t position = p.row_position[row];
    if (position < 0 || position >= p.total_tokens) continue;
    p.token_ids[position] = p.candidate[row];
    p.is_written[row] = 1;
    ++num_written;
  }
  if (p.num_masked == nullptr) return;
  num_written = warp_sum(num_written);
  if (thread % kWarpSize == 0 && num_written > 0) atomicAdd(p.num_masked + span, -num_written);
}

}  // namespace pdiff::cuda::unmasking
