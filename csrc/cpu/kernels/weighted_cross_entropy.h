#pragma once

#include <cmath>
#include <cstring>

#include "common/parallel.h"
#include "cpu/kernels/element.h"
#include "cpu/weighted_cross_entropy.h"

namespace pdiff::cpu::PDIFF_ISA {
namespace {

constexpr int kLanes = Vec::kLanes;
constexpr int kUnroll = 4;    // independent chains, enough to cover the latency of an addition
constexpr int kBlock = 4096;  // logits that stay in the first-level cache between two passes
constexpr float kLog2e = 1.44269504f;
constexpr float kInf = __builtin_inff();

// f(i, n, u) for each vector of [0, size): it starts at i, holds n elements (fewer than kLanes only
// at the end) and belongs to chain u.
template <typename F>
PDIFF_INLINE void for_each_vec(int64_t size, const F& f) {
  int64_t i = 0;
  for (; i + kUnroll * kLanes <= size; i += kUnroll * kLanes) {
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) f(i + u * kLanes, kLanes, u);
  }
  for (; i < size; i += kLanes) f(i, static_cast<int>(size - i < kLanes ? size - i : kLanes), 0);
}

template <typename T>
PDIFF_INLINE float lane(const T* x, int64_t i) {
  return first_lane(load_first(x + i, 1));
}

PDIFF_INLINE Vec shifted_exp(Vec x, Vec m) { return exp2_bounded((x - m) * broadcast(kLog2e)); }

struct LogSumExp {
  float max;
  double sum;  // of e^(x - max)
};

template <typename T>
LogSumExp log_sum_exp(const T* row, int64_t vocab_size) {
  LogSumExp result = {-kInf, 0.0};
  for (int64_t begin = 0; begin < vocab_size; begin += kBlock) {
    const T* x = row + begin;
    const int n = static_cast<int>(vocab_size - begin < kBlock ? vocab_size - begin : kBlock);
    Vec largest[kUnroll], sum[kUnroll];
    for (int u = 0; u < kUnroll; ++u) largest[u] = broadcast(-kInf), sum[u] = zero();
    for_each_vec(n, [&](int64_t i, int left, int u) {
      largest[u] = max(load_first(x + i, left, -kInf), largest[u]);
    });
    const float block_max =
        reduce_max(max(max(largest[0], largest[1]), max(largest[2], largest[3])));
    if (block_max > result.max) {
      result.sum *= ::exp(static_cast<double>(result.max) - block_max);
      result.max = block_max;
    }
    const Vec m = broadcast(result.max == -kInf ? 0.0f : result.max);
    for_each_vec(n, [&](int64_t i, int left, int u) {
      prefetch(x + n + i);
      sum[u] = sum[u] + shifted_exp(load_first(x + i, left, -kInf), m);
    });
    result.sum += reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3]));
  }
  return result;
}

// dx <- scale * (softmax(x) - onehot(label)); dx may be x.
template <typename T>
void write_gradient(const T* x, T* dx, int64_t vocab_size, int64_t label, const LogSumExp& lse,
                    float scale) {
  const double label_probability = ::exp(lane(x, label) - static_cast<double>(lse.max)) / lse.sum;
  const Vec m = broadcast(lse.max), factor = broadcast(static_cast<float>(scale / lse.sum));
  for_each_vec(vocab_size, [&](int64_t i, int n, int) {
    store_first(dx + i, shifted_exp(load_first(x + i, n), m) * factor, n);
  });
  const Vec at_label = broadcast(static_cast<float>(scale * (label_probability - 1.0)));
  store_first(dx + label, at_label, 1);
}

template <typename T>
void cross_entropy_rows_of(const WeightedCrossEntropyParams& p, double* cross_entropy) {
  parallel_for(p.num_rows, p.num_threads, 1 + kBlock / p.vocab_size, [&](int64_t row) {
    const T* x = static_cast<const T*>(p.logits) + row * p.logits_stride;
    T* dx = p.dlogits != nullptr ? static_cast<T*>(p.dlogits) + row * p.dlogits_stride : nullptr;
    const int64_t label = p.labels[row];
    const bool is_ignored = label == p.kIgnored;
    const float scale =
        is_ignored || p.normaliser == 0.0 ? 0.0f : static_cast<float>(p.weight[row] / p.normaliser);
    if (!is_ignored) {
      const LogSumExp lse = log_sum_exp(x, p.vocab_size);
      cross_entropy[row] = lse.max - static_cast<double>(lane(x, label)) + log(lse.sum);
      if (dx != nullptr && scale != 0.0f) {
        return write_gradient(x, dx, p.vocab_size, label, lse, scale);
      }
    }
    if (dx != nullptr) memset(dx, 0, p.vocab_size * sizeof(T));
  });
}

}  // namespace

void cross_entropy_rows(const WeightedCrossEntropyParams& params, double* cross_entropy) {
  with_element(params.dtype, [&](auto element) {
    cross_entropy_rows_of<decltype(element)>(params, cross_entropy);
  });
}

}  // namespace pdiff::cpu::PDIFF_ISA
