#pragma once

// A block per row. Its threads split the row into pieces of kCount elements of a half-head together
// with the kCount elements they are rotated with; a thread keeps its place within the head, and so
// its cosines and sines, for all the heads it takes. Heads count from q's over k's to v's.

#include "common/positions.h"
#include "cuda/common/vector.cuh"
#include "pdiff/rope_kv_write.h"

namespace pdiff::cuda {

/// kCount elements that one access moves.
template <typename T, int kCount>
struct Piece {
  using Bits = std::conditional_t<kCount == 1, T, uint4>;
  static_assert(kCount == 1 || kCount == kPerVector<T>);

  __device__ static Bits load(const T* x) { return *reinterpret_cast<const Bits*>(x); }
  __device__ static void store(T* x, const Bits& bits) { *reinterpret_cast<Bits*>(x) = bits; }

  __device__ static void widen(const Bits& bits, float (&x)[kCount]) {
    if constexpr (kCount == 1) {
      x[0] = to_float(bits);
    } else {
      unpack<T>(bits, x);
    }
  }
  __device__ static Bits round(const float (&x)[kCount]) {
    if constexpr (kCount == 1) {
      return from_float<T>(x[0]);
    } else {
      return pack<T>(x);
    }
  }
};

template <int kCount>
__device__ __forceinline__ void load_floats(const float* from, float (&x)[kCount]) {
  if constexpr (kCount == 1) {
    x[0] = *from;
  } else {
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      const float4 four = *reinterpret_cast<const float4*>(from + i);
      x[i] = four.x, x[i + 1] = four.y, x[i + 2] = four.z, x[i + 3] = four.w;
    }
  }
}

template <typename T, int kCount>
__global__ void rope_kv_write_kernel(const __grid_constant__ RopeKvWriteParams p) {
  using Elements = Piece<T, kCount>;
  using Bits = typename Elements::Bits;
  const int half = static_cast<int>(p.head_dim / 2), pieces = half / kCount;
  const int at = static_cast<int>(threadIdx.x) % pieces * kCount;
  const int heads_at_once = static_cast<int>(blockDim.x) / pieces;
  const int num_heads_q = static_cast<int>(p.num_heads_q);
  const int num_heads_kv = static_cast<int>(p.num_heads_kv);

  const int64_t row = blockIdx.x;
  const int64_t position = position_of_row(p.positions, p.positions_are_int64, row);
  if (position < 0 || position >= p.max_position) return;
  const int64_t slot = p.k_cache != nullptr ? p.slots[row] : -1;
  const bool writes = slot >= 0 && slot < p.num_slots;
  const int64_t slot_begin = slot * num_heads_kv * p.head_dim;
  const int num_heads = num_heads_q + num_heads_kv * (writes ? 2 : 1);

  float cos[kCount], sin[kCount];
  load_floats(p.cos + position * half + at, cos);
  load_floats(p.sin + position * half + at, sin);
  for (int head = static_cast<int>(threadIdx.x) / pieces; head < num_heads; head += heads_at_once) {
    const bool is_v = head >= num_heads_q + num_heads_kv;
    const int head_kv = head - num_heads_q - (is_v ? num_heads_kv : 0);
    const int64_t in_slot = slot_begin + int64_t{head_kv} * p.head_dim + at;
    if (is_v) {
      const T* v = static_cast<const T*>(p.v) + row * p.v_stride + head_kv * p.head_dim + at;
      T* copy = static_cast<T*>(p.v_cache) + in_slot;
      const Bits first = Elements::load(v), second = Elements::load(v + half);
      Elements::store(copy, first);
      Elements::store(copy + half, second);
      continue;
    }
    T* x = head < num_heads_q ? static_cast<T*>(p.q) + row * p.q_stride + head * p.head_dim + at
                              : static_cast<T*>(p.k) + row * p.k_stride + head_kv * p.head_dim + at;
    float a[kCount], b[kCount], rotated_a[kCount], rotated_b[kCount];
    Elements::widen(Elements::load(x), a);
    Elements::widen(Elements::load(x + half), b);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      rotated_a[i] = a[i] * cos[i] - b[i] * sin[i];
      rotated_b[i] = b[i] * cos[i] + a[i] * sin[i];
    }
    const Bits first = Elements::round(rotated_a), second = Elements::round(rotated_b);
    Elements::store(x, first);
    Elements::store(x + half, second);
    if (head >= num_heads_q && writes) {
      T* copy = static_cast<T*>(p.k_cache) + in_slot;
      Elements::store(copy, first);
      Elements::store(copy + half, second);
    }
  }
}

}  // namespace pdiff::cuda
