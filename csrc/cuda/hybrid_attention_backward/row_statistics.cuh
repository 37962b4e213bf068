#pragma once

// delta <- sum(dout * out) - dlse for every row, and lse as the other kernels want it.
//
// A row that sees no key gets lse = +inf, so that all its weights are 0.

#include <cmath>
#include <cstdint>

#include "cuda/common/warp.cuh"
#include "cuda/hybrid_attention_backward/config.h"
#include "cuda/ptx/math.cuh"
#include "cuda/ptx/memory.cuh"

namespace pdiff::cuda::attention_backward {

inline constexpr int kStatisticsThreads = 256;

/// Rows are shared out among as many lanes as they have pieces of 16 bytes.
template <int kHeadDim>
inline constexpr int kRowLanes = kHeadDim / 8;

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kStatisticsThreads)
    row_statistics_kernel(const __grid_constant__ Problem problem) {
  const auto& x = problem.tensors;
  const int lane = static_cast<int>(threadIdx.x) % kRowLanes<kHeadDim>;
  const int64_t thread = int64_t{blockIdx.x} * kStatisticsThreads + threadIdx.x;
  const int64_t row = thread / kRowLanes<kHeadDim>, num_rows = int64_t{x.total_q} * x.num_heads_q;
  const bool valid = row < num_rows;

  float sum = 0.0f;
  if (valid) {
    const int64_t piece = row * kHeadDim + lane * 8;
    const uint4 out = load_once(static_cast<const T*>(x.out) + piece);
    const uint4 dout = load_once(static_cast<const T*>(x.dout) + piece);
    const auto add = [&](uint32_t a, uint32_t b) {
      const float2 u = unpack2<T>(a), w = unpack2<T>(b);
      sum += u.x * w.x + u.y * w.y;
    };
    add(out.x, dout.x), add(out.y, dout.y), add(out.z, dout.z), add(out.w, dout.w);
  }
#pragma unroll
  for (int distance = kRowLanes<kHeadDim> / 2; distance > 0; distance /= 2) {
    sum += __shfl_xor_sync(kAllLanes, sum, distance);
  }
  if (!valid || lane != 0) return;

  const int64_t token = row / x.num_heads_q;
  const int64_t head = row - token * x.num_heads_q;
  const int64_t kv_head = problem.by_group.divide(static_cast<int>(head));
  const float lse = x.lse[head * x.total_q + token];
  const float dlse = x.dlse == nullptr ? 0.0f : x.dlse[head * x.total_q + token];
  const int64_t packed =
      (kv_head * x.total_q + token) * problem.group_size + head - kv_head * problem.group_size;
  const bool sees_keys = lse > -INFINITY;
  problem.row_lse[packed] = sees_keys ? lse * kLog2E : INFINITY;
  problem.row_delta[packed] = sees_keys ? sum - dlse : 0.0f;
}

}  // namespace pdiff::cuda::attention_backward
