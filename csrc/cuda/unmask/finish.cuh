#pragma once

// finish_rows: from the sums of a row's segments to its confidence and candidate.

#include "common/unmask_rule.h"
#include "cuda/unmask/filter.cuh"

namespace pdiff::cuda::unmasking {

inline constexpr int kFinishWarps = 4;  // of a row without filters

/// What a row's segments add up to.
struct RowScore {
  float max;
  int32_t segment;  // the first one with that maximum
  float other_max;  // of the other segments
  double sum, weighted;
  Draw draw;

  // Neither NaN, nor +inf, nor nothing but -inf.
  __device__ bool is_distribution() const { return max < kInf && sum > 0.0; }
};

struct FinishShared {
  uint32_t argmax, second, num_largest;
};

/// By one warp.
__device__ __forceinline__ RowScore join_segments(const SegmentScore* scores, int32_t segments,
                                                  float scale) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  RowScore row{kLowest, 0, -kInf, 0.0, 0.0, {}};
  for (int32_t i = lane; i < segments; i += kWarpSize) row.max = max_or_nan(row.max, scores[i].max);
  row.max = warp_max_or_nan(row.max);
  uint32_t segment = ~0u;
  for (int32_t i = lane; i < segments; i += kWarpSize) {
    const SegmentScore score = scores[i];
    const double delta = static_cast<double>(score.max - row.max) * scale;
    const double factor = delta > -1000.0 ? exp2(delta) : 0.0;
    row.sum += factor * score.sum;
    if (factor > 0.0) row.weighted += factor * (score.weighted + delta * score.sum);
    row.draw = better(row.draw, score.draw);
    if (score.max == row.max) segment = min(segment, static_cast<uint32_t>(i));
  }
  row.sum = warp_sum(row.sum);
  row.weighted = warp_sum(row.weighted);
  row.draw = warp_best(row.draw);
  row.segment = static_cast<int32_t>(__reduce_min_sync(kAllLanes, segment));
  for (int32_t i = lane; i < segments; i += kWarpSize) {
    if (i != row.segment && scores[i].sum > 0.0f)
      row.other_max = fmaxf(row.other_max, scores[i].max);
  }
  row.other_max = warp_max(row.other_max);
  return row;
}

/// Looks into the segment of the row's maximum for its id and for the second largest logit.
template <typename T>
__device__ __forceinline__ void find_largest(RowReader<T>& reader, const RowScore& score,
                                             FinishShared& shared) {
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int num_warps = static_cast<int>(blockDim.x) / kWarpSize;
  if (threadIdx.x == 0) {
    shared.argmax = ~0u;
    shared.second = ordered_bits(score.other_max);
    shared.num_largest = 0;
  }
  __syncthreads();
  reader.open(score.segment);
  uint32_t argmax = ~0u, num_largest = 0;
  float second = -kInf;
  for (int chunk = warp; chunk < RowReader<T>::kChunks; chunk += num_warps) {
    uint4 x[kSlots];
    reader.load(x, score.segment, chunk);
    reader.ban(x, chunk);
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      float v[kPerVector<T>];
      unpack<T>(x[slot], v);
      const int32_t first_id = score.segment * kSegment + reader.element(chunk, slot);
#pragma unroll
      for (int i = 0; i < kPerVector<T>; ++i) {
        const bool is_largest = v[i] == score.max;
        argmax = is_largest ? min(argmax, static_cast<uint32_t>(first_id + i)) : argmax;
        num_largest += is_largest;
        second = fmaxf(second, is_largest ? -kInf : v[i]);
      }
    }
  }
  argmax = __reduce_min_sync(kAllLanes, argmax);
  num_largest = __reduce_add_sync(kAllLanes, num_largest);
  second = warp_max(second);
  if (threadIdx.x % kWarpSize == 0) {
    atomicMin(&shared.argmax, argmax);
    atomicAdd(&shared.num_largest, num_largest);
    atomicMax(&shared.second, ordered_bits(second));
  }
  __syncthreads();
}

template <typename T, bool kFilters>
__global__ void __launch_bounds__((kFilters ? kFilterWarps : kFinishWarps) * kWarpSize)
    finish_rows_kernel(const __grid_constant__ UnmaskParams p,
                       const __grid_constant__ Workspace workspace, UnmaskConfidence ranked_by) {
  auto& shared = *reinterpret_cast<FinishShared*>(shared_memory());
  auto* filter_shared = reinterpret_cast<FilterShared*>(shared_memory() + 16);
  auto* ban_bits = reinterpret_cast<uint32_t*>(
      kFilters ? reinterpret_cast<unsigned char*>(filter_shared + 1) : shared_memory() + 16);
  static_assert(sizeof(FinishShared) <= 16);

  const int64_t row = blockIdx.x;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int32_t segments = num_segments(p.vocab_size);
  const Settings settings = settings_of(p, row);
  const float scale = settings.scale;
  RowScore score = join_segments(workspace.scores + row * segments, segments, scale);
  const bool is_distribution = score.is_distribution();
  if (!is_distribution) {
    if (threadIdx.x == 0) {
      p.confidence[row] = __int_as_float(0x7fffffff);
      p.candidate[row] = -1;
      p.is_nan[row] = 1;
      p.is_written[row] = 0;
    }
    return;
  }

  RowReader<T> reader(p, row, ban_bits + warp * RowReader<T>::kBanWords);
  float second = -kInf;
  const bool is_filtered = kFilters && settings.filters();
  if (is_filtered || score.draw.id < 0 || ranked_by == UnmaskConfidence::kMargin) {
    find_largest(reader, score, shared);
    second = shared.num_largest > 1 ? score.max : from_ordered_bits(shared.second);
  }
  if constexpr (kFilters) {
    if (is_filtered) {
      RowFilter<T> filter(p, workspace.lane_max + row * segments * kWarpSize, reader, settings,
                          score.max, score.sum, *filter_shared);
      const KeptScore kept = filter.run();
      score.sum = kept.sum;
      score.weighted = kept.weighted;
      score.draw = kept.draw;
      if (kept.num < 2) second = -kInf;
    }
  }
  if (threadIdx.x != 0) return;

  const auto probability = [&](float logit) {
    return exp2(static_cast<double>(logit - score.max) * scale) / score.sum;
  };
  const bool drew = score.draw.id >= 0;  // not where every logit / temperature overflows
  double confidence;
  if (ranked_by == UnmaskConfidence::kEntropy) {
    constexpr double kLn2 = 0.69314718055994530942;
    confidence = kLn2 * (score.weighted / score.sum - log2(score.sum));
  } else if (ranked_by == UnmaskConfidence::kMargin) {
    confidence = probability(score.max) - probability(second);
  } else {
    confidence = probability(drew ? score.draw.logit : score.max);
  }
  p.confidence[row] = static_cast<float>(confidence);
  p.candidate[row] = drew ? score.draw.id : static_cast<int32_t>(shared.argmax);
  p.is_nan[row] = 0;
  p.is_written[row] = 0;
}

}  // namespace pdiff::cuda::unmasking
