#pragma once

// The vector layer on AVX2 and FMA. vec/generic.h documents the interface.

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "common/macros.h"
#include "common/wide_product.h"
#include "pdiff/dtype.h"

#ifndef PDIFF_ISA
#define PDIFF_ISA avx2
#endif

namespace pdiff::cpu::PDIFF_ISA {
namespace {

struct Vec {
  static constexpr int kLanes = 8;
  __m256 v;
};

struct Mask {
  __m256 v;  // all bits of a lane, or none
};

struct VecInt {
  __m256i v;
};

// Constants.
PDIFF_INLINE Vec broadcast(float x) { return {_mm256_set1_ps(x)}; }
PDIFF_INLINE Vec zero() { return {_mm256_setzero_ps()}; }
PDIFF_INLINE VecInt broadcast_int(int32_t x) { return {_mm256_set1_epi32(x)}; }
PDIFF_INLINE VecInt iota() { return {_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)}; }

// Masks.
PDIFF_INLINE Mask first_lanes(int n) {
  return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n), iota().v))};
}
PDIFF_INLINE Mask operator&(Mask a, Mask b) { return {_mm256_and_ps(a.v, b.v)}; }
PDIFF_INLINE Mask operator|(Mask a, Mask b) { return {_mm256_or_ps(a.v, b.v)}; }
PDIFF_INLINE Mask operator~(Mask a) {
  return {_mm256_xor_ps(a.v, _mm256_castsi256_ps(_mm256_set1_epi32(-1)))};
}
PDIFF_INLINE int lane_bits(Mask m) { return _mm256_movemask_ps(m.v); }
PDIFF_INLINE bool any(Mask m) { return lane_bits(m) != 0; }
PDIFF_INLINE bool all(Mask m) { return lane_bits(m) == 0xff; }
PDIFF_INLINE int count(Mask m) { return __builtin_popcount(lane_bits(m)); }
PDIFF_INLINE int first_set(Mask m) { return __builtin_ctz(lane_bits(m)); }
PDIFF_INLINE Vec select(Mask m, Vec a, Vec b) { return {_mm256_blendv_ps(b.v, a.v, m.v)}; }
PDIFF_INLINE VecInt select(Mask m, VecInt a, VecInt b) {
  return {_mm256_blendv_epi8(b.v, a.v, _mm256_castps_si256(m.v))};
}

// Memory.
PDIFF_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
PDIFF_INLINE Vec load_first(const float* p, int n, float fill = 0.0f) {
  const Mask m = first_lanes(n);
  return select(m, Vec{_mm256_maskload_ps(p, _mm256_castps_si256(m.v))}, broadcast(fill));
}
PDIFF_INLINE void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
PDIFF_INLINE void store_first(float* p, Vec a, int n) {
  _mm256_maskstore_ps(p, _mm256_castps_si256(first_lanes(n).v), a.v);
}

