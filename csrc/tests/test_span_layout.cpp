#include <cstdint>
#include <random>
#include <vector>

#include "pdiff/span_layout.h"
#include "tests/check.h"

namespace {

using pdiff::KeyMajorLayout;
using pdiff::SpanLayout;

constexpr pdiff::SpanTagIds kTags{1, 2, 3};
constexpr int64_t kText = 0, kOpen = 1, kClose = 2, kSync = 3;

SpanLayout from_tokens(const std::vector<int64_t>& ids, bool isolate_spans = true) {
  return pdiff::layout_from_tokens(ids.data(), static_cast<int64_t>(ids.size()), kTags,
                                   isolate_spans);
}

std::vector<uint8_t> dense(const SpanLayout& layout) {
  std::vector<uint8_t> mask(static_cast<size_t>(layout.num_rows) * layout.num_keys);
  pdiff::write_dense_mask(layout, mask.data());
  return mask;
}

std::vector<uint8_t> dense(const SpanLayout& layout, const KeyMajorLayout& twin) {
  std::vector<uint8_t> mask(static_cast<size_t>(layout.num_rows) * layout.num_keys);
  for (size_t s = 0; s < twin.segments.size(); ++s) {
    const auto& [k_lo, k_hi] = twin.segments[s];
    for (int32_t r = twin.range_ptr[s]; r < twin.range_ptr[s + 1]; ++r) {
      const auto& [q_lo, q_hi, kind] = twin.ranges[r];
      for (int32_t k = k_lo; k < k_hi; ++k) {
        const int32_t first = kind == pdiff::kCausal ? q_lo + k - k_lo : q_lo;
        for (int32_t q = first; q < q_hi; ++q) {
          ++mask[static_cast<size_t>(q) * layout.num_keys + k];  // 2 where ranges overlap
        }
      }
    }
  }
  return mask;
}

TEST(a_round_of_two_spans) {
  const SpanLayout layout = from_tokens({kText, kOpen, kClose, kOpen, kText, kClose, kSync, kText});
  const std::vector<pdiff::Segment> segments{{0, 1, 0}, {1, 3, 1}, {3, 6, 1}, {6, 8, 0}};
  const std::vector<pdiff::KeyInterval> intervals{{0, 1}, {0, 3}, {0, 1}, {3, 6}, {0, 8}};
  CHECK(layout.segments == segments);
  CHECK(layout.intervals == intervals);
  CHECK(layout.interval_ptr == (std::vector<int32_t>{0, 1, 2, 4, 5}));
  CHECK_EQ(pdiff::num_visible_pairs(layout), 1 + 2 * 3 + 3 * 4 + 7 + 8);

  // The second span's sync follows at once, so its two row ranges are one.
  const KeyMajorLayout twin = pdiff::key_major(layout);
  CHECK(twin.segments == (std::vector<pdiff::KeyInterval>{{0, 1}, {1, 3}, {3, 6}, {6, 8}}));
  CHECK(twin.range_ptr == (std::vector<int32_t>{0, 1, 3, 4, 5}));
  CHECK(twin.ranges ==
        (std::vector<pdiff::Segment>{{0, 8, 0}, {1, 3, 1}, {6, 8, 1}, {3, 8, 1}, {6, 8, 0}}));
}

TEST(random_tokens_give_sound_layouts) {
  std::mt19937 random(0);
  int num_nested = 0;
  for (int trial = 0; trial < 4000; ++trial) {
    std::vector<int64_t> ids(random() % 24);
    for (int64_t& id : ids) id = random() % 8 < 4 ? static_cast<int64_t>(random() % 4) : kText;
    SpanLayout layout;
    try {
      layout = from_tokens(ids, trial % 2 == 0);
    } catch (const pdiff::Error&) {
      ++num_nested;
      continue;
    }
    const std::vector<uint8_t> mask = dense(layout);
    int64_t num_visible = 0;
    for (const uint8_t visible : mask) num_visible += visible;
    CHECK_EQ(pdiff::num_visible_pairs(layout), num_visible);
    CHECK(dense(layout, pdiff::key_major(layout)) == mask);

    // The way that works for any layout says the same.
    layout.is_token_sequence = false;
    CHECK(dense(layout, pdiff::key_major(layout)) == mask);
  }
  CHECK(num_nested > 0 && num_nested < 3000);
}

TEST(segments_are_normalised) {
  const int64_t num_rows[] = {2, 0, 3};
  const int32_t kind[] = {pdiff::kFull, pdiff::kFull, pdiff::kCausal};
  const int64_t interval_ptr[] = {0, 3, 4, 6};
  const int64_t intervals[] = {0, 2, 2, 2, 2, 4, 0, 9, 1, 4, 4, 9};
  const SpanLayout layout =
      pdiff::layout_from_segments(9, 3, num_rows, kind, interval_ptr, intervals);
  CHECK(layout.segments == (std::vector<pdiff::Segment>{{0, 2, 1}, {2, 5, 0}}));
  CHECK(layout.intervals == (std::vector<pdiff::KeyInterval>{{0, 4}, {1, 9}}));
  CHECK_EQ(layout.num_rows, 5);
}

TEST(too_many_text_gaps_are_an_error_and_no_gigabytes) {
  std::vector<int64_t> ids;
  for (int i = 0; i < 6000; ++i) ids.insert(ids.end(), {kOpen, kClose, kText});
  CHECK_THROWS(from_tokens(ids), "too much text between spans without a sync");
  ids.resize(3 * 2000);
  CHECK_EQ(from_tokens(ids).num_segments(), 4000);
}

}  // namespace

int main() { return pdiff::test::run_all(); }
