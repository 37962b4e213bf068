#pragma once

// Gumbel-max: a sample of the softmax as the argmax of logit / temperature + Gumbel number.

#include "common/gumbel.h"
#include "common/philox.h"
#include "cpu/kernels/unmask_block.h"

namespace pdiff::cpu::PDIFF_ISA {
namespace {

struct Sampler {
  RandomStream stream;
  float inverse_temperature;
};

// An upper bound of each word's Gumbel number, from exponent and mantissa of the word as a float.
// With v = (word + 1/2) / 2^32: -log(-log(1 - v)) <= -log(v), and log2(1 + m) >= m for a mantissa
// m. The last constant covers rounding.
PDIFF_INLINE Vec gumbel_bound(VecInt words) {
  constexpr float kLn2 = 0.693147181f;
  const Vec log2_word = to_float(bits(to_float_unsigned(words)));  // times 2^23, plus 127
  return fma(log2_word, broadcast(-kLn2 * 0x1p-23f), broadcast(kLn2 * (127 + 32) + 1e-4f));
}

// Offer kLanes logits with their words. Few can beat the best one so far, so the Gumbel numbers
// themselves are rarely computed. Rounding is monotonic, so a bound stays one.
PDIFF_INLINE void offer(UnmaskDraw& best, VecInt words, const float* x, int first_idx,
                        float inverse_temperature) {
  const Vec logits = load(x), scale = broadcast(inverse_temperature);
  const Mask candidates = fma(logits, scale, gumbel_bound(words)) >= broadcast(best.key);
  if (!any(candidates)) return;
  uint32_t word[kLanes];
  float keys[kLanes] = {};
  int32_t lanes[kLanes];
  store(word, words);
  const int num = store_compressed(lanes, candidates, iota());
  for (int i = 0; i < num; ++i) keys[lanes[i]] = gumbel(word[lanes[i]]);
  store(keys, fma(logits, scale, load(keys)));
  for (int i = 0; i < num; ++i) {
    const int j = lanes[i];
    if (keys[j] > best.key) best = {keys[j], x[j], first_idx + j};
  }
}

// The word of each lane's id.
PDIFF_INLINE VecInt random_words_of(RandomStream stream, VecInt ids) {
  const Philox4x32<VecInt> words = random_words(stream, ids >> 2);
  const Mask odd = any_bit(ids, 1);
  const VecInt low = select(odd, words.word[1], words.word[0]);
  const VecInt high = select(odd, words.word[3], words.word[2]);
  return select(any_bit(ids, 2), high, low);
}

// ids[i] is the vocabulary id of x[i]; null: first_idx + i.
void sample_block(UnmaskDraw& best, const float* x, int n, const int32_t* ids, int first_idx,
                  const Sampler& sampler) {
  if (ids != nullptr) {
    for (int i = 0; i < n; i += kLanes) {
      const VecInt words = random_words_of(sampler.stream, load(ids + i));
      offer(best, words, x + i, first_idx + i, sampler.inverse_temperature);
    }
    return;
  }
  for (int i = 0; i < n; i += 4 * kLanes) {
    const VecInt group = iota() + broadcast_int((first_idx + i) / 4);
    Philox4x32<VecInt> words = random_words(sampler.stream, group);
    interleave(words.word);
    for (int k = 0; k < 4; ++k) {
      const int j = i + k * kLanes;
      offer(best, words.word[k], x + j, first_idx + j, sampler.inverse_temperature);
    }
  }
}

}  // namespace
}  // namespace pdiff::cpu::PDIFF_ISA
