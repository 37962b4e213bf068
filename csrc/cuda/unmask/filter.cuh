#pragma once

// Top-p and top-k without a sort of the row: a block finds the last kept token, then adds up the
// kept ones.
//
// Most rows have few tokens that could be kept; those are listed and sorted in shared memory, and
// the row is not looked at again. Else the range of logits is cut into bins, and only the bin that
// holds the end of the prefix is looked into. Mass is counted in integers, so no order of adding
// changes it.

#include "cuda/common/block_sort.cuh"
#include "cuda/unmask/score.cuh"

namespace pdiff::cuda::unmasking {

inline constexpr int kBins = 2048, kListCapacity = 4096, kMaxWantedLanes = 1024;
inline constexpr int kFilterWarps = 8;

/// Unsigned numbers in the order of floats; -0 equals 0.
__device__ __forceinline__ uint32_t ordered_bits(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f);
  return bits >> 31 != 0 ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float from_ordered_bits(uint32_t bits) {
  return __uint_as_float(bits >> 31 != 0 ? bits & 0x7fffffffu : ~bits);
}

/// A token as a number: ascending numbers are (logit descending, id ascending).
__device__ __forceinline__ uint64_t token_key(float logit, int32_t id) {
  return uint64_t{~ordered_bits(logit)} << 32 | static_cast<uint32_t>(id);
}
__device__ __forceinline__ float logit_of(uint64_t key) {
  return from_ordered_bits(~static_cast<uint32_t>(key >> 32));
}
__device__ __forceinline__ int32_t id_of(uint64_t key) { return static_cast<int32_t>(key); }

/// Where a prefix shall end: at the token that reaches either. Counts include what comes before.
struct Prefix {
  uint64_t mass;
  int64_t num;
};

/// What of a row adds up, for the tokens that are kept.
struct KeptScore {
  double sum, weighted;
  uint32_t num;
  Draw draw;
};

struct FilterShared {
  union {
    struct {  // bin b at bin_slot(b)
      uint32_t num[kBins], mass_low[kBins], mass_high[kBins];
    } bins;
    uint64_t list[kListCapacity];
  };
  uint32_t wanted_lanes[kMaxWantedLanes];  // segment * 32 + lane
  KeptScore of_warps[kFilterWarps];
  Prefix kept;  // before the bin
  int32_t bin;  // -1: the goal is not reached
  uint32_t num, num_wanted, lowest, largest, end;
};

/// Lane l goes through bins 64 l .. 64 l + 63, in 32 different banks at a time.
__device__ __forceinline__ int bin_slot(int bin) {
  constexpr int kPerLane = kBins / kWarpSize;
  return bin % kPerLane * kWarpSize + bin / kPerLane;
}

/// Tokens that may be the last kept one: lo <= logit <= hi; where hi = lo, ids from first_id on.
struct Window {
  float hi, lo;
  uint32_t first_id, num_ids;

  __device__ bool is_by_id() const { return hi == lo; }
  __device__ bool has(float logit, int32_t id) const {
    return logit >= lo && logit <= hi && (!is_by_id() || id - first_id < num_ids);
  }
};

/// Cuts a window into bins, in the order in which tokens are kept.
struct Cut {
  float unit, minus_unit, hi, bins_per_logit;
  uint32_t ids_per_bin, first_id;
  bool is_by_id;

  __device__ explicit Cut(const Window& window) {
    // A power of two that keeps the range of logits in the range of normal floats.
    const float range = 0.5f * window.hi - 0.5f * window.lo;
    unit = range > 0x1p100f ? 0.25f : range < 0x1p-60f ? 0x1p64f : 1.0f;
    minus_unit = -unit;
    hi = window.hi * unit;
    bins_per_logit = (kBins - 1) / (hi - window.lo * unit);
    ids_per_bin = (window.num_ids + kBins - 1) / kBins;
    first_id = window.first_id;
    is_by_id = window.is_by_id();
  }

  __device__ int bin_of(float logit, int32_t id) const {
    if (is_by_id) return static_cast<int>((id - first_id) / ids_per_bin);
    const float at = fmaf(logit, minus_unit, hi) * bins_per_logit;
    return static_cast<int>(fminf(fmaxf(at, 0.0f), kBins - 1));
  }
};

/// The block's filter of one row. Every method is called by all threads.
template <typename T>
class RowFilter {
 public:
  using Reader = RowReader<T>;

