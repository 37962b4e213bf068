#include "pdiff/span_layout.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>

#include "pdiff/error.h"

namespace pdiff {
namespace {

constexpr int64_t kMaxTokens = std::numeric_limits<int32_t>::max();

// A span lists the text gaps between the unsynced spans before it. Thousands of gaps in one round
// are no plan; this keeps them from taking gigabytes.
constexpr size_t kMaxIntervals = size_t{1} << 24;

// Append [lo, hi) to the intervals from index `first` on. They ascend, so only the last can touch.
void append_interval(std::vector<KeyInterval>& intervals, size_t first, int32_t lo, int32_t hi) {
  if (intervals.size() > first && intervals.back().hi == lo) {
    intervals.back().hi = hi;
  } else {
    intervals.push_back({lo, hi});
  }
}

void close_segment(SpanLayout& layout, int32_t q_lo, int32_t q_hi, SegmentKind kind) {
  PDIFF_CHECK(layout.intervals.size() <= kMaxIntervals, "key intervals: expected at most ",
              kMaxIntervals, ", got more: too much text between spans without a sync");
  layout.segments.push_back({q_lo, q_hi, kind});
  layout.interval_ptr.push_back(static_cast<int32_t>(layout.intervals.size()));
}

struct SpansAndSyncs {
  std::vector<KeyInterval> spans;
  std::vector<int32_t> syncs;  // those outside spans
};

SpansAndSyncs find_spans(const int64_t* token_ids, int32_t num_tokens, const SpanTagIds& tags,
                         bool isolate_spans) {
  std::vector<KeyInterval> spans;
  std::vector<int32_t> syncs;
  int32_t open = -1;            // where the span being read starts
  size_t num_syncs_before = 0;  // a sync after `open` counts only if that span is never closed
  for (int32_t i = 0; i < num_tokens; ++i) {
    const int64_t id = token_ids[i];
    if (id == tags.sync) {
      syncs.push_back(i);
    } else if (id == tags.async_start) {
      PDIFF_CHECK(open < 0, "token_ids: expected spans that are not nested, got one opened at ", i,
                  " inside the one opened at ", open);
      open = i;
      num_syncs_before = syncs.size();
    } else if (id == tags.async_end && open >= 0) {
      syncs.resize(num_syncs_before);
      if (!isolate_spans && !spans.empty() && spans.back().hi == open) {
        spans.back().hi = i + 1;
      } else {
        spans.push_back({open, i + 1});
      }
      open = -1;
    }
  }
  return {std::move(spans), std::move(syncs)};
}

// Writes the segments of a token sequence in row order; `visible` is what every later row sees.
struct SequenceWriter {
  SpanLayout& layout;
  std::vector<KeyInterval> visible{};
  int32_t row = 0;
  bool has_unsynced = false;

  void segment(int32_t hi, SegmentKind kind) {
    const size_t first = layout.intervals.size();
    layout.intervals.insert(layout.intervals.end(), visible.begin(), visible.end());
    append_interval(layout.intervals, first, row, hi);
    close_segment(layout, row, hi, kind);
  }
  void text(int32_t hi) {
    if (row == hi) return;
    segment(hi, kCausal);
    append_interval(visible, 0, row, hi);
    row = hi;
  }
  void span(const KeyInterval& span) {
    text(span.lo);
    segment(span.hi, kFull);
    has_unsynced = true;
    row = span.hi;
  }
  void sync(int32_t sync_row) {
    if (!has_unsynced) return;
    text(sync_row);
    visible.assign(1, {0, sync_row});
    has_unsynced = false;
  }
};

// A span is seen by itself and by all rows from its sync on, text by all rows at or after it.
KeyMajorLayout key_major_of_sequence(const SpanLayout& layout) {
  const auto& segments = layout.segments;
  const int32_t num_rows = layout.num_rows;

  // opened_at[s]: the first row after segment s that sees all before it; num_rows if there is none.
  std::vector<int32_t> opened_at(segments.size());
  int32_t next = num_rows;
  for (size_t s = segments.size(); s-- > 0;) {
    opened_at[s] = next;
    const int32_t first = layout.interval_ptr[s];
    const bool sees_all =
        layout.interval_ptr[s + 1] == first + 1 && layout.intervals[first].lo == 0;
    if (segments[s].kind == kCausal && sees_all) next = segments[s].q_lo;
  }

  KeyMajorLayout twin;
  twin.segments.reserve(segments.size());
  twin.range_ptr.reserve(segments.size() + 1);
  twin.ranges.reserve(2 * segments.size());
  for (size_t s = 0; s < segments.size(); ++s) {
    const auto& [lo, hi, kind] = segments[s];
    const bool continues_text = kind == kCausal && s > 0 && segments[s - 1].kind == kCausal;
    if (continues_text) {
      twin.segments.back().hi = hi;
      continue;
    }
    twin.segments.push_back({lo, hi});
    if (kind == kCausal) {
      twin.ranges.push_back({lo, num_rows, kCausal});
    } else if (opened_at[s] == hi) {
      twin.ranges.push_back({lo, num_rows, kFull});
    } else {
      twin.ranges.push_back({lo, hi, kFull});
      if (opened_at[s] < num_rows) twin.ranges.push_back({opened_at[s], num_rows, kFull});
    }
    twin.range_ptr.push_back(static_cast<int32_t>(twin.ranges.size()));
  }
  return twin;
}

// Do key segments a and b, where b starts `offset` keys after a, say the same of their keys?
bool same_ranges(const std::vector<Segment>& a, const std::vector<Segment>& b, int32_t offset) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), [&](Segment x, const Segment& y) {
    if (x.kind == kCausal) x.q_lo += offset;
    return x == y;
  });
}

