#pragma once

// A block of logits: what one visit to the first-level cache computes.

#include <cmath>

#include "cpu/unmask_rows.h"

namespace pdiff::cpu::PDIFF_ISA {
namespace {

constexpr int kLanes = Vec::kLanes;
constexpr int kUnroll = 4;  // independent chains, enough to cover the latency of an addition
constexpr int kStride = kUnroll * kLanes;
constexpr float kInf = __builtin_inff();
static_assert(kUnmaskPad % kStride == 0 && kUnmaskBlock % kUnmaskPad == 0);

PDIFF_INLINE int padded(int n) { return (n + kUnmaskPad - 1) / kUnmaskPad * kUnmaskPad; }

// Logits [begin, begin + n) as floats with bans applied, padded: the row itself where that is what
// it holds, else a copy in `buffer`.
template <typename T>
const float* load_block(const UnmaskRows& rows, const T* row, int begin, int n, float* buffer) {
  int ban = 0, end = rows.num_banned;  // the first banned id >= begin
  while (ban < end) {
    const int middle = (ban + end) / 2;
    if (rows.banned[middle] < begin) {
      ban = middle + 1;
    } else {
      end = middle;
    }
  }
  const bool has_bans = ban < rows.num_banned && rows.banned[ban] < begin + n;
  if constexpr (sizeof(T) == sizeof(float)) {
    if (!has_bans && n % kUnmaskPad == 0) return row + begin;
  }
  for (int i = 0; i < padded(n); i += kLanes) {
    store(buffer + i, load_first(row + begin + i, n - i, -kInf));
  }
  for (; ban < rows.num_banned && rows.banned[ban] < begin + n; ++ban) {
    buffer[rows.banned[ban] - begin] = -kInf;
  }
  return buffer;
}

struct BlockMax {
  float first, second;
  Vec lanes;
};

// The two largest values, NaN ignored.
PDIFF_INLINE BlockMax block_max(const float* x, int n) {
  Vec first[kUnroll], second[kUnroll];
  for (int u = 0; u < kUnroll; ++u) first[u] = second[u] = broadcast(-kInf);
  for (int i = 0; i < n; i += kStride) {
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) {
      const Vec v = load(x + i + u * kLanes);
      second[u] = max(min(v, first[u]), second[u]);
      first[u] = max(v, first[u]);
    }
  }
  for (int u = 1; u < kUnroll; ++u) {
    second[0] = max(max(second[0], second[u]), min(first[0], first[u]));
    first[0] = max(first[0], first[u]);
  }
  const float largest = reduce_max(first[0]);
  const Mask at_largest = first[0] == broadcast(largest);
  const Vec others = select(at_largest, broadcast(-kInf), first[0]);
  const float below = fmaxf(reduce_max(others), reduce_max(second[0]));
  return {largest, count(at_largest) > 1 ? largest : below, first[0]};
}

PDIFF_INLINE int find(const float* x, float value) {
  for (int i = 0;; i += kLanes) {
    const Mask found = load(x + i) == broadcast(value);
    if (any(found)) return i + first_set(found);
  }
}

struct BlockSum {
  float sum, weighted;
};

// sum 2^d, sum d 2^d. d ends at -127, where 2^d counts as 0, so that -inf adds 0 and not -inf * 0.
// The second operand of max keeps a NaN, which so reaches the sum.
PDIFF_INLINE BlockSum block_sum(const float* x, int n, float max_logit, float scale,
                                const char* next) {
  Vec sum[kUnroll], weighted[kUnroll];
  for (int u = 0; u < kUnroll; ++u) sum[u] = weighted[u] = zero();
  const Vec m = broadcast(max_logit), s = broadcast(scale), floor = broadcast(-127.0f);
  for (int i = 0; i < n; i += kStride) {
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) {
      prefetch(next + (i + u * kLanes) * sizeof(float));
      const Vec d = max(floor, (load(x + i + u * kLanes) - m) * s);
      const Vec e = exp2_bounded(d);
      sum[u] = sum[u] + e;
      weighted[u] = fma(d, e, weighted[u]);
    }
  }
  return {reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3])),
          reduce_add((weighted[0] + weighted[1]) + (weighted[2] + weighted[3]))};
}

}  // namespace
}  // namespace pdiff::cpu::PDIFF_ISA
