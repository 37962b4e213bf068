#pragma once

// Functions built from the vector layer's primitives, the same text for every instruction set.

namespace pdiff::cpu::PDIFF_ISA {
namespace {

// 2^f = 1 + f * (...) on [-1/2, 1/2], relative error below 3e-9 before rounding.
PDIFF_INLINE Vec exp2_fraction(Vec f) {
  Vec p = broadcast(0x1.470b4ap-13f);
  p = fma(p, f, broadcast(0x1.5f7276p-10f));
  p = fma(p, f, broadcast(0x1.3b270ep-7f));
  p = fma(p, f, broadcast(0x1.c6ae72p-5f));
  p = fma(p, f, broadcast(0x1.ebfbe2p-3f));
  p = fma(p, f, broadcast(0x1.62e432p-1f));
  return fma(p, f, broadcast(1.0f));
}

// e^r = 1 + r + r^2 * (...) on [-ln(2)/2, ln(2)/2], relative error below 4e-9 before rounding.
PDIFF_INLINE Vec exp_fraction(Vec r) {
  Vec p = broadcast(0x1.6a2434p-10f);
  p = fma(p, r, broadcast(0x1.1239e2p-7f));
  p = fma(p, r, broadcast(0x1.5558f2p-5f));
  p = fma(p, r, broadcast(0x1.555492p-3f));
  p = fma(p, r, broadcast(0x1.fffffcp-2f));
  return fma(p * r, r, r) + broadcast(1.0f);
}

/// 2^x and e^x within 2 ulp. Results below the smallest normal number are 0 (a denormal would cost
/// an assist in everything that touches it), -inf gives 0, overflow and +inf give +inf, NaN stays.
/// exp2_bounded saves the step that overflow needs; x <= 127 or NaN.
PDIFF_INLINE Vec exp2_bounded(Vec x) {
  const Mask normal = not_less(x, broadcast(-126.0f));
  const Vec n = round(x);
  return scale_by_power(normal, exp2_fraction(x - n), n);
}

PDIFF_INLINE Vec exp2(Vec x) { return exp2_bounded(min(broadcast(129.0f), x)); }

PDIFF_INLINE Vec exp(Vec x) {
  const Mask normal = not_less(x, broadcast(-87.33654f));
  x = min(broadcast(89.5f), x);
  const Vec n = round(x * broadcast(1.44269504f));
  // x - n * ln(2), the constant in two parts: the first has few enough bits for an exact product
  const Vec r = fnma(n, broadcast(-2.12194440e-4f), fnma(n, broadcast(0.693359375f), x));
  return scale_by_power(normal, exp_fraction(r), n);
}

}  // namespace
}  // namespace pdiff::cpu::PDIFF_ISA
