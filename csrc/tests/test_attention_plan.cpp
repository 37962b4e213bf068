// The walk over a tile's keys, the code that GPUs run too, against the dense mask.

#include <cstdint>
#include <random>
#include <vector>

#include "common/tile_walk.h"
#include "pdiff/attention_plan.h"
#include "tests/check.h"
#include "tests/random_layout.h"

namespace {

using pdiff::AttentionPlan;
using pdiff::PlanView;
using pdiff::SpanLayout;
using pdiff::test::dense_mask;
using pdiff::test::random_int;
using pdiff::test::random_layout;

TEST(runs_of_all_tiles_make_the_mask) {
  std::mt19937 random(0);
  for (int trial = 0; trial < 3000; ++trial) {
    const SpanLayout layouts[] = {random_layout(random), random_layout(random)};
    const AttentionPlan plan({&layouts[0], &layouts[1]}, {.num_heads_q = 1,
                                                          .num_heads_kv = 1,
                                                          .head_dim = 8,
                                                          .tile_rows = random_int(random, 1, 40)});
    const PlanView view = pdiff::view_plan(plan.words(), plan.num_words());
    std::vector<uint8_t> masks[2];
    for (int i = 0; i < 2; ++i) masks[i].resize(dense_mask(layouts[i]).size());
    int64_t pairs_before = INT64_MAX;
    for (int t = 0; t < view.header.num_tiles; ++t) {
      const pdiff::PlanTile& tile = view.tiles[t];
      const pdiff::PlanSequence& sequence = view.sequences[tile.sequence];
      const pdiff::SegmentsView segments = pdiff::segments_of(view, sequence);
      const int num_rows = tile.row_hi - tile.row_lo;
      CHECK(num_rows > 0 && num_rows <= view.header.tile_rows);
      std::vector<int32_t> visible(num_rows);
      int64_t pairs = 0;
      pdiff::KeyRun run{0, 0};
      for (int next = 0; pdiff::next_run(segments, tile.segment, tile.row_hi, next, &run);
           next = run.key_lo + 1) {
        CHECK(run.key_lo >= next && run.key_hi > run.key_lo);
        pdiff::visible_in_run(segments, tile.segment, tile.row_lo, tile.row_hi, run,
                              visible.data());
        int32_t most = 0;
        for (int r = 0; r < num_rows; ++r) {
          const int row = tile.row_lo + r;
          const int segment = pdiff::segment_of_row(segments, tile.segment, row);
          CHECK_EQ(pdiff::visible_to_row(segments, segment, row, run), visible[r]);
          most = std::max(most, visible[r]);
          pairs += visible[r];
          for (int k = run.key_lo; k < run.key_lo + visible[r]; ++k) {
            ++masks[tile.sequence][static_cast<size_t>(tile.row_lo + r) * sequence.num_keys + k];
          }
        }
        CHECK_EQ(most, run.key_hi - run.key_lo);
      }
      CHECK_EQ(pairs, pdiff::visible_pairs(segments, tile.segment, tile.row_lo, tile.row_hi));
      CHECK(pairs <= pairs_before);  // most work first
      pairs_before = pairs;
    }
    for (int i = 0; i < 2; ++i) CHECK(masks[i] == dense_mask(layouts[i]));
  }
}

TEST(layouts_made_by_hand_are_checked) {
  const auto pack = [](const SpanLayout& layout) {
    AttentionPlan({&layout}, {.num_heads_q = 1, .num_heads_kv = 1, .head_dim = 8});
    return 0;
  };
  SpanLayout layout;
  layout.num_rows = 2, layout.num_keys = 3;
  layout.segments = {{0, 2, pdiff::kFull}};
  layout.interval_ptr = {0, 1};
  layout.intervals = {{1, 3}};
  CHECK_EQ(pack(layout), 0);
  layout.intervals = {{1, 4}};
  CHECK_THROWS(pack(layout), "layouts[0]: expected key intervals that ascend within [0, 3)");
  layout.intervals = {{2, 3}};
  layout.segments = {{0, 2, pdiff::kCausal}};
  CHECK_THROWS(pack(layout), "expected a last key interval of at least 2 keys");
  layout.segments = {{0, 3, pdiff::kFull}};
  CHECK_THROWS(pack(layout), "expected segment rows that ascend within [0, 2)");
}

TEST(other_words_are_no_plan) {
  const std::vector<int32_t> words(64);
  CHECK_THROWS(pdiff::view_plan(words.data(), 64), "plan: expected the words of an AttentionPlan");
  const AttentionPlan plan({}, {.num_heads_q = 1, .num_heads_kv = 1, .head_dim = 8});
  CHECK_THROWS(pdiff::view_plan(plan.words(), plan.num_words() - 1), "plan: expected the words");
}

}  // namespace

int main() { return pdiff::test::run_all(); }
