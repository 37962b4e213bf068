#include <cmath>
#include <cstdint>

#include "common/gumbel.h"
#include "common/philox.h"
#include "common/select.h"
#include "tests/check.h"

namespace {

using Philox4x32 = pdiff::Philox4x32<uint32_t>;

// Known answers of the generator's authors (Random123, kat_vectors).
TEST(philox_known_answers) {
  const struct {
    Philox4x32 counter;
    uint64_t key;
    Philox4x32 expected;
  } cases[] = {
      {{{0, 0, 0, 0}}, 0, {{0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u}}},
      {{{~0u, ~0u, ~0u, ~0u}}, ~0ull, {{0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu}}},
      {{{0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u}},
       0x299f31d0a4093822ull,
       {{0xd16cfe09u, 0x94fdccebu, 0x5001e420u, 0x24126ea1u}}},
  };
  for (const auto& c : cases) {
    const Philox4x32 actual = pdiff::philox(c.counter, c.key);
    for (int i = 0; i < 4; ++i) CHECK_EQ(actual.word[i], c.expected.word[i]);
  }
}

TEST(random_word_is_a_lane_of_its_group) {
  const pdiff::RandomStream stream = {0x123456789abcdefull, 77, 5, pdiff::RandomUse::kToken};
  for (uint32_t id = 0; id < 64; ++id) {
    CHECK_EQ(pdiff::random_word(stream, id), pdiff::random_words(stream, id / 4).word[id % 4]);
  }
}

TEST(gumbel_is_finite_and_falls_with_the_word) {
  const uint32_t words[] = {0, 1, 2, 1000, 1u << 20, 1u << 31, 0xfffffffeu, 0xffffffffu};
  for (size_t i = 0; i < sizeof(words) / sizeof(words[0]); ++i) {
    CHECK(std::isfinite(pdiff::gumbel(words[i])));
    if (i > 0) CHECK(pdiff::gumbel(words[i]) <= pdiff::gumbel(words[i - 1]));
  }
}

TEST(ranks_before_is_a_total_order) {
  CHECK(pdiff::ranks_before(2.0f, 9, 1.0f, 3));
  CHECK(pdiff::ranks_before(1.0f, 3, 1.0f, 9));
  CHECK(!pdiff::ranks_before(1.0f, 3, 1.0f, 3));
  CHECK(!pdiff::ranks_before(1.0f, 3, 2.0f, 9));
}

}  // namespace

int main() { return pdiff::test::run_all(); }
