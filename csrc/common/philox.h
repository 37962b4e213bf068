#pragma once

#include <cstdint>

#include "common/macros.h"
#include "common/wide_product.h"

namespace pdiff {

template <typename Word>
struct Philox4x32 {
  Word word[4];
};

/// Philox4x32-10: a counter-based generator (Salmon et al., 2011). The same counter and key give
/// the same four words on every device, so a random number has an address instead of a history.
/// Word is uint32_t, or a vector of them: then each lane is a counter of its own.
template <typename Word>
PDIFF_HD Philox4x32<Word> philox(Philox4x32<Word> counter, uint64_t key) {
  Word x0 = counter.word[0], x1 = counter.word[1], x2 = counter.word[2], x3 = counter.word[3];
  uint32_t key0 = static_cast<uint32_t>(key), key1 = static_cast<uint32_t>(key >> 32);
#if defined(__CUDACC__)
#pragma unroll
#else
#pragma GCC unroll 10
#endif
  for (int round = 0; round < 10; ++round) {
    const WideProduct<Word> product0 = multiply_wide(x0, 0xD2511F53u);
    const WideProduct<Word> product1 = multiply_wide(x2, 0xCD9E8D57u);
    x0 = product1.high ^ x1 ^ key0;
    x1 = product1.low;
    x2 = product0.high ^ x3 ^ key1;
    x3 = product0.low;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {{x0, x1, x2, x3}};
}

/// What a random number is for. Part of its address, so two uses never share one.
enum class RandomUse : uint32_t { kToken = 0, kPosition = 1 };

/// Address of the random numbers of one row: (seed, absolute position, step), then an id. The batch
/// row is not part of it, so a request draws the same numbers in any batch.
struct RandomStream {
  uint64_t seed;
  uint32_t position;
  uint32_t step_idx;
  RandomUse use;
};

/// Words of ids 4 * group .. 4 * group + 3.
template <typename Word>
PDIFF_HD Philox4x32<Word> random_words(RandomStream stream, Word group) {
  const auto same = [&](uint32_t value) { return (group ^ group) ^ value; };  // in every lane
  return philox<Word>(
      {{group, same(stream.position), same(stream.step_idx), same(uint32_t(stream.use))}},
      stream.seed);
}

PDIFF_HD uint32_t random_word(RandomStream stream, uint32_t id) {
  const Philox4x32<uint32_t> words = random_words(stream, id / 4);
  const uint32_t low = id % 2 == 0 ? words.word[0] : words.word[1];
  const uint32_t high = id % 2 == 0 ? words.word[2] : words.word[3];
  return id % 4 < 2 ? low : high;
}

}  // namespace pdiff
