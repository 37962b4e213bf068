#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "pdiff/dtype.h"

namespace pdiff::cuda {

inline float exp2_fast(float x) {
  const float y = ::exp2f(x);
  return y < 0x1p-126f ? 0.0f : y;
}

inline float log2_fast(float x) { return ::log2f(x); }

template <typename T>
uint16_t round_to(float x);

template <>
inline uint16_t round_to<bfloat16>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  if (x != x) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

template <>
inline uint16_t round_to<float16>(float x) {
  const _Float16 half = static_cast<_Float16>(x);
  uint16_t bits;
  std::memcpy(&bits, &half, sizeof(bits));
  return x != x ? 0x7fff : bits;
}

template <typename T>
float widen(uint16_t bits);

template <>
inline float widen<bfloat16>(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float x;
  std::memcpy(&x, &wide, sizeof(x));
  return x;
}

template <>
inline float widen<float16>(uint16_t bits) {
  _Float16 half;
  std::memcpy(&half, &bits, sizeof(half));
  return static_cast<float>(half);
}

template <typename T>
uint32_t pack2(float low, float high) {
  return round_to<T>(low) | static_cast<uint32_t>(round_to<T>(high)) << 16;
}

template <typename T>
float2 unpack2(uint32_t packed) {
  return {widen<T>(static_cast<uint16_t>(packed)), widen<T>(static_cast<uint16_t>(packed >> 16))};
}

inline float max_or_nan(float a, float b) { return a != a ? a : b != b ? b : a > b ? a : b; }

template <typename T>
uint32_t max2_or_nan(uint32_t a, uint32_t b) {
  const float2 x = unpack2<T>(a), y = unpack2<T>(b);
  return pack2<T>(max_or_nan(x.x, y.x), max_or_nan(x.y, y.y));
}

}  // namespace pdiff::cuda