// Any layout: cut the keys wherever an interval starts, ends or turns causal, list the row ranges
// of each piece, join the pieces that agree. O(pieces * segments).
KeyMajorLayout key_major_of_any(const SpanLayout& layout) {
  std::vector<int32_t> cuts;
  const auto for_each_block = [&](auto&& block) {  // keys [lo, hi) against rows of one kind
    for (size_t s = 0; s < layout.segments.size(); ++s) {
      const auto& [q_lo, q_hi, kind] = layout.segments[s];
      const int32_t last = layout.interval_ptr[s + 1] - 1;
      for (int32_t i = layout.interval_ptr[s]; i <= last; ++i) {
        const auto& [lo, hi] = layout.intervals[i];
        const int32_t causal_lo = kind == kCausal && i == last ? hi - (q_hi - q_lo) : hi;
        if (lo < causal_lo) block(lo, causal_lo, Segment{q_lo, q_hi, kFull});
        if (causal_lo < hi) block(causal_lo, hi, Segment{q_lo, q_hi, kCausal});
      }
    }
  };
  for_each_block([&](int32_t lo, int32_t hi, const Segment&) {
    cuts.push_back(lo);
    cuts.push_back(hi);
  });
  std::sort(cuts.begin(), cuts.end());
  cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());

  std::vector<std::vector<Segment>> pieces(cuts.size());  // piece p: keys [cuts[p], cuts[p + 1])
  for_each_block([&](int32_t lo, int32_t hi, const Segment& rows) {
    size_t p = std::lower_bound(cuts.begin(), cuts.end(), lo) - cuts.begin();
    for (; cuts[p] < hi; ++p) {
      auto& ranges = pieces[p];
      if (rows.kind == kFull && !ranges.empty() && ranges.back().q_hi == rows.q_lo) {
        ranges.back().q_hi = rows.q_hi;
      } else {
        const int32_t offset = rows.kind == kCausal ? cuts[p] - lo : 0;
        ranges.push_back({rows.q_lo + offset, rows.q_hi, rows.kind});
      }
    }
  });

  KeyMajorLayout twin;
  size_t start = 0;  // the piece that the open key segment began with
  for (size_t p = 0; p < pieces.size(); ++p) {
    if (pieces[p].empty()) continue;
    const bool continues = !twin.segments.empty() && twin.segments.back().hi == cuts[p] &&
                           same_ranges(pieces[start], pieces[p], cuts[p] - cuts[start]);
    if (continues) {
      twin.segments.back().hi = cuts[p + 1];
      continue;
    }
    start = p;
    twin.segments.push_back({cuts[p], cuts[p + 1]});
    twin.ranges.insert(twin.ranges.end(), pieces[p].begin(), pieces[p].end());
    twin.range_ptr.push_back(static_cast<int32_t>(twin.ranges.size()));
  }
  return twin;
}

}  // namespace

SpanLayout layout_from_tokens(const int64_t* token_ids, int64_t num_tokens, const SpanTagIds& tags,
                              bool isolate_spans) {
  PDIFF_CHECK(num_tokens >= 0 && num_tokens <= kMaxTokens, "token_ids: expected at most ",
              kMaxTokens, " tokens, got ", num_tokens);
  SpanLayout layout;
  layout.num_rows = layout.num_keys = static_cast<int32_t>(num_tokens);
  layout.is_token_sequence = true;
  const auto [spans, syncs] = find_spans(token_ids, layout.num_rows, tags, isolate_spans);

  const size_t max_segments = 2 * spans.size() + std::min(spans.size(), syncs.size()) + 1;
  layout.segments.reserve(max_segments);
  layout.interval_ptr.reserve(max_segments + 1);
  layout.intervals.reserve(2 * max_segments);

  SequenceWriter writer{layout};
  auto sync = syncs.begin();
  for (const KeyInterval& span : spans) {
    for (; sync != syncs.end() && *sync < span.lo; ++sync) writer.sync(*sync);
    writer.span(span);
  }
  for (; sync != syncs.end(); ++sync) writer.sync(*sync);
  writer.text(layout.num_rows);
  return layout;
}

