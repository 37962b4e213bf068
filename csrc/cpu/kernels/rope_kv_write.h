#pragma once

#include <cstring>

#include "common/parallel.h"
#include "common/positions.h"
#include "cpu/kernels/element.h"
#include "cpu/rope_kv_write.h"

namespace pdiff::cpu::PDIFF_ISA {
namespace {

// (a, b) <- (a cos - b sin, b cos + a sin) for the two halves of each head; `copy` receives the
// result too unless it is null.
template <typename T>
PDIFF_INLINE void rotate_heads(T* x, T* copy, int64_t num_heads, int half, const float* cos,
                               const float* sin) {
  for (int64_t head = 0; head < num_heads; ++head) {
    T* first = x + head * 2 * half;
    for (int i = 0; i < half; i += Vec::kLanes) {
      const int n = half - i;
      const Vec c = load_first(cos + i, n), s = load_first(sin + i, n);
      const Vec a = load_first(first + i, n), b = load_first(first + half + i, n);
      const Vec rotated_a = fnma(b, s, a * c), rotated_b = fma(a, s, b * c);
      store_first(first + i, rotated_a, n);
      store_first(first + half + i, rotated_b, n);
      if (copy == nullptr) continue;
      T* copied = copy + head * 2 * half;
      store_first(copied + i, rotated_a, n);
      store_first(copied + half + i, rotated_b, n);
    }
  }
}

template <typename T>
void rope_kv_write_of(const RopeKvWriteParams& p) {
  constexpr int64_t kElementsPerTask = 32768;  // worth waking a thread for
  const int64_t elements = (p.num_heads_q + 2 * p.num_heads_kv) * p.head_dim;
  const int half = static_cast<int>(p.head_dim / 2);
  parallel_for(p.num_rows, p.num_threads, 1 + kElementsPerTask / elements, [&](int64_t row) {
    const int64_t position = position_of_row(p.positions, p.positions_are_int64, row);
    const float *cos = p.cos + position * half, *sin = p.sin + position * half;
    const int64_t kv_size = p.num_heads_kv * p.head_dim;
    const bool writes = p.k_cache != nullptr && p.slots[row] >= 0;
    T* k_slot = writes ? static_cast<T*>(p.k_cache) + p.slots[row] * kv_size : nullptr;
    rotate_heads<T>(static_cast<T*>(p.q) + row * p.q_stride, nullptr, p.num_heads_q, half, cos,
                    sin);
    rotate_heads(static_cast<T*>(p.k) + row * p.k_stride, k_slot, p.num_heads_kv, half, cos, sin);
    if (writes) {
      std::memcpy(static_cast<T*>(p.v_cache) + p.slots[row] * kv_size,
                  static_cast<const T*>(p.v) + row * p.v_stride, kv_size * sizeof(T));
    }
  });
}

}  // namespace

void rope_kv_write_rows(const RopeKvWriteParams& params) {
  with_element(params.dtype, [&](auto element) { rope_kv_write_of<decltype(element)>(params); });
}

}  // namespace pdiff::cpu::PDIFF_ISA
