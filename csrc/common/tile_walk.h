#pragma once

// Which keys a query tile visits, and what each of its rows sees there. Host and device code.
//
// A tile's keys form runs. A run starts where key intervals of the tile's rows start, so every row
// of the tile sees a prefix of it: keys [key_lo, row's end), possibly none. Rows of several spans
// that share a context share that run, and each span's own keys are a run of their own. Runs come
// in ascending order; what a row meets, and in which order, is decided by the keys it sees alone.

#include <cstdint>

#include "common/macros.h"
#include "pdiff/attention_plan.h"

namespace pdiff {

struct KeyRun {
  int32_t key_lo, key_hi;
};

/// A plan's words as pointers; the words hold a plan.
PDIFF_HD PlanView plan_view_of(const int32_t* words) {
  PlanView view;
  const PlanHeader& h = *reinterpret_cast<const PlanHeader*>(words);
  view.header = h;
  view.sequences = reinterpret_cast<const PlanSequence*>(words + h.sequences);
  view.sequence_order = words + h.sequence_order;
  view.tiles = reinterpret_cast<const PlanTile*>(words + h.tiles);
  view.segments = reinterpret_cast<const Segment*>(words + h.segments);
  view.interval_ptr = words + h.interval_ptr;
  view.intervals = reinterpret_cast<const KeyInterval*>(words + h.intervals);
  view.pages = words + h.pages;
  view.key_tiles = reinterpret_cast<const PlanKeyTile*>(words + h.key_tiles);
  view.key_segments = reinterpret_cast<const KeyInterval*>(words + h.key_segments);
  view.range_ptr = words + h.range_ptr;
  view.ranges = reinterpret_cast<const Segment*>(words + h.ranges);
  return view;
}

/// The segments of one sequence.
struct SegmentsView {
  const Segment* segments;
  const int32_t* interval_ptr;
  const KeyInterval* intervals;
  int32_t num_segments;
};

PDIFF_HD SegmentsView segments_of(const PlanView& plan, const PlanSequence& sequence) {
  return {plan.segments + sequence.segment_begin, plan.interval_ptr + sequence.segment_begin,
          plan.intervals, sequence.num_segments};
}

/// The first segment of [lo, hi) that ends after `row`.
PDIFF_HD int32_t find_segment(const SegmentsView& view, int32_t lo, int32_t hi, int32_t row) {
  while (lo < hi) {
    const int32_t mid = lo + (hi - lo) / 2;
    if (view.segments[mid].q_hi <= row) {
      lo = mid + 1;
    } else {
      hi = mid;
    }
  }
  return lo;
}

/// The first interval of a segment with `interval.lo >= key`.
PDIFF_HD int32_t find_interval(const SegmentsView& view, int32_t segment, int32_t key) {
  int32_t lo = view.interval_ptr[segment], hi = view.interval_ptr[segment + 1];
  while (lo < hi) {
    const int32_t mid = lo + (hi - lo) / 2;
    if (view.intervals[mid].lo < key) {
      lo = mid + 1;
    } else {
      hi = mid;
    }
  }
  return lo;
}

/// Where the keys of `interval` end for a row of `segment`. A causal segment's last interval ends
/// one key earlier for each row above the last.
PDIFF_HD int32_t interval_end(const SegmentsView& view, int32_t segment, int32_t interval,
                              int32_t row) {
  const Segment& s = view.segments[segment];
  const bool follows_row =
      s.kind == SegmentKind::kCausal && interval + 1 == view.interval_ptr[segment + 1];
  return view.intervals[interval].hi - (follows_row ? s.q_hi - 1 - row : 0);
}

/// The first run of a tile's rows, up to row_hi, that starts at or after `key`; false when there is
/// none. `segment` is the first one that ends after the first row.
PDIFF_HD bool next_run(const SegmentsView& view, int32_t segment, int32_t row_hi, int32_t key,
                       KeyRun* run) {
  bool found = false;
  for (int32_t s = segment; s < view.num_segments && view.segments[s].q_lo < row_hi; ++s) {
    const int32_t interval = find_interval(view, s, key);
    if (interval == view.interval_ptr[s + 1]) continue;
    const int32_t last_row = (view.segments[s].q_hi < row_hi ? view.segments[s].q_hi : row_hi) - 1;
    const int32_t lo = view.intervals[interval].lo;
    const int32_t hi = interval_end(view, s, interval, last_row);
    if (!found || lo < run->key_lo) {
      *run = {lo, hi};
      found = true;
    } else if (lo == run->key_lo && hi > run->key_hi) {
      run->key_hi = hi;
    }
  }
  return found;
}

/// For each row of the tile, how many keys of the run it sees, from the run's first key on.
PDIFF_HD void visible_in_run(const SegmentsView& view, int32_t segment, int32_t row_lo,
                             int32_t row_hi, const KeyRun& run,
                             int32_t* visible) {  // [row_hi - row_lo]
  for (int32_t row = row_lo; row < row_hi; ++row) visible[row - row_lo] = 0;
  for (int32_t s = segment; s < view.num_segments && view.segments[s].q_lo < row_hi; ++s) {
    const int32_t interval = find_interval(view, s, run.key_lo);
    if (interval == view.interval_ptr[s + 1] || view.intervals[interval].lo != run.key_lo) continue;
    const int32_t lo = view.segments[s].q_lo > row_lo ? view.segments[s].q_lo : row_lo;
    const int32_t hi = view.segments[s].q_hi < row_hi ? view.segments[s].q_hi : row_hi;
    for (int32_t row = lo; row < hi; ++row) {
      const int32_t end = interval_end(view, s, interval, row);
      visible[row - row_lo] = end > run.key_lo ? end - run.key_lo : 0;
    }
  }
}

/// The segment that holds a row, or -1: a layout's segments may leave rows out. `first` is the
/// first that may.
PDIFF_HD int32_t segment_of_row(const SegmentsView& view, int32_t first, int32_t row) {
  const int32_t s = find_segment(view, first, view.num_segments, row);
  return s < view.num_segments && view.segments[s].q_lo <= row ? s : -1;
}

/// How many keys of the run one row sees, from the run's first key on. `segment` is the row's.
PDIFF_HD int32_t visible_to_row(const SegmentsView& view, int32_t segment, int32_t row,
                                const KeyRun& run) {
  if (segment < 0) return 0;
  const int32_t interval = find_interval(view, segment, run.key_lo);
  if (interval == view.interval_ptr[segment + 1] || view.intervals[interval].lo != run.key_lo) {
    return 0;
  }
  const int32_t end = interval_end(view, segment, interval, row);
  return end > run.key_lo ? end - run.key_lo : 0;
}

/// Number of (row, key) pairs that rows [row_lo, row_hi) see.
PDIFF_HD int64_t visible_pairs(const SegmentsView& view, int32_t segment, int32_t row_lo,
                               int32_t row_hi) {
  int64_t pairs = 0;
  for (int32_t s = segment; s < view.num_segments && view.segments[s].q_lo < row_hi; ++s) {
    const int32_t lo = view.segments[s].q_lo > row_lo ? view.segments[s].q_lo : row_lo;
    const int32_t hi = view.segments[s].q_hi < row_hi ? view.segments[s].q_hi : row_hi;
    for (int32_t i = view.interval_ptr[s]; i < view.interval_ptr[s + 1]; ++i) {
      // Over consecutive rows an interval's end grows evenly, so the mean of first and last serves.
      const int64_t first = interval_end(view, s, i, lo) - view.intervals[i].lo;
      const int64_t last = interval_end(view, s, i, hi - 1) - view.intervals[i].lo;
      pairs += (first + last) * (hi - lo) / 2;
    }
  }
  return pairs;
}

}  // namespace pdiff
