// The walk of the rows and keys of a GPU plan over what they see, against the dense mask.

#include <algorithm>
#include <cstdint>
#include <random>
#include <vector>

#include "common/visible_walk.h"
#include "pdiff/attention_plan.h"
#include "tests/check.h"
#include "tests/random_layout.h"

namespace {

using pdiff::AttentionPlan;
using pdiff::kNowhere;
using pdiff::PlanSequence;
using pdiff::PlanView;
using pdiff::SpanLayout;
using pdiff::VisibleWalk;
using pdiff::test::dense_mask;
using pdiff::test::random_int;

// Walks all owners together and calls visible(owner, position) for everything that they see.
template <typename Seen, typename Visible>
void walk_together(std::vector<VisibleWalk<Seen>>& owners, int size, const Visible& visible) {
  const auto next_from = [&](int32_t position) {
    int32_t next = kNowhere;
    for (const auto& owner : owners) next = std::min(next, owner.next_from(position));
    return next;
  };
  for (int32_t position = next_from(0); position != kNowhere;
       position = next_from(position + size)) {
    uint64_t any = 0;
    for (size_t i = 0; i < owners.size(); ++i) {
      const uint64_t bits = owners[i].take(position, size);
      for (int b = 0; b < 64; ++b) {
        if ((bits >> b & 1) != 0) visible(static_cast<int>(i), position + b);
      }
      any |= bits;
    }
    CHECK((any & 1) != 0);  // a block starts where somebody sees something
  }
}

TEST(walks_of_all_tiles_make_the_mask) {
  std::mt19937 random(0);
  for (int trial = 0; trial < 1500; ++trial) {
    const SpanLayout layouts[] = {
        pdiff::test::random_layout(random),
        trial % 2 == 0 ? pdiff::test::random_layout(random) : pdiff::test::random_document(random)};
    const int group_size = random_int(random, 1, 9);
    const AttentionPlan plan({&layouts[0], &layouts[1]}, {.num_heads_q = group_size,
                                                          .num_heads_kv = 1,
                                                          .head_dim = 8,
                                                          .schedule = pdiff::Schedule::kGpu});
    const PlanView view = pdiff::view_plan(plan.words(), plan.num_words());
    std::vector<uint8_t> by_rows[2], by_keys[2];
    for (int i = 0; i < 2; ++i) {
      by_rows[i].resize(dense_mask(layouts[i]).size());
      by_keys[i].resize(by_rows[i].size() * static_cast<size_t>(group_size));
    }

    for (int t = 0; t < view.header.num_tiles; ++t) {
      const pdiff::PlanTile& tile = view.tiles[t];
      if (tile.part > 0) continue;
      const PlanSequence& sequence = view.sequences[tile.sequence];
      std::vector<VisibleWalk<pdiff::KeysOfRow>> rows;
      for (int row = tile.row_lo; row < tile.row_hi; ++row) {
        rows.emplace_back(
            pdiff::keys_of_row(pdiff::segments_of(view, sequence), tile.segment, row));
      }
      walk_together(rows, random_int(random, 1, 64), [&](int row, int key) {
        ++by_rows[tile.sequence][static_cast<size_t>(tile.row_lo + row) * sequence.num_keys + key];
      });
    }
    for (int t = 0; t < view.header.num_key_tiles; ++t) {
      const pdiff::PlanKeyTile& tile = view.key_tiles[t];
      const PlanSequence& sequence = view.sequences[tile.sequence];
      std::vector<VisibleWalk<pdiff::RowsOfKey>> keys;
      for (int key = tile.key_lo; key < tile.key_hi; ++key) {
        keys.emplace_back(pdiff::rows_of_key(view, sequence, tile.key_segment, key, group_size));
      }
      walk_together(keys, random_int(random, 1, 64), [&](int key, int position) {
        const int row = sequence.num_rows * group_size - 1 - position;
        ++by_keys[tile.sequence][static_cast<size_t>(row) * sequence.num_keys + tile.key_lo + key];
      });
    }

    for (int i = 0; i < 2; ++i) {
      const std::vector<uint8_t> mask = dense_mask(layouts[i]);
      CHECK(by_rows[i] == mask);
      const size_t num_keys = static_cast<size_t>(layouts[i].num_keys);
      bool same = true;
      for (size_t row = 0; row < static_cast<size_t>(layouts[i].num_rows * group_size); ++row) {
        for (size_t key = 0; key < num_keys; ++key) {
          same = same && by_keys[i][row * num_keys + key] ==
                             mask[row / static_cast<size_t>(group_size) * num_keys + key];
        }
      }
      CHECK(same);
    }
  }
}

}  // namespace

int main() { return pdiff::test::run_all(); }
