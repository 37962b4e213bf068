#pragma once

// The vector layer on AVX-512 (F, BW, DQ, VL; bfloat16 conversion in one instruction where the
// translation unit allows AVX512_BF16). vec/generic.h documents the interface.

// GCC 12 warns about the deliberately undefined registers inside its own intrinsics (bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop

#include <cstdint>

#include "common/macros.h"
#include "common/wide_product.h"
#include "pdiff/dtype.h"

#ifndef PDIFF_ISA
#define PDIFF_ISA avx512
#endif

namespace pdiff::cpu::PDIFF_ISA {
namespace {

struct Vec {
  static constexpr int kLanes = 16;
  __m512 v;
};

struct Mask {
  __mmask16 bits;
};

struct VecInt {
  __m512i v;
};

// Masks.
PDIFF_INLINE Mask first_lanes(int n) {
  return {static_cast<__mmask16>(n >= 16 ? 0xffffu : n <= 0 ? 0u : (1u << n) - 1u)};
}
PDIFF_INLINE Mask operator&(Mask a, Mask b) { return {_kand_mask16(a.bits, b.bits)}; }
PDIFF_INLINE Mask operator|(Mask a, Mask b) { return {_kor_mask16(a.bits, b.bits)}; }
PDIFF_INLINE Mask operator~(Mask a) { return {_knot_mask16(a.bits)}; }
PDIFF_INLINE bool any(Mask m) { return m.bits != 0; }
PDIFF_INLINE bool all(Mask m) { return m.bits == 0xffff; }
PDIFF_INLINE int count(Mask m) { return __builtin_popcount(m.bits); }
PDIFF_INLINE int first_set(Mask m) { return __builtin_ctz(m.bits); }

// Constants.
PDIFF_INLINE Vec broadcast(float x) { return {_mm512_set1_ps(x)}; }
PDIFF_INLINE Vec zero() { return {_mm512_setzero_ps()}; }
PDIFF_INLINE VecInt broadcast_int(int32_t x) { return {_mm512_set1_epi32(x)}; }
PDIFF_INLINE VecInt iota() {
  return {_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)};
}

// Memory.
PDIFF_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
PDIFF_INLINE Vec load_first(const float* p, int n, float fill = 0.0f) {
  return {_mm512_mask_loadu_ps(_mm512_set1_ps(fill), first_lanes(n).bits, p)};
}
PDIFF_INLINE void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
PDIFF_INLINE void store_first(float* p, Vec a, int n) {
  _mm512_mask_storeu_ps(p, first_lanes(n).bits, a.v);
}

PDIFF_INLINE Vec widen(__m256i halves, bfloat16) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16))};
}
PDIFF_INLINE Vec widen(__m256i halves, float16) { return {_mm512_cvtph_ps(halves)}; }
PDIFF_INLINE __m256i narrow(Vec a, bfloat16) {
#if defined(__AVX512BF16__)
  return (__m256i)_mm512_cvtneps_pbh(a.v);
#else
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i bias = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  __m512i rounded = _mm512_add_epi32(bits, bias);
  rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));  // stays a NaN
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
#endif
}
PDIFF_INLINE __m256i narrow(Vec a, float16) {
  return _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
template <typename Half>
PDIFF_INLINE Vec load(const Half* p) {
  return widen(_mm256_loadu_si256((const __m256i*)p), Half{});
}
template <typename Half>
PDIFF_INLINE Vec load_first(const Half* p, int n, float fill = 0.0f) {
  const __mmask16 m = first_lanes(n).bits;
  const Vec a = widen(_mm256_maskz_loadu_epi16(m, p), Half{});
  return {_mm512_mask_mov_ps(_mm512_set1_ps(fill), m, a.v)};
}
template <typename Half>
PDIFF_INLINE void store(Half* p, Vec a) {
  _mm256_storeu_si256((__m256i*)p, narrow(a, Half{}));
}
template <typename Half>
PDIFF_INLINE void store_first(Half* p, Vec a, int n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n).bits, narrow(a, Half{}));
}

PDIFF_INLINE VecInt load(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
PDIFF_INLINE void store(uint32_t* p, VecInt a) { _mm512_storeu_si512(p, a.v); }
PDIFF_INLINE void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }
PDIFF_INLINE int store_compressed(float* p, Mask m, Vec a) {
  _mm512_storeu_ps(p, _mm512_maskz_compress_ps(m.bits, a.v));
  return count(m);
}
PDIFF_INLINE int store_compressed(int32_t* p, Mask m, VecInt a) {
  _mm512_storeu_si512(p, _mm512_maskz_compress_epi32(m.bits, a.v));
  return count(m);
}

// Arithmetic.
PDIFF_INLINE Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
PDIFF_INLINE Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
PDIFF_INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
PDIFF_INLINE Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
PDIFF_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
PDIFF_INLINE Vec fnma(Vec a, Vec b, Vec c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }
PDIFF_INLINE Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
PDIFF_INLINE Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
PDIFF_INLINE VecInt operator+(VecInt a, VecInt b) { return {_mm512_add_epi32(a.v, b.v)}; }
PDIFF_INLINE VecInt operator^(VecInt a, VecInt b) { return {_mm512_xor_si512(a.v, b.v)}; }
PDIFF_INLINE VecInt operator^(VecInt a, uint32_t b) {
  return a ^ broadcast_int(static_cast<int32_t>(b));
}
PDIFF_INLINE VecInt operator>>(VecInt a, int n) { return {_mm512_srli_epi32(a.v, n)}; }
PDIFF_INLINE WideProduct<VecInt> multiply_wide(VecInt a, uint32_t b) {
  constexpr _MM_PERM_ENUM kSwapPairs = _MM_PERM_CDAB;
  const __m512i factor = _mm512_set1_epi32(static_cast<int32_t>(b));
  const __m512i even = _mm512_mul_epu32(a.v, factor);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(a.v, 32), factor);
  return {{_mm512_mask_shuffle_epi32(odd, 0x5555, even, kSwapPairs)},
          {_mm512_mask_shuffle_epi32(even, 0xaaaa, odd, kSwapPairs)}};
}