  __device__ RowFilter(const UnmaskParams& p, const float* lane_max, Reader& reader,
                       const Settings& settings, float max, double sum, FilterShared& shared)
      : reader_(reader),
        settings_(settings),
        shared_(shared),
        lane_max_(lane_max),
        max_(max),
        vocab_size_(p.vocab_size),
        segments_(num_segments(p.vocab_size)),
        thread_(static_cast<int>(threadIdx.x)),
        num_threads_(static_cast<int>(blockDim.x)) {
    const int bits = 32 - __clz(static_cast<int>(p.vocab_size));
    mass_unit_ = __uint_as_float(static_cast<uint32_t>(127 + 62 - bits) << 23);
    has_mass_ = settings.top_p < 1.0f;
    goal_.mass = ~uint64_t{0};
    if (has_mass_) {
      const double mass = ceil(settings.top_p * sum * mass_unit_);
      goal_.mass = mass > 1.0 ? static_cast<uint64_t>(mass) : 1;
    }
    goal_.num = settings.top_k > 0 ? settings.top_k : INT64_MAX;
    bound_ = kLowest;
    if (has_mass_) {
      // Tokens with 2^d < (1 - top_p) sum / vocab_size weigh less than 1 - top_p together. One bit
      // of slack for rounding.
      const double tail = (1.0 - settings.top_p) * sum / static_cast<double>(p.vocab_size);
      bound_ = fmaxf(bound_, max + static_cast<float>((log2(tail) - 1.0) / settings.scale));
    }
  }

  __device__ KeptScore run() {
    raise_bound_by_lanes();
    if (list_all_tokens()) {
      sort_list();
      find_end_in_list({0, 0});
      return score_list();
    }
    return score_row(find_end_in_row());
  }

 private:
  __device__ uint64_t mass_of(float logit) const {
    return static_cast<uint64_t>(exp2_fast(shifted(logit, max_, settings_.scale)) * mass_unit_);
  }

  // visit(logits of a vector, where it is) for what lanes with a logit >= bound hold.
  template <typename Visit>
  __device__ __forceinline__ void for_each_vector(float bound, const Visit& visit) {
    const int lane = thread_ % kWarpSize, num_warps = num_threads_ / kWarpSize;
    const int64_t num_chunks = int64_t{segments_} * Reader::kChunks;
    const auto lane_max = [&](int64_t chunk) {
      return chunk < num_chunks ? lane_max_[chunk / Reader::kChunks * kWarpSize + lane] : -kInf;
    };
    int64_t i = thread_ / kWarpSize;
    float largest = lane_max(i);
    for (; i < num_chunks; i += num_warps) {
      const auto segment = static_cast<int32_t>(i / Reader::kChunks);
      const int chunk = static_cast<int>(i % Reader::kChunks);
      const bool wanted = largest >= bound;
      largest = lane_max(i + num_warps);
      if (!__any_sync(kAllLanes, wanted)) continue;
      uint4 x[kSlots];
      reader_.load(x, segment, chunk, wanted);
      reader_.open(segment);
      reader_.ban(x, chunk);
#pragma unroll 1  // the vectors move through x[0], or the code would be four times as long
      for (int slot = 0; slot < kSlots; ++slot) {
        float v[kPerVector<T>];
        unpack<T>(x[0], v);
        visit(v, segment, chunk, slot);
#pragma unroll
        for (int next = 1; next < kSlots; ++next) x[next - 1] = x[next];
      }
    }
  }

  template <typename Visit>
  __device__ __forceinline__ void for_each_token(float bound, const Visit& visit) {
    for_each_vector(bound, [&](const auto& v, int32_t segment, int chunk, int slot) {
      const int32_t first_id = segment * kSegment + reader_.element(chunk, slot);
#pragma unroll
      for (int i = 0; i < kPerVector<T>; ++i) visit(v[i], first_id + i);
    });
  }

  // The largest logits of the lanes are tokens too: the k-th of them is at most the k-th of all.
  __device__ void raise_bound_by_lanes() {
    const int64_t num_lanes = int64_t{segments_} * kWarpSize;
    if (settings_.top_k == 0 || settings_.top_k > num_lanes || num_lanes > kListCapacity) return;
    if (thread_ == 0) shared_.num = static_cast<uint32_t>(num_lanes);
    for (int i = thread_; i < num_lanes; i += num_threads_) {
      shared_.list[i] = token_key(lane_max_[i], i);
    }
    __syncthreads();
    sort_list();
    bound_ = fmaxf(bound_, logit_of(shared_.list[settings_.top_k - 1]));
    __syncthreads();
  }

