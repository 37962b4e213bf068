#pragma once

#include <cstdint>
#include <random>
#include <vector>

#include "pdiff/span_layout.h"

// Layouts for tests that compare with the dense mask.
namespace pdiff::test {

inline int random_int(std::mt19937& random, int lo, int hi) {
  return std::uniform_int_distribution<int>(lo, hi)(random);
}

/// The layout without some of its segments: their rows see nothing.
inline SpanLayout with_gaps(std::mt19937& random, const SpanLayout& layout) {
  SpanLayout kept;
  kept.num_rows = layout.num_rows;
  kept.num_keys = layout.num_keys;
  for (int s = 0; s < layout.num_segments(); ++s) {
    if (random_int(random, 0, 1) == 0) continue;
    kept.segments.push_back(layout.segments[s]);
    kept.intervals.insert(kept.intervals.end(), layout.intervals.begin() + layout.interval_ptr[s],
                          layout.intervals.begin() + layout.interval_ptr[s + 1]);
    kept.interval_ptr.push_back(static_cast<int32_t>(kept.intervals.size()));
  }
  return kept;
}

/// Any segments at all, more than a model's text ever makes of them; every fourth layout has gaps.
inline SpanLayout random_layout(std::mt19937& random, int max_keys = 90, int max_rows = 9,
                                int max_segments = 12) {
  const int num_keys = random_int(random, 0, max_keys);
  const int num_segments = random_int(random, 0, max_segments);
  std::vector<int64_t> num_rows, interval_ptr{0}, intervals;
  std::vector<int32_t> kinds;
  for (int s = 0; s < num_segments; ++s) {
    int kind = random_int(random, 0, 1), rows = random_int(random, 0, max_rows), key = 0;
    const size_t first = intervals.size();
    while (key < num_keys && random_int(random, 0, 3) > 0) {
      const int lo = random_int(random, key, num_keys - 1);
      key = random_int(random, lo + 1, num_keys);
      intervals.insert(intervals.end(), {lo, key});
    }
    const bool follows =
        intervals.size() > first && intervals.back() - intervals[intervals.size() - 2] >= rows;
    if (!follows) kind = kFull;
    num_rows.push_back(rows);
    kinds.push_back(kind);
    interval_ptr.push_back(static_cast<int64_t>(intervals.size() / 2));
  }
  const SpanLayout layout = layout_from_segments(
      num_keys, num_segments, num_rows.data(), kinds.data(), interval_ptr.data(), intervals.data());
  return random_int(random, 0, 3) == 0 ? with_gaps(random, layout) : layout;
}

/// Text, spans and syncs, as tokens make them.
inline SpanLayout random_document(std::mt19937& random, int max_part_len = 40) {
  constexpr int64_t kText = 0, kStart = 1, kEnd = 2, kSync = 3;
  std::vector<int64_t> token_ids;
  for (int part = random_int(random, 1, 12); part > 0; --part) {
    const int length = random_int(random, 0, max_part_len), kind = random_int(random, 0, 5);
    if (kind == 0) {
      token_ids.push_back(kSync);
    } else if (kind < 3) {
      token_ids.insert(token_ids.end(), static_cast<size_t>(length), kText);
    } else {
      token_ids.push_back(kStart);
      token_ids.insert(token_ids.end(), static_cast<size_t>(length), kText);
      token_ids.push_back(kEnd);
    }
  }
  return layout_from_tokens(token_ids.data(), static_cast<int64_t>(token_ids.size()),
                            {.async_start = kStart, .async_end = kEnd, .sync = kSync},
                            random_int(random, 0, 3) > 0);
}

inline std::vector<uint8_t> dense_mask(const SpanLayout& layout) {
  std::vector<uint8_t> mask(static_cast<size_t>(layout.num_rows) * layout.num_keys);
  write_dense_mask(layout, mask.data());
  return mask;
}

}  // namespace pdiff::test
