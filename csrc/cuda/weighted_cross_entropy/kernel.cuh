#pragma once

// Each block takes rows one after another. A row is read from memory once and its gradient written
// once: the first vectors of the row stay in shared memory between its two passes, and what does
// not fit there is read again at once, while it is in the second-level cache. While the second pass
// over a row frees its slots, the next row comes into them and goes through its first pass, so that
// memory and arithmetic never wait for one another.
//
//   slot i of thread t   vector i * threads + t of the row; nobody else reads or writes it
//   group g              slots [2g, 2g + 2), what a thread waits for at once

#include "cuda/common/vector.cuh"
#include "cuda/common/warp.cuh"
#include "cuda/ptx/copy.cuh"
#include "cuda/ptx/math.cuh"
#include "cuda/ptx/memory.cuh"
#include "cuda/ptx/shared.cuh"
#include "pdiff/weighted_cross_entropy.h"

namespace pdiff::cuda {

inline constexpr int kMaxThreads = 1024;  // as many warps as a warp has lanes
inline constexpr int kGroups = 8, kGroupSlots = 2, kMaxSlots = kGroups * kGroupSlots;
inline constexpr int kLag = 3;  // groups on their way before the oldest is waited for
inline constexpr float kLog2e = 1.44269504f;
inline constexpr float kInf = __builtin_inff();

/// Sum of e^(x - max).
struct ExpSum {
  float max = -kInf, sum = 0.0f;
};

/// At the start of shared memory; the slots follow. Rows take turns with the halves of `warps`,
/// so that one barrier per row is enough.
struct CrossEntropyShared {
  ExpSum warps[2][kWarpSize];
};

template <typename T>
struct LogitsRow {
  const T* x;
  RowShape<T> shape;
  int32_t label;
  bool is_counted;

  __device__ const uint4* vectors() const { return reinterpret_cast<const uint4*>(x + shape.head); }
};

/// A row after the first pass, what one thread saw of it.
template <typename T>
struct PassedRow {
  LogitsRow<T> row;
  ExpSum sums = {};
  float label_x = 0.0f;  // for all threads: the gradient may take the label's place
  float end_x = -kInf;
};

__device__ __forceinline__ bool is_counted(const WeightedCrossEntropyParams& p, int64_t row) {
  const int64_t label = p.labels[row];
  return label >= 0 && label < p.vocab_size && p.kind[row] < kNumRowKinds;
}

template <typename T>
__device__ __forceinline__ LogitsRow<T> logits_row(const WeightedCrossEntropyParams& p,
                                                   int64_t row) {
  LogitsRow<T> r{};
  if (row >= p.num_rows) return r;
  r.x = static_cast<const T*>(p.logits) + row * p.logits_stride;
  r.shape = row_shape(r.x, static_cast<int32_t>(p.vocab_size));
  r.is_counted = is_counted(p, row);
  r.label = r.is_counted ? static_cast<int32_t>(p.labels[row]) : 0;
  return r;
}

__device__ __forceinline__ float shifted_exp(float x, float max) {
  return exp2_fast((x - max) * kLog2e);
}

// The factor that a sum relative to `from` takes when it becomes relative to `to`.
__device__ __forceinline__ float rescale(float from, float to) {
  return from == -kInf ? 0.0f : shifted_exp(from, to);
}

template <int kCount>
__device__ __forceinline__ void add(ExpSum& total, const float (&x)[kCount]) {
  float max = total.max;
#pragma unroll
  for (int i = 0; i < kCount; ++i) max = fmaxf(max, x[i]);
  const float reference = max == -kInf ? 0.0f : max;
  float sum = total.sum * rescale(total.max, reference);
#pragma unroll
  for (int i = 0; i < kCount; ++i) sum += shifted_exp(x[i], reference);
  total = {max, sum};
}

template <typename T>
__device__ __forceinline__ void add_two(ExpSum& total, const uint4& first, const uint4& second) {
  float a[kPerVector<T>], b[kPerVector<T>], x[2 * kPerVector<T>];
  unpack<T>(first, a);
  unpack<T>(second, b);
#pragma unroll
  for (int i = 0; i < kPerVector<T>; ++i) x[i] = a[i], x[kPerVector<T> + i] = b[i];
  add(total, x);
}

/// A vector that adds nothing to an ExpSum.
template <typename T>
__device__ __forceinline__ uint4 no_logits() {
  float x[kPerVector<T>];
#pragma unroll
  for (int i = 0; i < kPerVector<T>; ++i) x[i] = -kInf;
  return pack<T>(x);
}

__device__ __forceinline__ ExpSum join_warp(const ExpSum& mine) {
  const float max = warp_max(mine.max);
  return {max, warp_sum(mine.sum * rescale(mine.max, max))};
}

__device__ __forceinline__ ExpSum join_block(const ExpSum& mine, ExpSum* of_warps) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const ExpSum of_warp = join_warp(mine);
  if (lane == 0) of_warps[warp] = of_warp;
  __syncthreads();
  const int num_warps = static_cast<int>(blockDim.x) / kWarpSize;
  return join_warp(lane < num_warps ? of_warps[lane] : ExpSum{});
}