  __device__ __forceinline__ void append(float logit, int32_t id) {
    const uint32_t at = atomicAdd(&shared_.num, 1u);
    if (at < kListCapacity) shared_.list[at] = token_key(logit, id);
  }

  // Lists every token that could be kept; false if they are too many. All threads share the few
  // lanes that hold one: whatever the row's length, two loads after another.
  __device__ bool list_all_tokens() {
    constexpr int kVectors = kSegment / kWarpSize / kPerVector<T>, kTogether = 4;
    if (thread_ == 0) shared_.num = shared_.num_wanted = 0;
    __syncthreads();
    const int64_t num_lanes = int64_t{segments_} * kWarpSize;
    for (int64_t i = thread_; i < num_lanes; i += num_threads_) {
      if (lane_max_[i] < bound_) continue;
      const uint32_t at = atomicAdd(&shared_.num_wanted, 1u);
      if (at >= kMaxWantedLanes) break;
      shared_.wanted_lanes[at] = static_cast<uint32_t>(i);
    }
    __syncthreads();
    const int num_wanted = static_cast<int>(shared_.num_wanted);
    if (num_wanted > kMaxWantedLanes) return false;
    const int num_vectors = num_wanted * kVectors;
    for (int begin = thread_; begin < num_vectors; begin += kTogether * num_threads_) {
      uint4 x[kTogether];
      int32_t first_id[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        const int item = begin + i * num_threads_;
        const bool is_valid = item < num_vectors;
        const uint32_t wanted = is_valid ? shared_.wanted_lanes[item % num_wanted] : 0;
        const auto segment = static_cast<int32_t>(wanted / kWarpSize);
        const int at = reader_.element_of(item / num_wanted, static_cast<int>(wanted % kWarpSize));
        first_id[i] = segment * kSegment + at;
        x[i] = reader_.load_vector(segment, at, is_valid);
      }
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        float v[kPerVector<T>];
        unpack<T>(x[i], v);
        uint32_t chosen = 0;
#pragma unroll
        for (int j = 0; j < kPerVector<T>; ++j) chosen |= v[j] >= bound_ ? 1u << j : 0u;
#pragma unroll 1
        for (; chosen != 0; chosen &= chosen - 1) {
          const int32_t id = first_id[i] + __ffs(static_cast<int>(chosen)) - 1;
          if (!reader_.is_banned(id)) append(reader_.logit(id), id);
        }
      }
    }
    __syncthreads();
    return shared_.num <= kListCapacity;
  }

  // Lists the tokens of a window that are chosen; false if they are too many.
  template <typename IsChosen>
  __device__ bool list_tokens(const Window& window, const IsChosen& is_chosen) {
    if (thread_ == 0) shared_.num = 0;
    __syncthreads();
    for_each_token(window.lo, [&](float logit, int32_t id) {
      if (is_chosen(logit, id)) append(logit, id);
    });
    __syncthreads();
    return shared_.num <= kListCapacity;
  }

  __device__ void sort_list() { block_sort(shared_.list, shared_.num); }

  // The number of entries of the sorted list that are kept; `before` weighs what comes before it.
  __device__ void find_end_in_list(const Prefix& before) {
    if (thread_ < kWarpSize) {
      const int num = static_cast<int>(shared_.num);
      int end = num;
      if (goal_.num - before.num <= num) {  // all that ties with this one
        const uint64_t last = shared_.list[goal_.num - before.num - 1] | 0xffffffffu;
        int first = 0;
        while (first < end) {
          const int middle = (first + end) / 2;
          if (shared_.list[middle] <= last) {
            first = middle + 1;
          } else {
            end = middle;
          }
        }
      }
      uint64_t mass = before.mass;
      for (int begin = 0; has_mass_ && begin < end; begin += kWarpSize) {
        const int i = begin + thread_;
        uint64_t own = i < end ? mass_of(logit_of(shared_.list[i])) : 0;
#pragma unroll
        for (int distance = 1; distance < kWarpSize; distance *= 2) {
          const uint64_t other = __shfl_up_sync(kAllLanes, own, distance);
          if (thread_ >= distance) own += other;
        }
        const uint32_t reached = __ballot_sync(kAllLanes, mass + own >= goal_.mass);
        if (reached != 0) end = min(end, begin + __ffs(static_cast<int>(reached)));
        mass += __shfl_sync(kAllLanes, own, kWarpSize - 1);
      }
      if (thread_ == 0) shared_.end = static_cast<uint32_t>(end);
    }
    __syncthreads();
  }

