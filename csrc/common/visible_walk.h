#pragma once

// What query rows and keys see of one another, met block by block. Host and device code.
//
// A walk belongs to one owner, a row or a key, and goes over the positions that it may see: keys
// for a row, rows for a key. Owners that walk together, the rows of a query tile or the keys of a
// key tile, take the same blocks of positions: the first starts where any of them sees a position,
// the next where any of them sees one past the block before.

#include <cstdint>

#include "common/macros.h"
#include "common/tile_walk.h"

namespace pdiff {

/// Positions [lo, hi).
struct Positions {
  int32_t lo, hi;
};

inline constexpr int32_t kNowhere = INT32_MAX;

/// The bits [lo, hi) of a word, 0 <= lo < hi <= 64.
PDIFF_HD uint64_t bits_between(int32_t lo, int32_t hi) {
  return (~uint64_t{0} << lo) & (~uint64_t{0} >> (64 - hi));
}

/// The keys of a query row.
struct KeysOfRow {
  const KeyInterval* intervals;
  int32_t num_intervals, hidden;  // of the last interval's keys

  PDIFF_HD Positions operator[](int32_t i) const {
    const KeyInterval interval = intervals[i];
    return {interval.lo, interval.hi - (i + 1 == num_intervals ? hidden : 0)};
  }
  PDIFF_HD int32_t size() const { return num_intervals; }
};

/// `segment` is the first one that may hold the row.
PDIFF_HD KeysOfRow keys_of_row(const SegmentsView& view, int32_t segment, int32_t row) {
  while (segment < view.num_segments && view.segments[segment].q_hi <= row) ++segment;
  if (segment == view.num_segments || view.segments[segment].q_lo > row) return {nullptr, 0, 0};
  const Segment s = view.segments[segment];
  const int32_t first = view.interval_ptr[segment];
  return {view.intervals + first, view.interval_ptr[segment + 1] - first,
          s.kind == SegmentKind::kCausal ? s.q_hi - 1 - row : 0};
}

/// The rows that see a key, packed: a token's rows are the heads of a group, one after another.
/// They are counted from the sequence's last row back, because most keys are seen to the end: so
/// key tiles that start together go through the same rows at the same time.
struct RowsOfKey {
  const Segment* ranges;
  int32_t num_ranges, key;  // the key counts from the start of its key segment
  int32_t num_tokens, group_size;

  PDIFF_HD Positions operator[](int32_t i) const {
    const Segment range = ranges[num_ranges - 1 - i];
    const int32_t first = range.q_lo + (range.kind == SegmentKind::kCausal ? key : 0);
    return {(num_tokens - range.q_hi) * group_size, (num_tokens - first) * group_size};
  }
  PDIFF_HD int32_t size() const { return num_ranges; }
};

/// `segment` is the first key segment of the plan that may hold the key.
PDIFF_HD RowsOfKey rows_of_key(const PlanView& plan, const PlanSequence& sequence, int32_t segment,
                               int32_t key, int32_t group_size) {
  const KeyInterval* segments = plan.key_segments + sequence.key_segment_begin;
  while (segment < sequence.num_key_segments && segments[segment].hi <= key) ++segment;
  if (segment == sequence.num_key_segments || segments[segment].lo > key) {
    return {nullptr, 0, 0, 0, 0};
  }
  const int32_t* range_ptr = plan.range_ptr + sequence.key_segment_begin + segment;
  return {plan.ranges + range_ptr[0], range_ptr[1] - range_ptr[0], key - segments[segment].lo,
          sequence.num_rows, group_size};
}

template <typename Seen>
class VisibleWalk {
 public:
  PDIFF_HD explicit VisibleWalk(const Seen& seen) : seen_(seen) { step(); }

  /// The first position at or after `position` that the owner sees, or kNowhere. What is before
  /// has been walked.
  PDIFF_HD int32_t next_from(int32_t position) const {
    return interval_.lo > position ? interval_.lo : position;
  }

  /// Which of the `size` <= 64 positions from `position` on the owner sees, as bits. Then they have
  /// been walked.
  PDIFF_HD uint64_t take(int32_t position, int32_t size) {
    uint64_t bits = 0;
    while (interval_.lo < position + size) {
      const int32_t lo = interval_.lo > position ? interval_.lo - position : 0;
      const int32_t hi = interval_.hi - position < size ? interval_.hi - position : size;
      if (lo < hi) bits |= bits_between(lo, hi);
      if (interval_.hi > position + size) break;
      step();
    }
    return bits;
  }

 private:
  PDIFF_HD void step() {
    interval_ = next_ < seen_.size() ? seen_[next_++] : Positions{kNowhere, kNowhere};
  }

  Seen seen_;
  int32_t next_ = 0;
  Positions interval_{};  // the first one that has not been walked to its end
};

}  // namespace pdiff
