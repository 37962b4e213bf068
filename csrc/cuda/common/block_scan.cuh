#pragma once

// Sums over the items before each item, by one block.

#include <cstdint>

#include "cuda/common/warp.cuh"

namespace pdiff::cuda {

template <typename T, int kNum>
struct Counts {
  T of[kNum];

  __device__ Counts& operator+=(const Counts& other) {
#pragma unroll
    for (int i = 0; i < kNum; ++i) of[i] += other.of[i];
    return *this;
  }
};

template <typename T>
__device__ __forceinline__ T warp_inclusive_sum(T value) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
#pragma unroll
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const T before = __shfl_up_sync(kAllLanes, value, distance);
    if (lane >= distance) value += before;
  }
  return value;
}

/// Replaces each thread's counts by the sums over the threads before it; returns the totals.
template <typename T, int kNum>
__device__ __forceinline__ Counts<T, kNum> block_scan(Counts<T, kNum>& mine,
                                                      void* scratch) {  // [kWarpSize] counts
  auto* of_warps = static_cast<Counts<T, kNum>*>(scratch);
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarpSize, warp = thread / kWarpSize;
  const int num_warps = static_cast<int>(blockDim.x) / kWarpSize;
  Counts<T, kNum> through = mine, total;
#pragma unroll
  for (int i = 0; i < kNum; ++i) through.of[i] = warp_inclusive_sum(mine.of[i]);
  __syncthreads();  // the scratch is free
  if (lane == kWarpSize - 1) of_warps[warp] = through;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kNum; ++i) {
    const T of_warp = warp_inclusive_sum(lane < num_warps ? of_warps[lane].of[i] : T{0});
    const T before = __shfl_sync(kAllLanes, of_warp, warp > 0 ? warp - 1 : 0);
    total.of[i] = __shfl_sync(kAllLanes, of_warp, kWarpSize - 1);
    mine.of[i] = through.of[i] - mine.of[i] + (warp > 0 ? before : T{0});
  }
  return total;
}

/// Calls place(i, sums of count over the items before i) for each of num_items; returns the sums
/// over all of them. When it returns, everything has its place.
template <typename Count, typename Place>
__device__ __forceinline__ auto place_items(int32_t num_items, void* scratch, const Count& count,
                                            const Place& place) {
  const int32_t thread = static_cast<int32_t>(threadIdx.x);
  const int32_t num_threads = static_cast<int32_t>(blockDim.x);
  const int32_t per_thread = (num_items + num_threads - 1) / num_threads;
  const int32_t begin = min(num_items, thread * per_thread);
  const int32_t end = min(num_items, begin + per_thread);
  decltype(count(0)) before{};
  for (int32_t i = begin; i < end; ++i) before += count(i);
  const auto total = block_scan(before, scratch);
  for (int32_t i = begin; i < end; ++i) {
    place(i, before);
    before += count(i);
  }
  __syncthreads();
  return total;
}

}  // namespace pdiff::cuda