  // The last kept token of a row with more candidates than the list holds.
  __device__ uint64_t find_end_in_row() {
    Window window{max_, bound_, 0, static_cast<uint32_t>(vocab_size_)};
    Prefix before{0, 0};
    for (;;) {
      if (window.is_by_id()) {
        if (!has_mass_) break;  // top-k keeps whatever ties
        goal_.num = INT64_MAX;
      }
      const Cut cut(window);
      count_bins(window, cut);
      find_bin(before);
      const int bin = shared_.bin;
      if (bin < 0) break;
      before = shared_.kept;
      __syncthreads();
      const auto is_in_bin = [&](float logit, int32_t id) {
        return window.has(logit, id) && cut.bin_of(logit, id) == bin;
      };
      if (list_tokens(window, is_in_bin)) {
        sort_list();
        find_end_in_list(before);
        return shared_.list[shared_.end - 1];
      }
      if (window.is_by_id()) {
        window.first_id += bin * cut.ids_per_bin;
        window.num_ids = cut.ids_per_bin;
      } else {
        measure(is_in_bin, window);
      }
    }
    return token_key(window.lo, INT32_MAX);
  }

  __device__ void count_bins(const Window& window, const Cut& cut) {
    __syncthreads();
    for (int i = thread_; i < kBins; i += num_threads_) {
      shared_.bins.num[i] = shared_.bins.mass_low[i] = shared_.bins.mass_high[i] = 0;
    }
    __syncthreads();
    for_each_token(window.lo, [&](float logit, int32_t id) {
      if (!window.has(logit, id)) return;
      const int slot = bin_slot(cut.bin_of(logit, id));
      atomicAdd(&shared_.bins.num[slot], 1u);
      if (!has_mass_) return;
      const uint64_t mass = mass_of(logit);
      const auto low = static_cast<uint32_t>(mass);
      const bool carries = atomicAdd(&shared_.bins.mass_low[slot], low) > ~low;
      const uint32_t high = static_cast<uint32_t>(mass >> 32) + carries;
      if (high != 0) atomicAdd(&shared_.bins.mass_high[slot], high);
    });
    __syncthreads();
  }

  // The first bin where the goal is reached, and what comes before it.
  __device__ void find_bin(const Prefix& before) {
    constexpr int kPerLane = kBins / kWarpSize;
    if (thread_ < kWarpSize) {
      const auto bin_at = [&](int bin) {
        const int slot = bin_slot(bin);
        return Prefix{uint64_t{shared_.bins.mass_high[slot]} << 32 | shared_.bins.mass_low[slot],
                      shared_.bins.num[slot]};
      };
      const auto is_reached = [&](const Prefix& prefix) {
        return prefix.mass >= goal_.mass || prefix.num >= goal_.num;
      };
      Prefix own{0, 0};
      for (int i = 0; i < kPerLane; ++i) {
        const Prefix bin = bin_at(thread_ * kPerLane + i);
        own.mass += bin.mass;
        own.num += bin.num;
      }
      Prefix until = own;
#pragma unroll
      for (int distance = 1; distance < kWarpSize; distance *= 2) {
        const uint64_t mass = __shfl_up_sync(kAllLanes, until.mass, distance);
        const int64_t num = __shfl_up_sync(kAllLanes, until.num, distance);
        if (thread_ >= distance) until.mass += mass, until.num += num;
      }
      until.mass += before.mass;
      until.num += before.num;
      const uint32_t reached = __ballot_sync(kAllLanes, is_reached(until));
      if (reached == 0 && thread_ == 0) shared_.bin = -1;
      if (reached != 0 && thread_ == __ffs(static_cast<int>(reached)) - 1) {
        Prefix kept{until.mass - own.mass, until.num - own.num};
        int bin = thread_ * kPerLane;
        for (;; ++bin) {
          const Prefix next = bin_at(bin);
          if (is_reached({kept.mass + next.mass, kept.num + next.num})) break;
          kept.mass += next.mass;
          kept.num += next.num;
        }
        shared_.bin = bin;
        shared_.kept = kept;
      }
    }
    __syncthreads();
  }

