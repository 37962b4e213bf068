#pragma once

// Checks of the vector layer, run for the instruction set whose header was included before this
// one.

#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>

#include "tests/check.h"

namespace pdiff::cpu::PDIFF_ISA {
namespace {

constexpr int kLanes = Vec::kLanes;
float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

uint32_t to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

template <typename Function, typename Exact>
double worst_ulp(Function function, Exact exact, float lo, float hi) {
  double worst = 0.0;
  float in[kLanes], out[kLanes];
  for (uint32_t bits = 0; bits < 0xff000000u; bits += 251 * kLanes) {
    for (int i = 0; i < kLanes; ++i) in[i] = from_bits(bits + 251 * i);
    store(out, function(load(in)));
    for (int i = 0; i < kLanes; ++i) {
      if (!(in[i] >= lo && in[i] <= hi)) continue;
      const double reference = exact(static_cast<double>(in[i]));
      const float nearest = static_cast<float>(reference);
      const double ulp = std::nextafter(nearest, INFINITY) - static_cast<double>(nearest);
      worst = std::fmax(worst, std::fabs(out[i] - reference) / ulp);
    }
  }
  return worst;
}

template <typename Function>
void check_exp_edges(Function function, float last_normal) {
  const float inf = INFINITY, nan = NAN;
  const float in[] = {-inf, -1e30f, 1.01f * last_normal, 200.0f, 1e30f, inf, nan, 0.0f};
  const float out[] = {0.0f, 0.0f, 0.0f, inf, inf, inf, nan, 1.0f};
  for (int i = 0; i < 8; ++i) {
    float actual[kLanes];
    store(actual, function(broadcast(in[i])));
    CHECK(actual[0] == out[i] || (out[i] != out[i] && actual[0] != actual[0]));
  }
}

TEST(exp_within_2_ulp) {
  const double worst_exp =
      worst_ulp([](Vec x) { return exp(x); }, [](double x) { return std::exp(x); }, -87.33f, 88.7f);
  const double worst_exp2 = worst_ulp([](Vec x) { return exp2(x); },
                                      [](double x) { return std::exp2(x); }, -126.0f, 127.99f);
  std::printf("exp %.3f ulp, exp2 %.3f ulp\n", worst_exp, worst_exp2);
  CHECK(worst_exp <= 2.0);
  CHECK(worst_exp2 <= 2.0);
  check_exp_edges([](Vec x) { return exp(x); }, -87.34f);
  check_exp_edges([](Vec x) { return exp2(x); }, -126.1f);
}

// Every upper half with lower halves around the tie.
TEST(bfloat16_rounds_to_nearest_even) {
  const uint32_t lower_halves[] = {0x0000, 0x0001, 0x7fff, 0x8000, 0x8001, 0xffff};
  for (uint32_t upper = 0; upper < 0x10000; ++upper) {
    for (uint32_t lower : lower_halves) {
      const float x = from_bits(upper << 16 | lower);
      bfloat16 rounded[kLanes];
      float widened[kLanes];
      store(rounded, broadcast(x));
      store(widened, load(rounded));
      if (x != x) {
        CHECK(widened[0] != widened[0]);
        continue;
      }
      if (std::fabs(x) < std::numeric_limits<float>::min()) continue;  // hardware may flush
      const uint32_t expected = upper + (lower > 0x8000 || (lower == 0x8000 && (upper & 1)));
      CHECK(to_bits(widened[0]) == expected << 16);
    }
  }
}

// What a half is worth.
float value_of(uint32_t half) {
  const int exponent = static_cast<int>(half >> 10 & 31), fraction = static_cast<int>(half & 1023);
  const float magnitude = exponent == 0
                              ? std::ldexp(static_cast<float>(fraction), -24)
                              : std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
  return half >> 15 != 0 ? -magnitude : magnitude;
}

uint32_t to_half(float x) {
  float16 rounded[kLanes];
  store(rounded, broadcast(x));
  return rounded[0].bits;
}

// Every half, and between it and the next one of its sign the tie and both its neighbours. Past the
// largest half comes what would be 2^16, and is infinity.
TEST(float16_rounds_to_nearest_even) {
  for (uint32_t half = 0; half < 0x10000; ++half) {
    float16 halves[kLanes];
    for (float16& x : halves) x.bits = static_cast<uint16_t>(half);
    float widened[kLanes];
    store(widened, load(halves));
    if ((half & 0x7fff) > 0x7c00) {
      CHECK(widened[0] != widened[0] && (to_half(widened[0]) & 0x7fff) > 0x7c00);
      continue;
    }
    if ((half & 0x7fff) == 0x7c00) {
      CHECK_EQ(widened[0], half >> 15 != 0 ? -INFINITY : INFINITY);
      CHECK_EQ(to_half(widened[0]), half);
      CHECK_EQ(to_half(half >> 15 != 0 ? -3e38f : 3e38f), half);
      continue;
    }
    const float value = value_of(half), tie = 0.5f * (value + value_of(half + 1));
    CHECK_EQ(to_bits(widened[0]), to_bits(value));
    CHECK_EQ(to_half(value), half);
    CHECK_EQ(to_half(std::nextafter(tie, 0.0f)), half);
    CHECK_EQ(to_half(tie), half + (half & 1));
    CHECK_EQ(to_half(std::nextafter(tie, 2.0f * value_of(half + 1))), half + 1);
  }
}

template <typename T>
void check_tails(T mark) {
  T in[kLanes + 1], out[kLanes + 1];
  for (int n = 0; n <= kLanes; ++n) {
    for (int i = 0; i <= kLanes; ++i) {
      float whole[kLanes];
      store(whole, broadcast(static_cast<float>(i + 1)));
      store_first(&in[i], load(whole), 1);
      out[i] = mark;
    }
    const Vec v = load_first(in, n, -5.0f);
    store_first(out, v, n);
    float lanes[kLanes];
    store(lanes, v);
    for (int i = 0; i < kLanes; ++i) {
      CHECK(lanes[i] == (i < n ? i + 1 : -5));
      CHECK(std::memcmp(&out[i], i < n ? &in[i] : &mark, sizeof(T)) == 0);
    }
    CHECK(std::memcmp(&out[kLanes], &mark, sizeof(T)) == 0);
  }
}

TEST(masks_and_reductions) {
  float x[kLanes];
  for (int i = 0; i < kLanes; ++i) x[i] = static_cast<float>((i * 5) % kLanes);
  const Vec v = load(x);
  CHECK(reduce_add(v) == kLanes * (kLanes - 1) / 2);
  CHECK(reduce_max(v) == kLanes - 1 && reduce_min(v) == 0);
  const Mask small = v < broadcast(3.0f);
  CHECK(count(small) == 3 && any(small) && !all(small));
  CHECK(count(~small) == kLanes - 3 && count(small & first_lanes(1)) == 1);
  CHECK(first_set(v == broadcast(5.0f)) == 1);
  CHECK(count(first_lanes(-3)) == 0 && all(first_lanes(99)));
  CHECK(reduce_max(select(small, v, zero())) == 2);

  float kept[2 * kLanes];
  int32_t kept_lane[2 * kLanes];
  const int num_kept = store_compressed(kept, small, v);
  CHECK(store_compressed(kept_lane, small, iota() + broadcast_int(100)) == num_kept);
  for (int i = 0; i < num_kept; ++i) {
    CHECK(kept[i] == x[kept_lane[i] - 100] && kept[i] < 3);
    CHECK(i == 0 || kept_lane[i] > kept_lane[i - 1]);
  }

  const Vec nan = broadcast(NAN), one = broadcast(1.0f);
  CHECK(all(is_nan(max(one, nan))) && all(is_nan(min(one, nan))));
  CHECK(all(max(nan, one) == one) && all(min(nan, one) == one));
  CHECK(all(not_less(nan, one)) && !any(nan >= one) && !any(nan < one));
}

TEST(transpose_swaps_rows_and_lanes) {
  Vec rows[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    float row[kLanes];
    for (int j = 0; j < kLanes; ++j) row[j] = 100.0f * i + j;
    rows[i] = load(row);
  }
  transpose(rows);
  for (int i = 0; i < kLanes; ++i) {
    float row[kLanes];
    store(row, rows[i]);
    for (int j = 0; j < kLanes; ++j) CHECK(row[j] == 100.0f * j + i);
  }
}

TEST(integers) {
  uint32_t out[4 * kLanes];
  const VecInt lane = iota() + broadcast_int(-3);
  store(out, lane ^ 5u);
  for (int i = 0; i < kLanes; ++i) CHECK_EQ(out[i], static_cast<uint32_t>(i - 3) ^ 5u);
  store(out, lane >> 2);
  for (int i = 0; i < kLanes; ++i) CHECK_EQ(out[i], static_cast<uint32_t>(i - 3) >> 2);
  const auto product = multiply_wide(lane, 0xD2511F53u);
  store(out, product.high);
  store(out + kLanes, product.low);
  for (int i = 0; i < kLanes; ++i) {
    const uint64_t exact = uint64_t{static_cast<uint32_t>(i - 3)} * 0xD2511F53u;
    CHECK_EQ(uint64_t{out[i]} << 32 | out[kLanes + i], exact);
  }
  store(out, select(any_bit(iota(), 2), lane, iota()));
  for (int i = 0; i < kLanes; ++i) CHECK_EQ(out[i], static_cast<uint32_t>(i & 2 ? i - 3 : i));

  VecInt quads[4];
  for (int k = 0; k < 4; ++k) quads[k] = iota() + broadcast_int(100 * k);
  interleave(quads);
  for (int k = 0; k < 4; ++k) store(out + k * kLanes, quads[k]);
  for (int i = 0; i < 4 * kLanes; ++i)
    CHECK_EQ(out[i], static_cast<uint32_t>(i / 4 + 100 * (i % 4)));

  float converted[kLanes];
  store(converted, to_float(lane));
  CHECK_EQ(converted[0], -3.0f);
  store(converted, to_float_unsigned(lane));
  CHECK_EQ(converted[0], 4294967296.0f);
  store(out, bits(broadcast(1.5f)));
  CHECK_EQ(out[0], 0x3fc00000u);
}

TEST(tails_touch_nothing_else) {
  check_tails(-1.0f);
  check_tails(bfloat16{0xbf80});
  check_tails(float16{0xbc00});
}

}  // namespace
}  // namespace pdiff::cpu::PDIFF_ISA
