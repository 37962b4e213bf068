#pragma once

#include "common/parallel.h"
#include "cpu/kernels/element.h"
#include "cpu/swiglu.h"

namespace pdiff::cpu::PDIFF_ISA {
namespace {

PDIFF_INLINE Vec silu_times(Vec gate, Vec up) {
  return gate / (broadcast(1.0f) + exp(zero() - gate)) * up;
}

template <typename T>
void swiglu_of(const SwigluParams& p) {
  constexpr int64_t kElementsPerTask = 8192;  // worth waking a thread for
  constexpr int kLanes = Vec::kLanes;
  parallel_for(p.num_rows, p.num_threads, 1 + kElementsPerTask / p.size, [&](int64_t row) {
    const T* gate = static_cast<const T*>(p.gate) + row * p.gate_stride;
    const T* up = static_cast<const T*>(p.up) + row * p.up_stride;
    T* out = static_cast<T*>(p.out) + row * p.size;
    int64_t i = 0;
    for (; i + kLanes <= p.size; i += kLanes) {
      store(out + i, silu_times(load(gate + i), load(up + i)));
    }
    if (i < p.size) {
      const int n = static_cast<int>(p.size - i);
      store_first(out + i, silu_times(load_first(gate + i, n), load_first(up + i, n)), n);
    }
  });
}

}  // namespace

void swiglu_rows(const SwigluParams& params) {
  with_element(params.dtype, [&](auto element) { swiglu_of<decltype(element)>(params); });
}

}  // namespace pdiff::cpu::PDIFF_ISA
