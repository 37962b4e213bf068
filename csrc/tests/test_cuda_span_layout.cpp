// Plans built on the device from tokens, against those that the host makes of their layouts.

#include "tests/check.h"

#if PDIFF_EMULATE_CUDA
#include <algorithm>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "common/tile_walk.h"
#include "pdiff/attention_plan.h"

namespace {

using namespace pdiff;

constexpr int64_t kText = 0, kOpen = 1, kClose = 2, kSyncId = 3;
constexpr SpanTagIds kTags{kOpen, kClose, kSyncId};

using Tokens = std::vector<int64_t>;

/// Allocations of exactly the size that was asked for.
class DevicePlan {
 public:
  DevicePlan(const std::vector<Tokens>& sequences, int64_t max_tags, bool isolate_spans,
             int32_t group_size) {
    Tokens ids;
    std::vector<int32_t> cu_seqlens{0};
    for (const Tokens& sequence : sequences) {
      ids.insert(ids.end(), sequence.begin(), sequence.end());
      cu_seqlens.push_back(static_cast<int32_t>(ids.size()));
    }
    build(ids, cu_seqlens, max_tags, isolate_spans, group_size);
  }
  DevicePlan(const Tokens& ids, const std::vector<int32_t>& cu_seqlens) {
    build(ids, cu_seqlens, 16, true, 1);
  }

  PlanView view() const { return plan_view_of(words_.get()); }
  PlanError error() const { return static_cast<PlanError>(view().header.error); }

 private:
  void build(const Tokens& ids, const std::vector<int32_t>& cu_seqlens, int64_t max_tags,
             bool isolate_spans, int32_t group_size) {
    const PlanFromTokensParams params{.token_ids = ids.data(),
                                      .cu_seqlens = cu_seqlens.data(),
                                      .total_tokens = static_cast<int64_t>(ids.size()),
                                      .num_sequences = static_cast<int64_t>(cu_seqlens.size()) - 1,
                                      .max_tags = max_tags,
                                      .tags = kTags,
                                      .isolate_spans = isolate_spans,
                                      .num_heads_q = 2 * group_size,
                                      .num_heads_kv = 2,
                                      .head_dim = 64};
    words_.reset(new int32_t[cuda::plan_from_tokens_words(params)]);
    const std::unique_ptr<char[]> workspace(
        new char[cuda::plan_from_tokens_workspace_bytes(params)]);
    cuda::plan_from_tokens(params, words_.get(), workspace.get(), {});
  }

