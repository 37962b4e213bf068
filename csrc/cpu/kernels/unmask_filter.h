#pragma once

// Top-p and top-k without a sort: where the kept prefix of a list of tokens ends.

#include <cfloat>
#include <cmath>

#include "cpu/kernels/unmask_block.h"

namespace pdiff::cpu::PDIFF_ISA {
namespace {

struct List {
  float* logits;
  int32_t* ids;  // ascending; null: not wanted
  int n;
};

// The last entry of a prefix in the order (logit descending, id ascending).
struct Boundary {
  float logit;
  int32_t id;
};

struct Range {
  float lo, hi;
};

Range range_of(const List& list) {
  Vec lo = broadcast(kInf), hi = broadcast(-kInf);
  for (int i = 0; i < list.n; i += kLanes) {
    const Mask valid = first_lanes(list.n - i);
    const Vec x = load(list.logits + i);
    lo = select(valid, min(x, lo), lo);
    hi = select(valid, max(x, hi), hi);
  }
  return {reduce_min(lo), reduce_max(hi)};
}

// Entries of `from` with logit >= pivot, or those below it, in their order. `to` may be `from`.
List take_side(const List& from, const List& to, float pivot, bool upper) {
  int n = 0;
  for (int i = 0; i < from.n; i += kLanes) {
    const Vec x = load(from.logits + i);
    const Mask above = x >= broadcast(pivot);
    const Mask chosen = (upper ? above : ~above) & first_lanes(from.n - i);
    if (!any(chosen)) continue;
    if (from.ids != nullptr) store_compressed(to.ids + n, chosen, load(from.ids + i));
    n += store_compressed(to.logits + n, chosen, x);
  }
  return {to.logits, from.ids != nullptr ? to.ids : nullptr, n};
}

struct Prefix {
  double mass;
  int64_t num;
};

// How much of the list is >= pivot; its mass only where asked for.
Prefix measure_above(const List& list, float pivot, bool wants_mass, float max_logit, float scale) {
  Prefix above = {0.0, 0};
  for (int begin = 0; begin < list.n; begin += kUnmaskBlock) {
    const int end = begin + kUnmaskBlock < list.n ? begin + kUnmaskBlock : list.n;
    Vec mass = zero();
    for (int i = begin; i < end; i += kLanes) {
      const Vec x = load(list.logits + i);
      const Mask chosen = (x >= broadcast(pivot)) & first_lanes(end - i);
      above.num += count(chosen);
      if (!wants_mass || !any(chosen)) continue;
      const Vec d = (x - broadcast(max_logit)) * broadcast(scale);
      mass = mass + select(chosen, exp2_bounded(d), zero());
    }
    above.mass += reduce_add(mass);
  }
  return above;
}

// Where the shortest prefix that reaches either goal ends, found by halving the range of logits:
// only the half that holds the boundary is looked at again, so the work is a small multiple of the
// list.
Boundary find_boundary(List list, const List& work, Prefix goal, float max_logit, float scale) {
  const bool wants_mass = goal.mass < DBL_MAX;
  Prefix kept = {0.0, 0};
  Range range = range_of(list);
  while (range.lo < range.hi) {
    float pivot = 0.5f * range.lo + 0.5f * range.hi;
    if (!(pivot > range.lo)) pivot = range.hi;  // neighbours
    const Prefix above = measure_above(list, pivot, wants_mass, max_logit, scale);
    const bool upper = kept.mass + above.mass >= goal.mass || kept.num + above.num >= goal.num;
    if (!upper) kept = {kept.mass + above.mass, kept.num + above.num};
    list = take_side(list, work, pivot, upper);
    range = range_of(list);
  }
  // Equal logits are left. Top-k keeps all of them, top-p those of lowest id that it needs.
  const double weight = ::exp2(static_cast<double>(range.lo - max_logit) * scale);
  const double num = fmin(list.n, ceil((goal.mass - kept.mass) / weight));
  const int last = num > 1.0 ? static_cast<int>(num) - 1 : 0;
  return {range.lo, list.ids != nullptr ? list.ids[last] : -1};
}

// The part of a prefix of `list` up to its boundary, padded.
List take_prefix(const List& list, const List& to, Boundary boundary) {
  int n = 0;
  for (int i = 0; i < list.n; i += kLanes) {
    const Vec x = load(list.logits + i), edge = broadcast(boundary.logit);
    const VecInt id = load(list.ids + i);
    const Mask tied = (x == edge) & (id <= broadcast_int(boundary.id));
    const Mask kept = ((edge < x) | tied) & first_lanes(list.n - i);
    if (!any(kept)) continue;
    store_compressed(to.ids + n, kept, id);
    n += store_compressed(to.logits + n, kept, x);
  }
  for (int i = n; i < padded(n); ++i) {
    to.logits[i] = -kInf;
    to.ids[i] = 0;
  }
  return {to.logits, to.ids, n};
}

}  // namespace
}  // namespace pdiff::cpu::PDIFF_ISA
