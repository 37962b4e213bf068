#pragma once

// Gumbel-max: a sample of the softmax as the argmax of logit / temperature + Gumbel number.

#include "common/gumbel.h"
#include "common/philox.h"
#include "cuda/common/warp.cuh"
#include "cuda/ptx/math.cuh"
#include "cuda/unmask/row.cuh"

namespace pdiff::cuda::unmasking {

/// d of a logit. It ends at -127, where 2^d counts as 0, so that -inf adds 0 and not -inf * 0.
__device__ __forceinline__ float shifted(float logit, float max, float scale) {
  return fmaxf((logit - max) * scale, -127.0f);
}

/// The better one: larger key, then lower id.
__device__ __forceinline__ Draw better(const Draw& a, const Draw& b) {
  if (b.id < 0) return a;
  if (a.id < 0) return b;
  return b.key > a.key || (b.key == a.key && b.id < a.id) ? b : a;
}

__device__ __forceinline__ Draw warp_best(Draw draw) {
  const float key = warp_max(draw.key);
  const bool has_key = draw.id >= 0 && draw.key == key;
  const uint32_t id = __reduce_min_sync(kAllLanes, has_key ? static_cast<uint32_t>(draw.id) : ~0u);
  const uint32_t owner = __ballot_sync(kAllLanes, has_key && static_cast<uint32_t>(draw.id) == id);
  if (owner == 0) return {};
  return {key, __shfl_sync(kAllLanes, draw.logit, __ffs(static_cast<int>(owner)) - 1),
          static_cast<int32_t>(id)};
}

/// The sampler of a warp. With v = (word + 1/2) / 2^32, the Gumbel number -log(-log(1 - v)) is at
/// most -log(v), so a logit can only reach the warp's best key if
///
///   word < 2^32 exp(logit / temperature - best key) = 2^d * limit
///
/// where 2^d is what the sums need anyway. Gumbel numbers themselves are rarely computed.
class Sampler {
 public:
  __device__ __forceinline__ explicit Sampler(const Settings& settings)
      : stream_(settings.stream),
        inverse_temperature_(settings.inverse_temperature),
        scale_(settings.scale) {}

  /// The logit for which d = 0 in this lane.
  __device__ __forceinline__ void set_max(float max) {
    max_ = max;
    update_limit();
  }

  /// Of kNum tokens with 2^d = e and ids from `first_id`, a multiple of 4: those that may win. More
  /// than four together share the generator's round keys.
  template <int kNum>
  __device__ __forceinline__ uint32_t candidates(const float (&e)[kNum], int32_t first_id) const {
    float largest = e[0];
#pragma unroll
    for (int i = 1; i < kNum; ++i) largest = fmaxf(largest, e[i]);
    if (!__any_sync(kAllLanes, !(largest * limit_ < 0.49f))) return 0;  // not even with word 0
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < kNum; i += 4) {
      const Philox4x32<uint32_t> words =
          random_words(stream_, static_cast<uint32_t>(first_id + i) / 4);
#pragma unroll
      for (int j = 0; j < 4; ++j) bits |= can_win(words.word[j], e[i + j]) ? 1u << (i + j) : 0u;
    }
    return bits;
  }

  /// Computes the keys of the tokens whose bit is set in some lane, where that is still needed.
  /// `id_of(bit)` is the token, `logit_of(id)` its logit, -inf for one that must not win.
  template <typename IdOf, typename LogitOf>
  __device__ __forceinline__ void settle(uint32_t bits, const IdOf& id_of,
                                         const LogitOf& logit_of) {
#pragma unroll 1
    for (; __any_sync(kAllLanes, bits != 0); bits &= bits - 1) {
      const int32_t id = bits != 0 ? id_of(__ffs(static_cast<int>(bits)) - 1) : 0;
      const float logit = bits != 0 ? logit_of(id) : -kInf;
      const uint32_t word = random_word(stream_, static_cast<uint32_t>(id));
      const bool wins = logit > -kInf && can_win(word, exp2_fast(shifted(logit, max_, scale_)));
      if (!__any_sync(kAllLanes, wins)) continue;
      const float key = wins ? __fmaf_rn(logit, inverse_temperature_, gumbel(word)) : -kInf;
      if (key > best_.key) best_ = {key, logit, id};
      best_key_ = fmaxf(best_key_, warp_max(key));
      update_limit();
    }
  }

  /// Whether some token has been settled.
  __device__ __forceinline__ bool has_key() const { return best_key_ > -kInf; }

  /// The best since the last call, of all lanes. What comes later must beat it nevertheless.
  __device__ __forceinline__ Draw take() {
    const Draw draw = warp_best(best_);
    best_ = {};
    return draw;
  }

 private:
  // A NaN says yes.
  __device__ __forceinline__ bool can_win(uint32_t word, float e) const {
    return !(static_cast<float>(word) > e * limit_);
  }

  __device__ __forceinline__ void update_limit() {
    constexpr float kSmallest = -3.2f;  // below every Gumbel number, so max alone reaches this
    const float at_max = max_ * inverse_temperature_;
    const float to_beat = fmaxf(best_key_, at_max + kSmallest);
    // Rounding of d, of 2^d and of the keys.
    const float slack = 1e-3f + 1e-6f * (fabsf(at_max) + fabsf(to_beat));
    limit_ = 0x1p32f * exp2_fast((at_max - to_beat + slack) * kLog2e);
  }

  RandomStream stream_;
  float inverse_temperature_, scale_;
  float max_ = 0.0f, limit_ = 0.0f;
  float best_key_ = -kInf;  // of the warp, ever
  Draw best_;               // of the lane
};

}  // namespace pdiff::cuda::unmasking