PDIFF_INLINE VecInt bits(Vec a) { return {_mm512_castps_si512(a.v)}; }
PDIFF_INLINE Vec to_float(VecInt a) { return {_mm512_cvtepi32_ps(a.v)}; }
PDIFF_INLINE Vec to_float_unsigned(VecInt a) { return {_mm512_cvtepu32_ps(a.v)}; }

// Comparisons.
PDIFF_INLINE Mask operator<(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
PDIFF_INLINE Mask operator>=(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ)}; }
PDIFF_INLINE Mask operator==(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }
PDIFF_INLINE Mask not_less(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_NLT_UQ)}; }
PDIFF_INLINE Mask is_nan(Vec a) { return {_mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q)}; }
PDIFF_INLINE Mask operator<=(VecInt a, VecInt b) { return {_mm512_cmple_epi32_mask(a.v, b.v)}; }
PDIFF_INLINE Mask any_bit(VecInt a, int32_t bits) {
  return {_mm512_test_epi32_mask(a.v, _mm512_set1_epi32(bits))};
}
PDIFF_INLINE VecInt select(Mask m, VecInt a, VecInt b) {
  return {_mm512_mask_blend_epi32(m.bits, b.v, a.v)};
}
PDIFF_INLINE Vec select(Mask m, Vec a, Vec b) { return {_mm512_mask_blend_ps(m.bits, b.v, a.v)}; }

// Reductions.
PDIFF_INLINE float first_lane(Vec a) { return _mm512_cvtss_f32(a.v); }
PDIFF_INLINE float reduce_add(Vec a) { return _mm512_reduce_add_ps(a.v); }
PDIFF_INLINE float reduce_max(Vec a) { return _mm512_reduce_max_ps(a.v); }
PDIFF_INLINE float reduce_min(Vec a) { return _mm512_reduce_min_ps(a.v); }

PDIFF_INLINE void interleave(VecInt (&a)[4]) {
  const __m512i lo01 = _mm512_unpacklo_epi32(a[0].v, a[1].v);
  const __m512i hi01 = _mm512_unpackhi_epi32(a[0].v, a[1].v);
  const __m512i lo23 = _mm512_unpacklo_epi32(a[2].v, a[3].v);
  const __m512i hi23 = _mm512_unpackhi_epi32(a[2].v, a[3].v);
  // Quarter q of quad i holds lane 4 * q + i of the four.
  const __m512i quad0 = _mm512_unpacklo_epi64(lo01, lo23);
  const __m512i quad1 = _mm512_unpackhi_epi64(lo01, lo23);
  const __m512i quad2 = _mm512_unpacklo_epi64(hi01, hi23);
  const __m512i quad3 = _mm512_unpackhi_epi64(hi01, hi23);
  const __m512i even_lo = _mm512_shuffle_i32x4(quad0, quad1, 0x88);  // quarters 0, 2 of both
  const __m512i even_hi = _mm512_shuffle_i32x4(quad2, quad3, 0x88);
  const __m512i odd_lo = _mm512_shuffle_i32x4(quad0, quad1, 0xdd);
  const __m512i odd_hi = _mm512_shuffle_i32x4(quad2, quad3, 0xdd);
  a[0].v = _mm512_shuffle_i32x4(even_lo, even_hi, 0x88);
  a[1].v = _mm512_shuffle_i32x4(odd_lo, odd_hi, 0x88);
  a[2].v = _mm512_shuffle_i32x4(even_lo, even_hi, 0xdd);
  a[3].v = _mm512_shuffle_i32x4(odd_lo, odd_hi, 0xdd);
}

// In blocks of 2 x 2 numbers, then of pairs, then of quarters and halves of a vector.
PDIFF_INLINE void transpose(Vec (&rows)[Vec::kLanes]) {
  __m512 a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_ps(rows[i].v, rows[i + 1].v);
    a[i + 1] = _mm512_unpackhi_ps(rows[i].v, rows[i + 1].v);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      const __m512d lo = _mm512_castps_pd(a[i + j]), hi = _mm512_castps_pd(a[i + j + 2]);
      b[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(lo, hi));
      b[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(lo, hi));
    }
  }
  // Quarter q of b[4 * g + i] now holds lane 4 * q + i of rows 4 * g to 4 * g + 3.
  for (int i = 0; i < 4; ++i) {
    const __m512 even_lo = _mm512_shuffle_f32x4(b[i], b[i + 4], 0x88);
    const __m512 even_hi = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0x88);
    const __m512 odd_lo = _mm512_shuffle_f32x4(b[i], b[i + 4], 0xdd);
    const __m512 odd_hi = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0xdd);
    rows[i].v = _mm512_shuffle_f32x4(even_lo, even_hi, 0x88);
    rows[i + 4].v = _mm512_shuffle_f32x4(odd_lo, odd_hi, 0x88);
    rows[i + 8].v = _mm512_shuffle_f32x4(even_lo, even_hi, 0xdd);
    rows[i + 12].v = _mm512_shuffle_f32x4(odd_lo, odd_hi, 0xdd);
  }
}

PDIFF_INLINE Vec round(Vec a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
PDIFF_INLINE Vec scale_by_power(Mask m, Vec a, Vec n) {
  return {_mm512_maskz_scalef_ps(m.bits, a.v, n.v)};
}

}  // namespace
}  // namespace pdiff::cpu::PDIFF_ISA

#include "cpu/vec/math.h"
