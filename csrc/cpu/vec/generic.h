#pragma once

// The vector layer: one interface, one implementation per instruction set, chosen by the include.
//
//   csrc/cpu/generic/unmask.cpp    #include "cpu/vec/generic.h"     // fixes Vec and PDIFF_ISA
//                                  // a comment here keeps clang-format from sorting the two
//                                  #include "cpu/kernels/unmask.h"  // the body, written once
//   csrc/cpu/avx512/unmask.cpp     the same with "cpu/vec/avx512.h"; a folder of a further level
//                                  (amx) defines PDIFF_ISA itself before including it.
//
// A body lives in `namespace pdiff::cpu::PDIFF_ISA { namespace {` and uses no STL template, so the
// object exports its entry points and nothing else. Every function here is forced inline.
//
// Vec     kLanes floats              Mask  one truth value per lane
// VecInt  kLanes 32-bit integers; >> shifts zeros in, multiply_wide is unsigned
// *_first the first n lanes, n clamped to 0..kLanes; other lanes are `fill`, their memory untouched
// min max the second operand where either is NaN: put the operand whose NaN must survive second
// compare false where either is NaN; not_less is the negation of <
// interleave a0 b0 c0 d0 a1 b1 ... of four vectors a, b, c, d, in four vectors
// transpose  swaps lane j of rows[i] and lane i of rows[j]
// store_compressed  the chosen lanes in order; returns their count, may write kLanes elements
//
// This file is the portable yardstick: plain loops that compilers unroll and vectorise.

#include <cstdint>
#include <cstring>

#include "common/macros.h"
#include "common/wide_product.h"
#include "pdiff/dtype.h"

#ifndef PDIFF_ISA
#define PDIFF_ISA generic
#endif

namespace pdiff::cpu::PDIFF_ISA {
namespace {

struct Vec {
  static constexpr int kLanes = 8;
  float lane[kLanes];
};

struct Mask {
  int32_t lane[Vec::kLanes];  // 0 or -1
};

struct VecInt {
  int32_t lane[Vec::kLanes];
};

// Result{f(0), f(1), ...}
template <typename Result, typename F>
PDIFF_INLINE Result each_lane(F f) {
  Result r;
  for (int i = 0; i < Vec::kLanes; ++i) r.lane[i] = f(i);
  return r;
}

PDIFF_INLINE uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}
PDIFF_INLINE float float_from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}
PDIFF_INLINE float widen(bfloat16 x) { return float_from_bits(uint32_t{x.bits} << 16); }
PDIFF_INLINE float widen(float16 x) {
  const uint32_t sign = uint32_t{x.bits} >> 15 << 31, magnitude = (x.bits & 0x7fffu) << 13;
  const float scaled = float_from_bits(magnitude) * 0x1p112f;  // the exponents' biases differ
  const bool is_finite = magnitude < 0x0f800000u;
  return float_from_bits(sign | (is_finite ? float_bits(scaled) : magnitude | 0x7f800000u));
}
// Round to nearest, ties to even; a NaN stays a NaN.
PDIFF_INLINE bfloat16 narrow(float x, bfloat16) {
  const uint32_t bits = float_bits(x);
  const uint32_t rounded = x != x ? bits | 0x400000u : bits + 0x7fffu + ((bits >> 16) & 1u);
  return {static_cast<uint16_t>(rounded >> 16)};
}
PDIFF_INLINE float16 narrow(float x, float16) {
  constexpr uint32_t kInfinity = 0x7c00, kQuiet = 0x0200;
  const uint32_t bits = float_bits(x), magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = kInfinity | kQuiet | (magnitude >> 13 & 0x3ffu);
  } else if (magnitude >= 0x47800000u) {  // 2^16
    half = kInfinity;
  } else if (magnitude < 0x38800000u) {  // 2^-14: the last bit of 1/2 is a half's smallest
    half = float_bits(float_from_bits(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude + 0xfffu + (magnitude >> 13 & 1u) - 0x38000000u) >> 13;
  }
  return {static_cast<uint16_t>((bits >> 16 & 0x8000u) | half)};
}

// Masks.
PDIFF_INLINE Mask first_lanes(int n) {
  return each_lane<Mask>([=](int i) { return -(i < n); });
}
PDIFF_INLINE Mask operator&(Mask a, Mask b) {
  return each_lane<Mask>([=](int i) { return a.lane[i] & b.lane[i]; });
}
PDIFF_INLINE Mask operator|(Mask a, Mask b) {
  return each_lane<Mask>([=](int i) { return a.lane[i] | b.lane[i]; });
}
PDIFF_INLINE Mask operator~(Mask a) {
  return each_lane<Mask>([=](int i) { return ~a.lane[i]; });
}
PDIFF_INLINE int count(Mask m) {
  int n = 0;
  for (int i = 0; i < Vec::kLanes; ++i) n -= m.lane[i];
  return n;
}
PDIFF_INLINE bool any(Mask m) { return count(m) != 0; }
PDIFF_INLINE bool all(Mask m) { return count(m) == Vec::kLanes; }
PDIFF_INLINE int first_set(Mask m) {
  int i = 0;
  while (m.lane[i] == 0) ++i;
  return i;
}