/// dx <- scale * (softmax(x) - onehot(label)).
struct Gradient {
  float max, factor;  // scale / sum
  float at_label;     // what the label's element gets
  bool is_zero;

  template <typename T>
  __device__ uint4 of_vector(const uint4& x, int32_t label_in_vector) const {
    if (is_zero) return {};
    float value[kPerVector<T>];
    unpack<T>(x, value);
#pragma unroll
    for (int i = 0; i < kPerVector<T>; ++i) value[i] = shifted_exp(value[i], max) * factor;
    if (static_cast<uint32_t>(label_in_vector) < kPerVector<T>) {
#pragma unroll
      for (int i = 0; i < kPerVector<T>; ++i) {
        if (i == label_in_vector) value[i] = at_label;
      }
    }
    return pack<T>(value);
  }
};

template <typename T>
__device__ __forceinline__ void store_vector(T* dx, bool is_aligned, const uint4& vector) {
  if (is_aligned) return store_once(dx, vector);
  float x[kPerVector<T>];
  unpack<T>(vector, x);
#pragma unroll
  for (int i = 0; i < kPerVector<T>; ++i) dx[i] = from_float<T>(x[i]);
}

template <typename T, bool kHasGradient>
__global__ void __launch_bounds__(kMaxThreads, 1)
    cross_entropy_rows_kernel(const __grid_constant__ WeightedCrossEntropyParams p,
                              const double* normaliser,
                              float* cross_entropy,  // [num_rows]
                              int num_slots) {
  auto& shared = *reinterpret_cast<CrossEntropyShared*>(shared_memory());
  auto* slots = reinterpret_cast<uint4*>(&shared + 1);
  const int thread = static_cast<int>(threadIdx.x), num_threads = static_cast<int>(blockDim.x);
  const double inverse = *normaliser != 0.0 ? 1.0 / *normaliser : 0.0;

  // f(i, v): slot i of the group, and its vector of the row.
  const auto for_each_slot = [&](int group, int32_t num_vectors, const auto& f) {
#pragma unroll
    for (int i = 0; i < kGroupSlots; ++i) {
      const int slot = group * kGroupSlots + i, v = slot * num_threads + thread;
      if (slot < num_slots && v < num_vectors) f(i, v);
    }
  };
  const auto add_group = [&](PassedRow<T>& passed, int group) {
    const LogitsRow<T>& row = passed.row;
    if (!row.is_counted || group * kGroupSlots >= num_slots) return;
    uint4 x[kGroupSlots] = {no_logits<T>(), no_logits<T>()};
    for_each_slot(group, row.shape.num_vectors, [&](int i, int v) { x[i] = slots[v]; });
    add_two<T>(passed.sums, x[0], x[1]);
  };

  // The first pass over row `idx`; `release(group)` is the last use of what was in its slots.
  const auto first_pass = [&](int64_t idx, const auto& release) {
    PassedRow<T> passed{.row = logits_row<T>(p, idx)};
    const LogitsRow<T>& row = passed.row;
    const int32_t num_vectors = row.shape.num_vectors;
    if (row.is_counted) {
      passed.label_x = to_float(row.x[row.label]);
      if (thread < row.shape.num_ends()) {
        passed.end_x = to_float(row.x[row.shape.end_element(thread)]);
      }
    }
#pragma unroll 1
    for (int group = 0; group < kGroups; ++group) {
      release(group);
      if (row.is_counted) {
        for_each_slot(group, num_vectors,
                      [&](int, int v) { copy_async_once_16(slots + v, row.vectors() + v); });
      }
      copy_async_commit();
      if (group < kLag) continue;
      copy_async_wait<kLag>();
      add_group(passed, group - kLag);
    }
    if (row.is_counted) add(passed.sums, {passed.end_x});
    for (int v = num_slots * num_threads + thread; row.is_counted && v < num_vectors;
         v += 4 * num_threads) {
      uint4 x[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = v + i * num_threads;
        x[i] = at < num_vectors ? load_shortly(row.vectors() + at) : no_logits<T>();
      }
      add_two<T>(passed.sums, x[0], x[1]);
      if (v + 2 * num_threads < num_vectors) add_two<T>(passed.sums, x[2], x[3]);
    }
    copy_async_wait<0>();
#pragma unroll 1
    for (int group = kGroups - kLag; group < kGroups; ++group) add_group(passed, group);
    return passed;
  };

  PassedRow<T> passed = first_pass(blockIdx.x, [](int) {});
  int half = 0;
  for (int64_t idx = blockIdx.x; idx < p.num_rows; idx += gridDim.x, half ^= 1) {
    const LogitsRow<T> row = passed.row;
    const ExpSum total = join_block(passed.sums, shared.warps[half]);
    const float ce = (total.max - passed.label_x) + logf(total.sum);
    if (row.is_counted && thread == 0) cross_entropy[idx] = ce;
    if constexpr (!kHasGradient) {
      passed = first_pass(idx + gridDim.x, [](int) {});
      continue;
    }

    T* dx = static_cast<T*>(p.dlogits) + idx * p.dlogits_stride;
    const bool is_aligned = reinterpret_cast<uintptr_t>(dx + row.shape.head) % 16 == 0;
    const float scale = row.is_counted ? static_cast<float>(p.weight[idx] * inverse) : 0.0f;
    const Gradient gradient{.max = total.max,
                            .factor = scale / total.sum,
                            .at_label = scale * expm1f(-ce),
                            .is_zero = scale == 0.0f};
    const bool reads = !gradient.is_zero;
    const auto write = [&](int v, const uint4& x) {
      const int32_t begin = row.shape.head + v * kPerVector<T>;
      store_vector(dx + begin, is_aligned, gradient.of_vector<T>(x, row.label - begin));
    };
    if (thread < row.shape.num_ends()) {
      const int32_t end = row.shape.end_element(thread);
      const float value = end == row.label
                              ? gradient.at_label
                              : shifted_exp(passed.end_x, gradient.max) * gradient.factor;
      dx[end] = from_float<T>(gradient.is_zero ? 0.0f : value);
    }
    for (int v = num_slots * num_threads + thread; v < row.shape.num_vectors;
         v += 4 * num_threads) {
      uint4 x[4] = {};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = v + i * num_threads;
        if (reads && at < row.shape.num_vectors) x[i] = load_shortly(row.vectors() + at);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = v + i * num_threads;
        if (at < row.shape.num_vectors) write(at, x[i]);
      }
    }
    passed = first_pass(idx + gridDim.x, [&](int group) {
      for_each_slot(group, row.shape.num_vectors,
                    [&](int, int v) { write(v, reads ? slots[v] : uint4{}); });
    });
  }
}

