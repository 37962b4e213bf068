#pragma once

#include <cstdint>
#include <vector>

namespace pdiff {

enum SegmentKind : int32_t { kCausal = 0, kFull = 1 };

/// Rows [q_lo, q_hi). By rows, in a SpanLayout: full, every row sees all of the segment's key
/// intervals; causal, the last interval's hi belongs to the last row, one less to the row above
/// it, and so on. By keys, in a KeyMajorLayout: full, all keys of the segment are seen by all
/// these rows; causal, key k_lo + j is seen by [q_lo + j, q_hi).
struct Segment {
  int32_t q_lo, q_hi, kind;
  bool operator==(const Segment&) const = default;
};

struct KeyInterval {
  int32_t lo, hi;
  bool operator==(const KeyInterval&) const = default;
};

/// Which keys each query row of one sequence sees, in O(segments).
/// Rows      segments lie in row order, are not empty and cover [0, num_rows).
/// Keys      the intervals of a segment ascend, are not empty and do not touch one another; a
///           causal segment's last interval has at least as many keys as the segment has rows,
///           so every one of its rows sees a key. A full segment may have none.
struct SpanLayout {
  int32_t num_rows = 0;
  int32_t num_keys = 0;
  std::vector<Segment> segments;         // [num_segments]
  std::vector<int32_t> interval_ptr{0};  // [num_segments + 1]
  std::vector<KeyInterval> intervals;    // [interval_ptr.back()]
  bool is_token_sequence = false;        // from layout_from_tokens: the twin needs one pass

  int32_t num_segments() const { return static_cast<int32_t>(segments.size()); }
};

/// The same relation by keys: which rows see each key segment, for the backward. Key segments
/// cover the keys that anyone sees; row ranges ascend and do not overlap. A layout from tokens
/// has at most two row ranges per key segment.
struct KeyMajorLayout {
  std::vector<KeyInterval> segments;  // [num_key_segments] {k_lo, k_hi}
  std::vector<int32_t> range_ptr{0};  // [num_key_segments + 1]
  std::vector<Segment> ranges;        // [range_ptr.back()]
};

struct SpanTagIds {
  int64_t async_start, async_end, sync;
};

/// The layout of a whole sequence, rows = keys = num_tokens. A key inside a span (tags included)
/// is visible to its own span and to every row at or after the first sync after the span; any
/// other key is visible to rows at or after it. A sync inside a span is an ordinary token.
/// Malformed  an unbalanced tag is a plain token; a span opened inside a span throws.
/// Joint      with isolate_spans false, spans that touch count as one.
SpanLayout layout_from_tokens(const int64_t* token_ids,  // [num_tokens]
                              int64_t num_tokens, const SpanTagIds& tags, bool isolate_spans);

/// Rows listed in order: segment s has num_rows[s] rows of kind[s] and sees the intervals
/// [interval_ptr[s], interval_ptr[s + 1]) of {lo, hi} pairs. Segments without rows and intervals
/// without keys are dropped, touching intervals merged. Throws pdiff::Error, naming the segment.
SpanLayout layout_from_segments(int64_t num_keys, int64_t num_segments,
                                const int64_t* num_rows,      // [num_segments]
                                const int32_t* kind,          // [num_segments]
                                const int64_t* interval_ptr,  // [num_segments + 1]
                                const int64_t* intervals);    // [interval_ptr[num_segments], 2]

KeyMajorLayout key_major(const SpanLayout& layout);

int64_t num_visible_pairs(const SpanLayout& layout);

/// mask[q, k] = 1 where row q sees key k, else 0. For tests and dense baselines.
void write_dense_mask(const SpanLayout& layout,
                      uint8_t* mask);  // [num_rows, num_keys]

}  // namespace pdiff