// Constants.
PDIFF_INLINE Vec broadcast(float x) {
  return each_lane<Vec>([=](int) { return x; });
}
PDIFF_INLINE Vec zero() { return broadcast(0.0f); }
PDIFF_INLINE VecInt broadcast_int(int32_t x) {
  return each_lane<VecInt>([=](int) { return x; });
}
PDIFF_INLINE VecInt iota() {
  return each_lane<VecInt>([](int i) { return i; });
}

// Memory.
PDIFF_INLINE Vec load(const float* p) {
  return each_lane<Vec>([=](int i) { return p[i]; });
}
PDIFF_INLINE Vec load_first(const float* p, int n, float fill = 0.0f) {
  return each_lane<Vec>([=](int i) { return i < n ? p[i] : fill; });
}
PDIFF_INLINE void store_first(float* p, Vec a, int n) {
  for (int i = 0; i < Vec::kLanes && i < n; ++i) p[i] = a.lane[i];
}
PDIFF_INLINE void store(float* p, Vec a) { store_first(p, a, Vec::kLanes); }

template <typename Half>
PDIFF_INLINE Vec load(const Half* p) {
  return each_lane<Vec>([=](int i) { return widen(p[i]); });
}
template <typename Half>
PDIFF_INLINE Vec load_first(const Half* p, int n, float fill = 0.0f) {
  return each_lane<Vec>([=](int i) { return i < n ? widen(p[i]) : fill; });
}
template <typename Half>
PDIFF_INLINE void store_first(Half* p, Vec a, int n) {
  for (int i = 0; i < Vec::kLanes && i < n; ++i) p[i] = narrow(a.lane[i], Half{});
}
template <typename Half>
PDIFF_INLINE void store(Half* p, Vec a) {
  store_first(p, a, Vec::kLanes);
}

PDIFF_INLINE VecInt load(const int32_t* p) {
  return each_lane<VecInt>([=](int i) { return p[i]; });
}
PDIFF_INLINE void store(uint32_t* p, VecInt a) { std::memcpy(p, a.lane, sizeof(a.lane)); }
PDIFF_INLINE void prefetch(const void* p) { __builtin_prefetch(p); }
PDIFF_INLINE int store_compressed(float* p, Mask m, Vec a) {
  int n = 0;
  for (int i = 0; i < Vec::kLanes; ++i) {
    p[n] = a.lane[i];  // without a branch; the next chosen lane overwrites one that is not
    n -= m.lane[i];
  }
  return n;
}
PDIFF_INLINE int store_compressed(int32_t* p, Mask m, VecInt a) {
  int n = 0;
  for (int i = 0; i < Vec::kLanes; ++i) {
    p[n] = a.lane[i];
    n -= m.lane[i];
  }
  return n;
}