PDIFF_INLINE Vec widen(__m128i halves, bfloat16) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16))};
}
PDIFF_INLINE Vec widen(__m128i halves, float16) { return {_mm256_cvtph_ps(halves)}; }
PDIFF_INLINE __m128i narrow(Vec a, bfloat16) {
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));  // stays a NaN
  const __m256 nan = _mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q);
  const __m256i rounded = _mm256_srli_epi32(
      _mm256_blendv_epi8(_mm256_add_epi32(bits, bias), quiet, _mm256_castps_si256(nan)), 16);
  const __m256i packed = _mm256_packus_epi32(rounded, rounded);  // within each half
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
}
PDIFF_INLINE __m128i narrow(Vec a, float16) {
  return _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
PDIFF_INLINE int clamped_lanes(int n) { return n < 0 ? 0 : n > Vec::kLanes ? Vec::kLanes : n; }
template <typename Half>
PDIFF_INLINE Vec load(const Half* p) {
  return widen(_mm_loadu_si128((const __m128i*)p), Half{});
}
template <typename Half>
PDIFF_INLINE Vec load_first(const Half* p, int n, float fill = 0.0f) {
  alignas(16) Half halves[Vec::kLanes] = {};
  std::memcpy(halves, p, static_cast<size_t>(clamped_lanes(n)) * sizeof(Half));
  return select(first_lanes(n), load(halves), broadcast(fill));
}
template <typename Half>
PDIFF_INLINE void store(Half* p, Vec a) {
  _mm_storeu_si128((__m128i*)p, narrow(a, Half{}));
}
template <typename Half>
PDIFF_INLINE void store_first(Half* p, Vec a, int n) {
  alignas(16) Half halves[Vec::kLanes];
  store(halves, a);
  std::memcpy(p, halves, static_cast<size_t>(clamped_lanes(n)) * sizeof(Half));
}

PDIFF_INLINE VecInt load(const int32_t* p) { return {_mm256_loadu_si256((const __m256i*)p)}; }
PDIFF_INLINE void store(uint32_t* p, VecInt a) { _mm256_storeu_si256((__m256i*)p, a.v); }
PDIFF_INLINE void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }
template <typename T>
PDIFF_INLINE int compress(T* p, int lanes, const T* a) {
  int n = 0;
  for (; lanes != 0; lanes &= lanes - 1) p[n++] = a[__builtin_ctz(lanes)];
  return n;
}
PDIFF_INLINE int store_compressed(float* p, Mask m, Vec a) {
  float lanes[Vec::kLanes];
  _mm256_storeu_ps(lanes, a.v);
  return compress(p, lane_bits(m), lanes);
}
PDIFF_INLINE int store_compressed(int32_t* p, Mask m, VecInt a) {
  int32_t lanes[Vec::kLanes];
  _mm256_storeu_si256((__m256i*)lanes, a.v);
  return compress(p, lane_bits(m), lanes);
}

// Arithmetic.
PDIFF_INLINE Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
PDIFF_INLINE Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
PDIFF_INLINE Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
PDIFF_INLINE Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
PDIFF_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
PDIFF_INLINE Vec fnma(Vec a, Vec b, Vec c) { return {_mm256_fnmadd_ps(a.v, b.v, c.v)}; }
PDIFF_INLINE Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
PDIFF_INLINE Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
PDIFF_INLINE VecInt operator+(VecInt a, VecInt b) { return {_mm256_add_epi32(a.v, b.v)}; }
PDIFF_INLINE VecInt operator^(VecInt a, VecInt b) { return {_mm256_xor_si256(a.v, b.v)}; }
PDIFF_INLINE VecInt operator^(VecInt a, uint32_t b) {
  return a ^ broadcast_int(static_cast<int32_t>(b));
}
PDIFF_INLINE VecInt operator>>(VecInt a, int n) { return {_mm256_srli_epi32(a.v, n)}; }
PDIFF_INLINE WideProduct<VecInt> multiply_wide(VecInt a, uint32_t b) {
  constexpr int kOddLanes = 0xaa;
  const __m256i factor = _mm256_set1_epi32(static_cast<int32_t>(b));
  const __m256i even = _mm256_mul_epu32(a.v, factor);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(a.v, 32), factor);
  return {{_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, kOddLanes)},
          {_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), kOddLanes)}};
}

PDIFF_INLINE VecInt bits(Vec a) { return {_mm256_castps_si256(a.v)}; }
PDIFF_INLINE Vec to_float(VecInt a) { return {_mm256_cvtepi32_ps(a.v)}; }
PDIFF_INLINE Vec to_float_unsigned(VecInt a) {  // both halves are exact, so it is rounded once
  const Vec low = to_float(VecInt{_mm256_and_si256(a.v, _mm256_set1_epi32(0xffff))});
  return fma(to_float(a >> 16), broadcast(65536.0f), low);
}

// Comparisons.
PDIFF_INLINE Mask operator<(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
PDIFF_INLINE Mask operator>=(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_GE_OQ)}; }
PDIFF_INLINE Mask operator==(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)}; }
PDIFF_INLINE Mask not_less(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_NLT_UQ)}; }
PDIFF_INLINE Mask is_nan(Vec a) { return {_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q)}; }
PDIFF_INLINE Mask operator<=(VecInt a, VecInt b) {
  return ~Mask{_mm256_castsi256_ps(_mm256_cmpgt_epi32(a.v, b.v))};
}
PDIFF_INLINE Mask any_bit(VecInt a, int32_t bits) {
  const __m256i common = _mm256_and_si256(a.v, _mm256_set1_epi32(bits));
  return ~Mask{_mm256_castsi256_ps(_mm256_cmpeq_epi32(common, _mm256_setzero_si256()))};
}

