#pragma once

// The softmax of rows whose scores come a few columns at a time, in fragments of products.

#include <cstdint>

#include "cuda/common/warp.cuh"
#include "cuda/hybrid_attention/config.h"
#include "cuda/ptx/math.cuh"

namespace pdiff::cuda::attention {

/// Of the rows of kBlocks blocks of 16: a lane has rows g and g + 8 of each.
template <int kBlocks>
struct RowStates {
  float max[kBlocks][2];  // times scale
  float sum[kBlocks][2];  // of the weights 2^(s * scale - max); of this lane's columns alone

  __device__ __forceinline__ RowStates() {
#pragma unroll
    for (int m = 0; m < kBlocks; ++m) {
      max[m][0] = max[m][1] = kNoMaximum;
      sum[m][0] = sum[m][1] = 0.0f;
    }
  }
};

/// Puts -inf in the place of scores that the row does not see: columns from visible(m, h) on, for
/// rows h * 8 + g of block m.
template <int kBlocks, int kColumns, typename Visible>
__device__ __forceinline__ void mask_scores(float (&s)[kBlocks][kColumns / 8][4], int lane,
                                            const Visible& visible) {
#pragma unroll
  for (int m = 0; m < kBlocks; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int32_t end = visible(m, h) - lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float& x = s[m][n][2 * h + j];
          x = n * 8 + j < end ? x : -INFINITY;
        }
      }
    }
  }
}

/// Turns scores into weights and adds them to the rows' sums. True if some row's maximum has grown:
/// what the rows have gathered so far must be multiplied by `factor`.
template <int kBlocks, int kColumns>
__device__ __forceinline__ bool weigh_scores(float (&s)[kBlocks][kColumns / 8][4],
                                             RowStates<kBlocks>& rows, float scale,
                                             float (&factor)[kBlocks][2]) {
  bool grows = false;
#pragma unroll
  for (int m = 0; m < kBlocks; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      // max <- max over the row of s * scale, where it is far above what it was
      float largest = fmaxf(s[m][0][2 * h], s[m][0][2 * h + 1]);
#pragma unroll
      for (int n = 1; n < kColumns / 8; ++n) {
        largest = fmaxf(largest, fmaxf(s[m][n][2 * h], s[m][n][2 * h + 1]));
      }
      largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 2)) * scale;
      const bool row_grows = largest > rows.max[m][h] + kMaxGrowth;
      const float max = row_grows ? largest : rows.max[m][h];
      factor[m][h] = exp2_fast(rows.max[m][h] - max);  // 1 where it did not grow
      rows.max[m][h] = max;
      grows |= row_grows;

      // w <- 2^(s * scale - max), sum <- sum * factor + w
      float sum = rows.sum[m][h] * factor[m][h];
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float& x = s[m][n][2 * h + j];
          x = exp2_fast(__fmaf_rn(x, scale, -max));
          sum += x;
        }
      }
      rows.sum[m][h] = sum;
    }
  }
  return __any_sync(kAllLanes, grows);
}

/// o <- factor * o
template <int kBlocks, int kTiles>
__device__ __forceinline__ void scale_rows(float (&o)[kBlocks][kTiles][4],
                                           const float (&factor)[kBlocks][2]) {
#pragma unroll
  for (int m = 0; m < kBlocks; ++m) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) o[m][n][i] *= factor[m][i / 2];
    }
  }
}

/// The sum over the four lanes that share a row.
__device__ __forceinline__ float row_sum(float sum) {
  sum += __shfl_xor_sync(kAllLanes, sum, 1);
  return sum + __shfl_xor_sync(kAllLanes, sum, 2);
}

/// What the output is multiplied by at the end: 0 for a row that sees no key.
__device__ __forceinline__ float inverse_sum(float sum) {
  return sum == 0.0f ? 0.0f : __fdividef(1.0f, sum);
}

/// ln of the sum of e^score.
__device__ __forceinline__ float log_sum(float max, float sum) {
  constexpr float kLn2 = 0.693147180559945309f;
  return sum == 0.0f ? -INFINITY : (max + log2_fast(sum)) * kLn2;
}

}  // namespace pdiff::cuda::attention