  std::unique_ptr<int32_t[]> words_;
};

template <typename T>
std::vector<int32_t> words_of(const T* records, int64_t count) {
  const auto* words = reinterpret_cast<const int32_t*>(records);
  return {words, words + count * static_cast<int64_t>(sizeof(T) / sizeof(int32_t))};
}

template <typename T>
std::vector<std::vector<int32_t>> sorted(const T* records, int64_t count) {
  std::vector<std::vector<int32_t>> all;
  for (int64_t i = 0; i < count; ++i) all.push_back(words_of(records + i, 1));
  std::sort(all.begin(), all.end());
  return all;
}

void check_same(const PlanView& actual, const PlanView& expected) {
  const PlanHeader &a = actual.header, &e = expected.header;
  CHECK_EQ(a.total_q, e.total_q);
  CHECK_EQ(a.tile_rows, e.tile_rows);
  CHECK_EQ(a.num_tiles, e.num_tiles);
  CHECK_EQ(a.num_key_tiles, e.num_key_tiles);
  CHECK_EQ(a.num_slots, 0);
  CHECK(words_of(actual.sequences, e.num_sequences) ==
        words_of(expected.sequences, e.num_sequences));
  if (e.num_sequences == 0) return;
  const PlanSequence& last = expected.sequences[e.num_sequences - 1];
  const int32_t num_segments = last.segment_begin + last.num_segments;
  const int32_t num_key_segments = last.key_segment_begin + last.num_key_segments;
  const int32_t num_intervals = expected.interval_ptr[num_segments];
  const int32_t num_ranges = expected.range_ptr[num_key_segments];
  CHECK(words_of(actual.segments, num_segments) == words_of(expected.segments, num_segments));
  CHECK(words_of(actual.interval_ptr, num_segments + 1) ==
        words_of(expected.interval_ptr, num_segments + 1));
  CHECK(words_of(actual.intervals, num_intervals) == words_of(expected.intervals, num_intervals));
  CHECK(words_of(actual.key_segments, num_key_segments) ==
        words_of(expected.key_segments, num_key_segments));
  CHECK(words_of(actual.range_ptr, num_key_segments + 1) ==
        words_of(expected.range_ptr, num_key_segments + 1));
  CHECK(words_of(actual.ranges, num_ranges) == words_of(expected.ranges, num_ranges));
  CHECK(sorted(actual.tiles, e.num_tiles) == sorted(expected.tiles, e.num_tiles));
  CHECK(sorted(actual.key_tiles, e.num_key_tiles) == sorted(expected.key_tiles, e.num_key_tiles));
}

void check_sequences(const std::vector<Tokens>& sequences, int64_t max_tags, bool isolate_spans,
                     int32_t group_size) {
  std::vector<SpanLayout> layouts;
  bool is_nested = false;
  for (const Tokens& ids : sequences) {
    try {
      layouts.push_back(
          layout_from_tokens(ids.data(), static_cast<int64_t>(ids.size()), kTags, isolate_spans));
    } catch (const Error&) {
      is_nested = true;
    }
  }
  const DevicePlan plan(sequences, max_tags, isolate_spans, group_size);
  if (is_nested) {
    CHECK(plan.error() == PlanError::kNestedSpan);
    CHECK_EQ(plan.view().header.num_tiles, 0);
    CHECK_EQ(plan.view().header.num_key_tiles, 0);
    return;
  }
  CHECK(plan.error() == PlanError::kNone);
  std::vector<const SpanLayout*> pointers;
  for (const SpanLayout& layout : layouts) pointers.push_back(&layout);
  const AttentionPlan expected(pointers, {.num_heads_q = 2 * group_size,
                                          .num_heads_kv = 2,
                                          .head_dim = 64,
                                          .schedule = Schedule::kGpu,
                                          .split_keys = false});
  check_same(plan.view(), view_plan(expected.words(), expected.num_words()));
}

Tokens random_tags(std::mt19937& random, size_t length) {
  Tokens ids(length);
  for (int64_t& id : ids) id = random() % 8 < 4 ? static_cast<int64_t>(random() % 4) : kText;
  return ids;
}

TEST(any_tags_at_all) {
  std::mt19937 random(0);
  for (int trial = 0; trial < 150; ++trial) {
    std::vector<Tokens> sequences(random() % 5);
    for (Tokens& ids : sequences) ids = random_tags(random, random() % 16);
    check_sequences(sequences, 64, trial % 2 == 0, 1 + static_cast<int32_t>(random() % 40));
  }
}

/// Rounds of spans as a model writes them, some with text between.
Tokens document(std::mt19937& random, int num_rounds) {
  Tokens ids;
  const auto text = [&](int most) { ids.insert(ids.end(), random() % most, kText); };
  text(300);
  for (int round = 0; round < num_rounds; ++round) {
    text(40);
    for (int span = 1 + static_cast<int>(random() % 5); span > 0; --span) {
      ids.push_back(kOpen);
      text(90);
      if (random() % 8 == 0) ids.push_back(kSyncId);
      ids.push_back(kClose);
      if (random() % 6 == 0) text(9);
    }
    if (random() % 8 != 0) ids.push_back(kSyncId);
    if (random() % 8 == 0) ids.push_back(random() % 2 == 0 ? kClose : kSyncId);
  }
  if (random() % 4 == 0) ids.push_back(kOpen);  // never closed
  text(50);
  return ids;
}

TEST(batches_of_documents) {
  std::mt19937 random(1);
  for (int trial = 0; trial < 8; ++trial) {
    std::vector<Tokens> sequences(1 + random() % 9);
    for (Tokens& ids : sequences) {
      if (random() % 6 != 0) ids = document(random, static_cast<int>(random() % 6));
    }
    check_sequences(sequences, 600, trial % 2 == 0, trial % 3 == 0 ? 1 : 7);
  }
}

TEST(many_tags_and_many_sequences) {
  std::mt19937 random(2);
  std::vector<Tokens> sequences;
  for (int i = 0; i < 40; ++i) sequences.push_back(document(random, 6));
  for (int i = 0; i < 300; ++i) sequences.emplace_back(random() % 3, kText);
  check_sequences(sequences, 4000, true, 7);
}

TEST(the_most_work_comes_first) {
  std::mt19937 random(3);
  const DevicePlan plan({document(random, 20), document(random, 3)}, 600, true, 4);
  const PlanView view = plan.view();
  const auto work = [&](int32_t tile) {
    const PlanTile& t = view.tiles[tile];
    return visible_pairs(segments_of(view, view.sequences[t.sequence]), t.segment, t.row_lo,
                         t.row_hi);
  };
  CHECK(view.header.num_tiles > 40);
  CHECK(work(0) > 2 * work(view.header.num_tiles / 2));
  CHECK(work(view.header.num_tiles / 2) > work(view.header.num_tiles - 1));
}

TEST(what_does_not_fit_is_an_error_and_no_tile) {
  const auto check_error = [](const DevicePlan& plan, PlanError error) {
    CHECK(plan.error() == error);
    CHECK_EQ(plan.view().header.num_tiles, 0);
    CHECK_EQ(plan.view().header.num_key_tiles, 0);
  };
  Tokens gaps;  // each span lists all the gaps before it
  for (int i = 0; i < 50; ++i) gaps.insert(gaps.end(), {kText, kOpen, kClose});
  check_error({{gaps}, 99, true, 1}, PlanError::kTooManyTags);
  check_error({{gaps}, 100, true, 1}, PlanError::kTooManyGaps);
  check_error({{{kText, kOpen, kText, kOpen, kClose}}, 16, true, 1}, PlanError::kNestedSpan);
  const Tokens text(10, kText);
  check_error({text, {0, 4, 9}}, PlanError::kBadCuSeqlens);
  check_error({text, {0, 11, 10}}, PlanError::kBadCuSeqlens);
  check_error({text, {1, 4, 10}}, PlanError::kBadCuSeqlens);
  check_error({text, {0, -1, 10}}, PlanError::kBadCuSeqlens);
  CHECK(DevicePlan(text, {0, 0, 4, 4, 10}).error() == PlanError::kNone);
  CHECK(DevicePlan({}, {0}).error() == PlanError::kNone);
  CHECK(DevicePlan({}, {0, 0}).error() == PlanError::kNone);
}

}  // namespace

int main() { return pdiff::test::run_all(); }
#else
int main() { return 77; }  // skipped
#endif