// Arithmetic.
PDIFF_INLINE Vec operator+(Vec a, Vec b) {
  return each_lane<Vec>([=](int i) { return a.lane[i] + b.lane[i]; });
}
PDIFF_INLINE Vec operator-(Vec a, Vec b) {
  return each_lane<Vec>([=](int i) { return a.lane[i] - b.lane[i]; });
}
PDIFF_INLINE Vec operator*(Vec a, Vec b) {
  return each_lane<Vec>([=](int i) { return a.lane[i] * b.lane[i]; });
}
PDIFF_INLINE Vec operator/(Vec a, Vec b) {
  return each_lane<Vec>([=](int i) { return a.lane[i] / b.lane[i]; });
}
// a * b + c and c - a * b; rounded twice here, once where the hardware fuses.
PDIFF_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
PDIFF_INLINE Vec fnma(Vec a, Vec b, Vec c) { return c - a * b; }
PDIFF_INLINE Vec min(Vec a, Vec b) {
  return each_lane<Vec>([=](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
}
PDIFF_INLINE Vec max(Vec a, Vec b) {
  return each_lane<Vec>([=](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}
PDIFF_INLINE VecInt operator+(VecInt a, VecInt b) {
  return each_lane<VecInt>([=](int i) { return a.lane[i] + b.lane[i]; });
}

PDIFF_INLINE VecInt operator^(VecInt a, VecInt b) {
  return each_lane<VecInt>([=](int i) { return a.lane[i] ^ b.lane[i]; });
}
PDIFF_INLINE VecInt operator^(VecInt a, uint32_t b) {
  return a ^ broadcast_int(static_cast<int32_t>(b));
}
PDIFF_INLINE VecInt operator>>(VecInt a, int n) {
  return each_lane<VecInt>([=](int i) { return static_cast<uint32_t>(a.lane[i]) >> n; });
}
PDIFF_INLINE WideProduct<VecInt> multiply_wide(VecInt a, uint32_t b) {
  const auto product = [=](int i) { return uint64_t{static_cast<uint32_t>(a.lane[i])} * b; };
  return {each_lane<VecInt>([=](int i) { return product(i) >> 32; }),
          each_lane<VecInt>([=](int i) { return product(i); })};
}

PDIFF_INLINE VecInt bits(Vec a) {
  return each_lane<VecInt>([=](int i) { return static_cast<int32_t>(float_bits(a.lane[i])); });
}
PDIFF_INLINE Vec to_float(VecInt a) {
  return each_lane<Vec>([=](int i) { return static_cast<float>(a.lane[i]); });
}
PDIFF_INLINE Vec to_float_unsigned(VecInt a) {
  return each_lane<Vec>(
      [=](int i) { return static_cast<float>(static_cast<uint32_t>(a.lane[i])); });
}

// Comparisons.
PDIFF_INLINE Mask operator<(Vec a, Vec b) {
  return each_lane<Mask>([=](int i) { return -(a.lane[i] < b.lane[i]); });
}
PDIFF_INLINE Mask operator>=(Vec a, Vec b) {
  return each_lane<Mask>([=](int i) { return -(a.lane[i] >= b.lane[i]); });
}
PDIFF_INLINE Mask operator==(Vec a, Vec b) {
  return each_lane<Mask>([=](int i) { return -(a.lane[i] == b.lane[i]); });
}
PDIFF_INLINE Mask not_less(Vec a, Vec b) {
  return each_lane<Mask>([=](int i) { return -!(a.lane[i] < b.lane[i]); });
}
PDIFF_INLINE Mask is_nan(Vec a) {
  return each_lane<Mask>([=](int i) { return -(a.lane[i] != a.lane[i]); });
}
PDIFF_INLINE Mask operator<=(VecInt a, VecInt b) {
  return each_lane<Mask>([=](int i) { return -(a.lane[i] <= b.lane[i]); });
}
PDIFF_INLINE Mask any_bit(VecInt a, int32_t bits) {
  return each_lane<Mask>([=](int i) { return -((a.lane[i] & bits) != 0); });
}
PDIFF_INLINE VecInt select(Mask m, VecInt a, VecInt b) {
  return each_lane<VecInt>([=](int i) { return m.lane[i] != 0 ? a.lane[i] : b.lane[i]; });
}
PDIFF_INLINE Vec select(Mask m, Vec a, Vec b) {
  return each_lane<Vec>([=](int i) { return m.lane[i] != 0 ? a.lane[i] : b.lane[i]; });
}

// Reductions, halving the width each time as hardware does.
template <typename F>
PDIFF_INLINE float reduce(Vec a, F f) {
  for (int width = Vec::kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) a.lane[i] = f(a.lane[i], a.lane[i + width]);
  }
  return a.lane[0];
}
PDIFF_INLINE float first_lane(Vec a) { return a.lane[0]; }
PDIFF_INLINE float reduce_add(Vec a) {
  return reduce(a, [](float x, float y) { return x + y; });
}
PDIFF_INLINE float reduce_max(Vec a) {
  return reduce(a, [](float x, float y) { return x > y ? x : y; });
}
PDIFF_INLINE float reduce_min(Vec a) {
  return reduce(a, [](float x, float y) { return x < y ? x : y; });
}

PDIFF_INLINE void interleave(VecInt (&a)[4]) {
  int32_t joined[4 * Vec::kLanes];
  for (int i = 0; i < 4 * Vec::kLanes; ++i) joined[i] = a[i % 4].lane[i / 4];
  std::memcpy(a, joined, sizeof(joined));
}

PDIFF_INLINE void transpose(Vec (&rows)[Vec::kLanes]) {
  for (int i = 0; i < Vec::kLanes; ++i) {
    for (int j = 0; j < i; ++j) {
      const float below = rows[i].lane[j];
      rows[i].lane[j] = rows[j].lane[i];
      rows[j].lane[i] = below;
    }
  }
}

// To the nearest integer, ties to even, for |a| < 2^22: adding 1.5 * 2^23 leaves no bit for a
// fraction.
PDIFF_INLINE Vec round(Vec a) {
  const Vec magic = broadcast(12582912.0f);
  return (a + magic) - magic;
}
// a * 2^n in the lanes of `m`, 0 in the others, whatever they hold; n integral, up to 254. In two
// factors, each representable.
PDIFF_INLINE Vec scale_by_power(Mask m, Vec a, Vec n) {
  return each_lane<Vec>([=](int i) {
    const bool usual = m.lane[i] != 0 && n.lane[i] <= 254.0f;  // not NaN, which `a` then is too
    const int32_t power = usual ? static_cast<int32_t>(n.lane[i]) : 0, half = power >> 1;
    const float low = float_from_bits(static_cast<uint32_t>(half + 127) << 23);
    const float high = float_from_bits(static_cast<uint32_t>(power - half + 127) << 23);
    return m.lane[i] != 0 ? a.lane[i] * low * high : 0.0f;
  });
}

}  // namespace
}  // namespace pdiff::cpu::PDIFF_ISA

#include "cpu/vec/math.h"
