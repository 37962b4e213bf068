#pragma once

#include <cmath>

#include "common/parallel.h"
#include "cpu/kernels/element.h"
#include "cpu/rms_norm.h"

namespace pdiff::cpu::PDIFF_ISA {
namespace {

template <typename T>
void rms_norm_of(const RmsNormParams& p) {
  constexpr int64_t kElementsPerTask = 32768;  // worth waking a thread for
  constexpr int kUnroll = 4, kLanes = Vec::kLanes;
  const auto* weight = static_cast<const T*>(p.weight);
  parallel_for(p.num_rows, p.num_threads, 1 + kElementsPerTask / p.size, [&](int64_t row) {
    const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
    T* out = static_cast<T*>(p.out) + row * p.size;
    Vec sum[kUnroll];
    for (int u = 0; u < kUnroll; ++u) sum[u] = zero();
    int64_t i = 0;
    for (; i + kUnroll * kLanes <= p.size; i += kUnroll * kLanes) {
      for (int u = 0; u < kUnroll; ++u) {
        const Vec v = load(x + i + u * kLanes);
        sum[u] = fma(v, v, sum[u]);
      }
    }
    for (; i < p.size; i += kLanes) {
      const Vec v = load_first(x + i, static_cast<int>(p.size - i));
      sum[0] = fma(v, v, sum[0]);
    }
    const float squares = reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3]));
    const Vec scale = broadcast(1.0f / sqrtf(squares / static_cast<float>(p.size) + p.eps));
    for (i = 0; i + kLanes <= p.size; i += kLanes) {
      store(out + i, load(x + i) * scale * load(weight + i));
    }
    if (i < p.size) {
      const int n = static_cast<int>(p.size - i);
      store_first(out + i, load_first(x + i, n) * scale * load_first(weight + i, n), n);
    }
  });
}

}  // namespace

void rms_norm_rows(const RmsNormParams& params) {
  with_element(params.dtype, [&](auto element) { rms_norm_of<decltype(element)>(params); });
}

}  // namespace pdiff::cpu::PDIFF_ISA
