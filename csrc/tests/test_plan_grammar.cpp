#include <random>
#include <string>

#include "pdiff/plan_grammar.h"
#include "tests/check.h"

namespace {

using pdiff::PlanCaps;
using pdiff::PlanState;
using pdiff::TokenClass;

TokenClass class_of(char letter) {
  switch (letter) {
    case 't':
      return pdiff::kText;
    case '<':
      return pdiff::kTopicStart;
    case '>':
      return pdiff::kTopicEnd;
    case 'Y':
      return pdiff::kSync;
    case 'Z':
      return pdiff::kEos;
    case '#':
      return pdiff::kBanned;
    default:
      return static_cast<TokenClass>(letter - '0');
  }
}

// How many letters are legal one after another, and where that leads.
size_t run(const std::string& letters, PlanState& state, const PlanCaps& caps) {
  for (size_t i = 0; i < letters.size(); ++i) {
    if (!pdiff::plan_advance(state, caps, class_of(letters[i]))) return i;
  }
  return letters.size();
}

size_t num_legal(const std::string& letters, PlanCaps caps = {64, 8}, int32_t budget = 100) {
  PlanState state = pdiff::plan_start(caps, budget);
  return run(letters, state, caps);
}

TEST(what_the_grammar_takes) {
  CHECK_EQ(num_legal("tt5tZ"), 5u);
  CHECK_EQ(num_legal("<t5>Y<tt12>t<t1>Z"), 17u);
  CHECK_EQ(num_legal("Y"), 0u);       // no topic yet
  CHECK_EQ(num_legal("<t5>YY"), 5u);  // none since the last sync
  CHECK_EQ(num_legal("<t5>ZZ"), 5u);  // nothing after eos
  CHECK_EQ(num_legal("<t>"), 2u);     // no number
  CHECK_EQ(num_legal("<5>"), 2u);     // no text
  CHECK_EQ(num_legal("<t0>"), 3u);    // zero
  CHECK_EQ(num_legal("<t5t>"), 4u);   // the number is not at the end
  CHECK_EQ(num_legal("<t5Z"), 3u);    // eos inside a topic
  CHECK_EQ(num_legal("<t<"), 2u);     // topics do not nest
  CHECK_EQ(num_legal("t#"), 1u);
}

TEST(the_number_is_the_longest_that_leaves_text) {
  const struct {
    const char* letters;
    int number;
  } cases[] = {
      {"<t5", 5},  {"<t12", 12}, {"<t123", 23}, {"<t05", 5}, {"<t10", 10},
      {"<t00", 0}, {"<12", 2},   {"<112", 12},  {"<1", 0},   {"<10", 0},
      {"<t5t", 0}, {"<t99", 99}, {"<t100", 0},
  };
  for (const auto& [letters, number] : cases) {
    PlanState state = pdiff::plan_start({64, 8}, 100);
    run(letters, state, {64, 8});
    CHECK_EQ(state.number, number);
  }
}

TEST(a_million_random_strings_stay_within_their_budget) {
  std::mt19937 random(0);
  int64_t num_taken = 0;
  for (int trial = 0; trial < 1'000'000; ++trial) {
    const PlanCaps caps{2 + static_cast<int32_t>(random() % 5), static_cast<int32_t>(random() % 4)};
    PlanState state = pdiff::plan_start(caps, 1 + static_cast<int32_t>(random() % 12));
    for (int i = 0; i < 16; ++i) {
      const PlanState before = state;
      const auto token_class = static_cast<TokenClass>(random() % pdiff::kNumTokenClasses);
      const bool is_legal = pdiff::legal_classes(pdiff::plan_mask(state, caps)) >> token_class & 1;
      const bool taken = pdiff::plan_advance(state, caps, token_class);
      num_taken += taken;
      const bool is_sound = taken == is_legal && state.budget == before.budget - taken &&
                            state.budget >= 0 && state.num_topics <= caps.max_topics &&
                            state.num_topic_tokens <= caps.max_topic_tokens;
      // Something is legal until the plan has ended.
      const bool is_stuck = pdiff::plan_mask(state, caps) == pdiff::kMaskNothing;
      if (!is_sound || (is_stuck && state.finish == pdiff::kNotFinished)) {
        CHECK(is_sound);
        CHECK(!is_stuck);
        return;
      }
    }
  }
  CHECK(num_taken > 1'000'000);
}

TEST(bounds_are_checked) {
  CHECK_THROWS(pdiff::plan_start({1, 8}, 10), "max_topic_tokens: expected 2 to");
  CHECK_THROWS(pdiff::plan_start({64, -1}, 10), "max_topics: expected 0 to");
  CHECK_THROWS(pdiff::plan_start({64, 8}, 0), "budget: expected 1 to 1073741824, got 0");
  PlanState state = pdiff::plan_start({pdiff::kMaxPlanCount, pdiff::kMaxPlanCount}, 1 << 30);
  CHECK_EQ(run("<t5>Z", state, {pdiff::kMaxPlanCount, pdiff::kMaxPlanCount}), 5u);
}

}  // namespace

int main() { return pdiff::test::run_all(); }