  // Narrows a window to the chosen tokens.
  template <typename IsChosen>
  __device__ void measure(const IsChosen& is_chosen, Window& window) {
    if (thread_ == 0) shared_.lowest = ~0u, shared_.largest = 0;
    __syncthreads();
    uint32_t lowest = ~0u, largest = 0;
    for_each_token(window.lo, [&](float logit, int32_t id) {
      if (!is_chosen(logit, id)) return;
      lowest = min(lowest, ordered_bits(logit));
      largest = max(largest, ordered_bits(logit));
    });
    lowest = __reduce_min_sync(kAllLanes, lowest);
    largest = __reduce_max_sync(kAllLanes, largest);
    if (thread_ % kWarpSize == 0) {
      atomicMin(&shared_.lowest, lowest);
      atomicMax(&shared_.largest, largest);
    }
    __syncthreads();
    window.lo = from_ordered_bits(shared_.lowest);
    window.hi = from_ordered_bits(shared_.largest);
  }

  __device__ KeptScore score_list() {
    KeptScore kept{};
    for (uint32_t i = thread_; i < shared_.end; i += num_threads_) {
      const float logit = logit_of(shared_.list[i]);
      const int32_t id = id_of(shared_.list[i]);
      const float d = shifted(logit, max_, settings_.scale), e = exp2_fast(d);
      kept.sum += e;
      kept.weighted += d * e;
      kept.num += 1;
      if (!settings_.draws) continue;
      const float key = fmaf(logit, settings_.inverse_temperature,
                             gumbel(random_word(settings_.stream, static_cast<uint32_t>(id))));
      if (key > -kInf) kept.draw = better(kept.draw, {key, logit, id});
    }
    kept.draw = warp_best(kept.draw);
    return join_warps(kept);
  }

  __device__ KeptScore score_row(uint64_t last) {
    KeptScore kept{};
    Sampler sampler(settings_);
    sampler.set_max(max_);
    uint32_t candidates = 0;
    for_each_vector(logit_of(last), [&](const auto& v, int32_t segment, int chunk, int slot) {
      const int32_t first_id = segment * kSegment + reader_.element(chunk, slot);
      float e[kPerVector<T>], sum = 0.0f, weighted = 0.0f;
#pragma unroll
      for (int i = 0; i < kPerVector<T>; ++i) {
        const bool is_kept = token_key(v[i], first_id + i) <= last;
        const float d = shifted(v[i], max_, settings_.scale);
        e[i] = is_kept ? exp2_fast(d) : 0.0f;
        sum += e[i];
        weighted = fmaf(d, e[i], weighted);
        kept.num += is_kept;
      }
      kept.sum += sum;
      kept.weighted += weighted;
      if (!settings_.draws) return;
      if (slot == 0) candidates = 0;
      candidates |= sampler.candidates(e, first_id) << (slot * kPerVector<T>);
      if (slot != kSlots - 1) return;
      sampler.settle(
          candidates,
          [&](int bit) { return segment * kSegment + reader_.element_of_bit(chunk, bit); },
          [&](int32_t id) {
            const float logit = reader_.logit_in(segment, id);
            return token_key(logit, id) <= last ? logit : -kInf;
          });
    });
    kept.draw = sampler.take();
    return join_warps(kept);
  }

  // The draw is that of the warp already.
  __device__ KeptScore join_warps(KeptScore kept) {
    kept.sum = warp_sum(kept.sum);
    kept.weighted = warp_sum(kept.weighted);
    kept.num = warp_sum(kept.num);
    if (thread_ % kWarpSize == 0) shared_.of_warps[thread_ / kWarpSize] = kept;
    __syncthreads();
    KeptScore all = shared_.of_warps[0];
    for (int warp = 1; warp < num_threads_ / kWarpSize; ++warp) {
      const KeptScore& other = shared_.of_warps[warp];
      all.sum += other.sum;
      all.weighted += other.weighted;
      all.num += other.num;
      all.draw = better(all.draw, other.draw);
    }
    return all;
  }

  Reader& reader_;
  const Settings& settings_;
  FilterShared& shared_;
  const float* lane_max_;  // [num_segments, 32] of the row
  float max_, mass_unit_, bound_;
  Prefix goal_;
  bool has_mass_;
  int64_t vocab_size_;
  int32_t segments_;
  int thread_, num_threads_;
};

}  // namespace pdiff::cuda::unmasking
