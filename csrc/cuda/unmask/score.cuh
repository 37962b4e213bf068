#pragma once

// score_segments: the one pass over all logits.

#include "cuda/ptx/shared.cuh"
#include "cuda/unmask/sample.cuh"

namespace pdiff::cuda::unmasking {

inline constexpr int kScoreWarps = 4;

/// The largest element of a lane's chunk; NaN if one is.
template <typename T>
__device__ __forceinline__ float chunk_max(const uint4 (&x)[kSlots]) {
  if constexpr (sizeof(T) == 4) {
    float largest = -kInf;
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      float v[kPerVector<T>];
      unpack<T>(x[slot], v);
      largest = max_or_nan(largest, max_or_nan(max_or_nan(v[0], v[1]), max_or_nan(v[2], v[3])));
    }
    return largest;
  } else {
    uint32_t largest = x[0].x;
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      largest = max2_or_nan<T>(largest, max2_or_nan<T>(x[slot].x, x[slot].y));
      largest = max2_or_nan<T>(largest, max2_or_nan<T>(x[slot].z, x[slot].w));
    }
    const float2 pair = unpack2<T>(largest);
    return max_or_nan(pair.x, pair.y);
  }
}

/// Sums over a lane's elements, relative to the largest so far. The maximum is raised once per
/// chunk, not per element. It starts finite, so that max - max is never NaN.
struct LaneScore {
  float max = kLowest, sum = 0.0f, weighted = 0.0f;

  __device__ __forceinline__ void raise_max(float to, float scale) {
    const float delta = shifted(max, to, scale), factor = exp2_fast(delta);
    weighted = factor * fmaf(delta, sum, weighted);
    sum *= factor;
    max = to;
  }
};

__device__ __forceinline__ float warp_max_or_nan(float value) {
  return warp_reduce(value, [](float a, float b) { return max_or_nan(a, b); });
}

/// Each warp takes `segments_per_strip` segments of a row, one after the other.
template <typename T, bool kDraws>
__global__ void __launch_bounds__(kScoreWarps* kWarpSize, kDraws ? 4 : 8)
    score_segments_kernel(const __grid_constant__ UnmaskParams p,
                          const __grid_constant__ Workspace workspace, int32_t segments_per_strip,
                          uint32_t blocks_per_row) {
  using Reader = RowReader<T>;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int64_t row = blockIdx.x / blocks_per_row;
  const auto strip = static_cast<int32_t>(blockIdx.x % blocks_per_row) * kScoreWarps + warp;
  const int32_t segments = num_segments(p.vocab_size);
  const int32_t begin = strip * segments_per_strip;
  const int32_t end = min(begin + segments_per_strip, segments);
  if (begin >= end) return;

  auto* ban_bits = reinterpret_cast<uint32_t*>(shared_memory()) + warp * Reader::kBanWords;
  Reader reader(p, row, ban_bits);
  uint4 next[kSlots];
  reader.load(next, begin, 0);
  const Settings settings = settings_of(p, row);
  Sampler sampler(settings);
  const bool draws = kDraws && settings.draws && !settings.filters();

  for (int32_t segment = begin; segment < end; ++segment) {
    reader.open(segment);
    const auto settle = [&](uint32_t bits, int chunk) {
      sampler.settle(
          bits, [&](int bit) { return segment * kSegment + reader.element_of_bit(chunk, bit); },
          [&](int32_t id) { return reader.logit_in(segment, id); });
    };
    LaneScore score;
#pragma unroll(kDraws ? 1 : 2)
    for (int chunk = 0; chunk < Reader::kChunks; ++chunk) {
      uint4 x[kSlots];
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) x[slot] = next[slot];
      const bool is_last = chunk == Reader::kChunks - 1;
      if (!is_last || segment + 1 < end) {
        reader.load(next, segment + is_last, is_last ? 0 : chunk + 1);
      }
      reader.ban(x, chunk);
      score.raise_max(max_or_nan(score.max, chunk_max<T>(x)), settings.scale);
      uint32_t candidates = 0;  // bit slot * kPerVector + i
      if (draws) {
        sampler.set_max(score.max);
        if (!sampler.has_key()) settle(1, chunk);  // or all of the first chunk would be candidates
      }
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) {
        float v[kPerVector<T>], e[kPerVector<T>];
        unpack<T>(x[slot], v);
#pragma unroll
        for (int i = 0; i < kPerVector<T>; ++i) {
          const float d = shifted(v[i], score.max, settings.scale);
          e[i] = exp2_fast(d);
          score.sum += e[i];
          score.weighted = fmaf(d, e[i], score.weighted);
        }
        if (draws) {
          const int32_t first_id = segment * kSegment + reader.element(chunk, slot);
          candidates |= sampler.candidates(e, first_id) << (slot * kPerVector<T>);
        }
      }
      if (draws) settle(candidates, chunk);
    }

    const int64_t at = row * segments + segment;
    if (workspace.lane_max != nullptr && settings.filters()) {
      workspace.lane_max[at * kWarpSize + lane] = score.max;
    }
    score.raise_max(warp_max_or_nan(score.max), settings.scale);
    SegmentScore whole{score.max, warp_sum(score.sum), warp_sum(score.weighted), {}};
    if (draws) whole.draw = sampler.take();
    if (lane == 0) workspace.scores[at] = whole;
  }
}

}  // namespace pdiff::cuda::unmasking