/// Sums over all rows, in double and in an order that nothing but the number of rows decides.
struct CrossEntropySums {
  double weighted[kNumRowKinds], unweighted[kNumRowKinds];
  int64_t counts[kNumRowKinds];
  int32_t num_bad;  // labels or kinds that are out of range
};

__device__ __forceinline__ void join_lanes(CrossEntropySums& sums) {
#pragma unroll
  for (int kind = 0; kind < kNumRowKinds; ++kind) {
    sums.weighted[kind] = warp_sum(sums.weighted[kind]);
    sums.unweighted[kind] = warp_sum(sums.unweighted[kind]);
    sums.counts[kind] = warp_sum(sums.counts[kind]);
  }
  sums.num_bad = warp_sum(sums.num_bad);
}

/// One block of kMaxThreads.
__global__ void __launch_bounds__(kMaxThreads)
    join_cross_entropy_kernel(const __grid_constant__ WeightedCrossEntropyParams p,
                              const double* normaliser,
                              const float* cross_entropy) {  // [num_rows]
  auto* of_warps = reinterpret_cast<CrossEntropySums*>(shared_memory());
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpSize;
  CrossEntropySums sums{};
  for (int64_t row = thread; row < p.num_rows; row += kMaxThreads) {
    if (is_counted(p, row)) {
      const double ce = cross_entropy[row], weighted = p.weight[row] * ce;
      const int of_row = p.kind[row];
#pragma unroll
      for (int kind = 0; kind < kNumRowKinds; ++kind) {
        sums.weighted[kind] += kind == of_row ? weighted : 0.0;
        sums.unweighted[kind] += kind == of_row ? ce : 0.0;
        sums.counts[kind] += kind == of_row;
      }
    } else {
      sums.num_bad += p.labels[row] != p.kIgnored || p.kind[row] >= kNumRowKinds;
    }
  }
  join_lanes(sums);
  if (lane == 0) of_warps[thread / kWarpSize] = sums;
  __syncthreads();
  if (thread >= kWarpSize) return;
  sums = of_warps[lane];
  join_lanes(sums);
  if (thread != 0) return;
  double total = 0.0;
#pragma unroll
  for (int kind = 0; kind < kNumRowKinds; ++kind) {
    total += sums.weighted[kind];
    p.weighted_sums[kind] = static_cast<float>(sums.weighted[kind]);
    p.unweighted_sums[kind] = static_cast<float>(sums.unweighted[kind]);
    p.counts[kind] = sums.counts[kind];
  }
  const double loss = *normaliser != 0.0 ? total / *normaliser : 0.0;
  *p.loss = sums.num_bad > 0 ? __int_as_float(0x7fffffff) : static_cast<float>(loss);
}

/// x <- x * factor, and nothing at all where the factor is 1.
template <typename T>
__global__ void scale_rows_kernel(T* x, int64_t stride, int64_t num_rows, int64_t row_size,
                                  const float* factor) {
  const float by = *factor;
  if (by == 1.0f) return;
  const int thread = static_cast<int>(threadIdx.x);
  for (int64_t idx = blockIdx.x; idx < num_rows; idx += gridDim.x) {
    T* row = x + idx * stride;
    const RowShape<T> shape = row_shape(row, static_cast<int32_t>(row_size));
    if (thread < shape.num_ends()) {
      T& end = row[shape.end_element(thread)];
      end = from_float<T>(to_float(end) * by);
    }
    for (int v = thread; v < shape.num_vectors; v += static_cast<int>(blockDim.x)) {
      T* vector = row + shape.head + v * kPerVector<T>;
      float value[kPerVector<T>];
      unpack<T>(load_shortly(vector), value);
#pragma unroll
      for (int i = 0; i < kPerVector<T>; ++i) value[i] *= by;
      store_once(vector, pack<T>(value));
    }
  }
}

}  // namespace pdiff::cuda
