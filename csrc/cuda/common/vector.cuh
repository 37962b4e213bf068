#pragma once

// 16 bytes of elements as floats, and one element as a float.

#include <cstdint>
#include <type_traits>

#include "cuda/ptx/math.cuh"

namespace pdiff::cuda {

template <typename T>
inline constexpr int kPerVector = 16 / sizeof(T);

/// A row of elements: `head` of them, `num_vectors` that are aligned, `tail` more. The ends have
/// fewer elements than a warp has lanes; end t is an element of the head or, after it, the tail.
template <typename T>
struct RowShape {
  int32_t head, num_vectors, tail;

  __device__ int32_t num_ends() const { return head + tail; }
  __device__ int32_t end_element(int32_t t) const {
    return t < head ? t : t + num_vectors * kPerVector<T>;
  }
};

template <typename T>
__device__ __forceinline__ RowShape<T> row_shape(const T* row, int32_t size) {
  const auto address = static_cast<int32_t>(reinterpret_cast<uintptr_t>(row) / sizeof(T));
  const int32_t head = min(-address & (kPerVector<T> - 1), size);
  const int32_t num_vectors = (size - head) / kPerVector<T>;
  return {head, num_vectors, size - head - num_vectors * kPerVector<T>};
}

template <typename T>
__device__ __forceinline__ void unpack(const uint4& vector, float (&x)[kPerVector<T>]) {
  const uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (std::is_same_v<T, float>) {
      x[i] = __uint_as_float(words[i]);
    } else {
      const float2 pair = unpack2<T>(words[i]);
      x[2 * i] = pair.x, x[2 * i + 1] = pair.y;
    }
  }
}

template <typename T>
__device__ __forceinline__ uint4 pack(const float (&x)[kPerVector<T>]) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (std::is_same_v<T, float>) {
      words[i] = __float_as_uint(x[i]);
    } else {
      words[i] = pack2<T>(x[2 * i], x[2 * i + 1]);
    }
  }
  return {words[0], words[1], words[2], words[3]};
}

template <typename T>
__device__ __forceinline__ float to_float(T x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else {
    return unpack2<T>(x.bits).x;
  }
}

template <typename T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else {
    return {static_cast<uint16_t>(pack2<T>(x, 0.0f))};
  }
}

}  // namespace pdiff::cuda
