#pragma once

#include <cstdint>

#include "common/macros.h"

namespace pdiff {

struct Philox4x32 {
  uint32_t word[4];
};

/// Philox4x32-10: a counter-based generator (Salmon et al., 2011). The same counter and key give
/// the same four words on every device, so a random number has an address instead of a history.
PDIFF_HD Philox4x32 philox(Philox4x32 counter, uint64_t key) {
  uint32_t x0 = counter.word[0], x1 = counter.word[1], x2 = counter.word[2], x3 = counter.word[3];
  uint32_t key0 = static_cast<uint32_t>(key), key1 = static_cast<uint32_t>(key >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53u} * x0, product1 = uint64_t{0xCD9E8D57u} * x2;
    x0 = static_cast<uint32_t>(product1 >> 32) ^ x1 ^ key0;
    x1 = static_cast<uint32_t>(product1);
    x2 = static_cast<uint32_t>(product0 >> 32) ^ x3 ^ key1;
    x3 = static_cast<uint32_t>(product0);
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
PDIFF_HD Philox4x32 random_words(RandomStream stream, uint32_t group) {
  return philox({{group, stream.position, stream.step_idx, static_cast<uint32_t>(stream.use)}},
                stream.seed);
}

PDIFF_HD uint32_t random_word(RandomStream stream, uint32_t id) {
  const Philox4x32 words = random_words(stream, id / 4);
  const uint32_t low = id & 1 ? words.word[1] : words.word[0];
  const uint32_t high = id & 1 ? words.word[3] : words.word[2];
  return id & 2 ? high : low;
}

}  // namespace pdiff