SpanLayout layout_from_segments(int64_t num_keys, int64_t num_segments, const int64_t* num_rows,
                                const int32_t* kind, const int64_t* interval_ptr,
                                const int64_t* intervals) {
  PDIFF_CHECK(num_keys >= 0 && num_keys <= kMaxTokens, "num_keys: expected 0 to ", kMaxTokens,
              ", got ", num_keys);
  SpanLayout layout;
  layout.num_keys = static_cast<int32_t>(num_keys);
  int64_t row = 0;
  for (int64_t s = 0; s < num_segments; ++s) {
    PDIFF_CHECK(num_rows[s] >= 0 && row + num_rows[s] <= kMaxTokens, "segments[", s,
                "]: expected 0 to ", kMaxTokens - row, " rows, got ", num_rows[s]);
    PDIFF_CHECK(kind[s] == kCausal || kind[s] == kFull, "segments[", s,
                "]: expected kind 0 (causal) or 1 (full), got ", kind[s]);
    const size_t first = layout.intervals.size();
    int64_t end = 0;
    for (int64_t i = interval_ptr[s]; i < interval_ptr[s + 1]; ++i) {
      const int64_t lo = intervals[2 * i], hi = intervals[2 * i + 1];
      PDIFF_CHECK(end <= lo && lo <= hi && hi <= num_keys, "segments[", s,
                  "]: expected ascending key intervals within ", end, " to ", num_keys, ", got [",
                  lo, ", ", hi, ")");
      if (lo < hi && num_rows[s] > 0) {
        append_interval(layout.intervals, first, static_cast<int32_t>(lo),
                        static_cast<int32_t>(hi));
      }
      end = hi;
    }
    if (num_rows[s] == 0) continue;
    if (kind[s] == kCausal) {
      const int64_t i = interval_ptr[s + 1] - 1;
      const int64_t last_len = i < interval_ptr[s] ? 0 : intervals[2 * i + 1] - intervals[2 * i];
      PDIFF_CHECK(last_len >= num_rows[s], "segments[", s,
                  "]: expected a last key interval at least as long as the ", num_rows[s],
                  " causal rows, got ", last_len, " keys");
    }
    close_segment(layout, static_cast<int32_t>(row), static_cast<int32_t>(row + num_rows[s]),
                  static_cast<SegmentKind>(kind[s]));
    row += num_rows[s];
  }
  layout.num_rows = static_cast<int32_t>(row);
  return layout;
}

KeyMajorLayout key_major(const SpanLayout& layout) {
  return layout.is_token_sequence ? key_major_of_sequence(layout) : key_major_of_any(layout);
}

int64_t num_visible_pairs(const SpanLayout& layout) {
  int64_t num_pairs = 0;
  for (size_t s = 0; s < layout.segments.size(); ++s) {
    const auto& [q_lo, q_hi, kind] = layout.segments[s];
    const int64_t num_rows = q_hi - q_lo;
    for (int32_t i = layout.interval_ptr[s]; i < layout.interval_ptr[s + 1]; ++i) {
      num_pairs += num_rows * (layout.intervals[i].hi - layout.intervals[i].lo);
    }
    if (kind == kCausal) num_pairs -= num_rows * (num_rows - 1) / 2;
  }
  return num_pairs;
}

void write_dense_mask(const SpanLayout& layout, uint8_t* mask) {
  std::fill_n(mask, static_cast<size_t>(layout.num_rows) * layout.num_keys, uint8_t{0});
  for (size_t s = 0; s < layout.segments.size(); ++s) {
    const auto& [q_lo, q_hi, kind] = layout.segments[s];
    for (int32_t q = q_lo; q < q_hi; ++q) {
      uint8_t* row = mask + static_cast<size_t>(q) * layout.num_keys;
      for (int32_t i = layout.interval_ptr[s]; i < layout.interval_ptr[s + 1]; ++i) {
        const auto& [lo, hi] = layout.intervals[i];
        const bool is_causal = kind == kCausal && i + 1 == layout.interval_ptr[s + 1];
        std::memset(row + lo, 1, (is_causal ? hi - (q_hi - 1 - q) : hi) - lo);
      }
    }
  }
}

}  // namespace pdiff