// Reductions.
PDIFF_INLINE float first_lane(Vec a) { return _mm256_cvtss_f32(a.v); }
template <typename F>
PDIFF_INLINE float reduce(Vec a, F f) {
  a = f(a, Vec{_mm256_permute2f128_ps(a.v, a.v, 1)});
  a = f(a, Vec{_mm256_permute_ps(a.v, 0x4e)});
  return first_lane(f(a, Vec{_mm256_permute_ps(a.v, 0xb1)}));
}
PDIFF_INLINE float reduce_add(Vec a) {
  return reduce(a, [](Vec x, Vec y) { return x + y; });
}
PDIFF_INLINE float reduce_max(Vec a) {
  return reduce(a, [](Vec x, Vec y) { return max(x, y); });
}
PDIFF_INLINE float reduce_min(Vec a) {
  return reduce(a, [](Vec x, Vec y) { return min(x, y); });
}

PDIFF_INLINE void interleave(VecInt (&a)[4]) {
  const __m256i lo01 = _mm256_unpacklo_epi32(a[0].v, a[1].v);
  const __m256i hi01 = _mm256_unpackhi_epi32(a[0].v, a[1].v);
  const __m256i lo23 = _mm256_unpacklo_epi32(a[2].v, a[3].v);
  const __m256i hi23 = _mm256_unpackhi_epi32(a[2].v, a[3].v);
  // Half h of quad i holds lane 4 * h + i of the four.
  const __m256i quad0 = _mm256_unpacklo_epi64(lo01, lo23);
  const __m256i quad1 = _mm256_unpackhi_epi64(lo01, lo23);
  const __m256i quad2 = _mm256_unpacklo_epi64(hi01, hi23);
  const __m256i quad3 = _mm256_unpackhi_epi64(hi01, hi23);
  a[0].v = _mm256_permute2x128_si256(quad0, quad1, 0x20);
  a[1].v = _mm256_permute2x128_si256(quad2, quad3, 0x20);
  a[2].v = _mm256_permute2x128_si256(quad0, quad1, 0x31);
  a[3].v = _mm256_permute2x128_si256(quad2, quad3, 0x31);
}

// In blocks of 2 x 2 numbers, then of pairs, then of halves of a vector.
PDIFF_INLINE void transpose(Vec (&rows)[Vec::kLanes]) {
  __m256 a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps(rows[i].v, rows[i + 1].v);
    a[i + 1] = _mm256_unpackhi_ps(rows[i].v, rows[i + 1].v);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int j = 0; j < 2; ++j) {
      b[i + 2 * j] = _mm256_shuffle_ps(a[i + j], a[i + j + 2], 0x44);
      b[i + 2 * j + 1] = _mm256_shuffle_ps(a[i + j], a[i + j + 2], 0xee);
    }
  }
  for (int i = 0; i < 4; ++i) {  // half h of b[4 * g + i] holds lane 4 * h + i of rows 4 * g ..
    rows[i].v = _mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
    rows[i + 4].v = _mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
  }
}

PDIFF_INLINE Vec round(Vec a) {
  return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
PDIFF_INLINE Vec scale_by_power(Vec a, Vec n) {  // in two factors, each representable
  const __m256i power = _mm256_cvtps_epi32(min(n, broadcast(252.0f)).v);
  const __m256i half = _mm256_srai_epi32(power, 1), bias = _mm256_set1_epi32(127);
  const __m256i low = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
  const __m256i rest = _mm256_add_epi32(_mm256_sub_epi32(power, half), bias);
  const __m256i high = _mm256_slli_epi32(rest, 23);
  return a * Vec{_mm256_castsi256_ps(low)} * Vec{_mm256_castsi256_ps(high)};
}
PDIFF_INLINE Vec scale_by_power(Mask m, Vec a, Vec n) {
  return {_mm256_and_ps(m.v, scale_by_power(a, n).v)};
}

}  // namespace
}  // namespace pdiff::cpu::PDIFF_ISA

#include "cpu/vec/math.h"
