#pragma once

// A row: the settings of its span, and its logits in the order in which everyone goes through them.

#include "common/philox.h"
#include "cuda/common/vector.cuh"
#include "cuda/common/warp.cuh"
#include "cuda/ptx/memory.cuh"
#include "cuda/unmask/config.h"

namespace pdiff::cuda::unmasking {

struct Settings {
  bool draws;                 // temperature > 0
  float inverse_temperature;  // 1 at temperature 0
  float scale;                // log2(e) / temperature
  float top_p;                // >= 1: off
  int32_t top_k;              // 0: off
  RandomStream stream;

  __device__ bool filters() const { return top_p < 1.0f || top_k > 0; }
};

/// The last span that begins at or before a row. 32 are looked at together.
__device__ __forceinline__ int64_t find_span(const int32_t* cu_rows_span, int64_t num_spans,
                                             int64_t row) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  int64_t first = 0, n = num_spans;
  while (n > 1) {
    const int64_t step = (n + kWarpSize - 1) / kWarpSize;
    const bool is_before = lane * step < n && cu_rows_span[first + lane * step] <= row;
    const int last = max(__popc(__ballot_sync(kAllLanes, is_before)), 1) - 1;
    first += last * step;
    n = min(step, n - last * step);
  }
  return first;
}

__device__ __forceinline__ RandomStream random_stream(const UnmaskParams& p, int64_t row,
                                                      int64_t span, RandomUse use) {
  const int32_t* position = p.random_position != nullptr ? p.random_position : p.row_position;
  return {p.seeds != nullptr ? static_cast<uint64_t>(p.seeds[row]) : 0,
          static_cast<uint32_t>(position[row]), static_cast<uint32_t>(p.step_idx[span]), use};
}

__device__ __forceinline__ Settings settings_of(const UnmaskParams& p, int64_t row) {
  constexpr float kMinTemperature = 1e-20f;  // its inverse, times any usual logit, is finite
  const bool differ = p.temperature.values != nullptr || p.top_p.values != nullptr ||
                      p.top_k.values != nullptr || p.step_idx.values != nullptr;
  const int64_t span = differ ? find_span(p.cu_rows_span, p.num_spans, row) : 0;
  const float temperature = p.temperature[span];
  const int32_t top_k = p.top_k[span];
  Settings settings;
  settings.draws = temperature > 0.0f;
  settings.inverse_temperature = settings.draws ? 1.0f / fmaxf(temperature, kMinTemperature) : 1.0f;
  settings.scale = kLog2e * settings.inverse_temperature;
  settings.top_p = p.top_p[span];
  settings.top_k = top_k > 0 && top_k < p.vocab_size ? top_k : 0;
  settings.stream = random_stream(p, row, span, RandomUse::kToken);
  return settings;
}

template <typename T>
__device__ __forceinline__ uint32_t minus_infinity_bits() {
  if constexpr (std::is_same_v<T, float>) return 0xff800000u;
  return std::is_same_v<T, bfloat16> ? 0xff80u : 0xfc00u;
}

/// Puts -inf in place of the elements whose bit is set.
template <typename T>
__device__ __forceinline__ uint4 banned(const uint4& vector, uint32_t bits) {
  constexpr uint32_t kMinusInf = sizeof(T) == 4 ? 0xffffffffu : 0xffffu;
  uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
  constexpr int kPerWord = kPerVector<T> / 4;
#pragma unroll
  for (int i = 0; i < kPerVector<T>; ++i) {
    const int shift = i % kPerWord * 16;
    if ((bits >> i & 1) != 0) {
      words[i / kPerWord] = (words[i / kPerWord] & ~(kMinusInf << shift)) | minus_infinity_bits<T>()
                                                                                << shift;
    }
  }
  return {words[0], words[1], words[2], words[3]};
}

/// One warp's view of a row. A segment is read in chunks: vector `slot` of a lane in a chunk holds
/// the elements from element(chunk, slot) on. What lies past the row's end is -inf.
template <typename T>
class RowReader {
 public:
  static constexpr int kChunk = kSlots * kWarpSize * kPerVector<T>;
  static constexpr int kChunks = kSegment / kChunk;
  static constexpr int kBanWords = kSegment / 32;  // of the bits that a warp keeps
  using Chunk = uint4[kSlots];

  __device__ __forceinline__ RowReader(const UnmaskParams& p, int64_t row, uint32_t* ban_bits)
      : row_(static_cast<const T*>(p.logits) + row * p.logits_stride),
        vocab_size_(p.vocab_size),
        banned_ids_(p.banned_ids),
        num_banned_(p.num_banned),
        ban_bits_(ban_bits),
        lane_(static_cast<int>(threadIdx.x) % kWarpSize),
        is_aligned_(reinterpret_cast<uintptr_t>(row_) % 16 == 0) {}

  /// Index of a vector's first element in its segment; vectors of a lane count through its chunks.
  __device__ __forceinline__ static int element_of(int vector, int lane) {
    return (vector * kWarpSize + lane) * kPerVector<T>;
  }
  __device__ __forceinline__ int element(int chunk, int slot) const {
    return element_of(chunk * kSlots + slot, lane_);
  }

  /// The same for each element of a lane's chunk, numbered slot * kPerVector + i.
  __device__ __forceinline__ int element_of_bit(int chunk, int bit) const {
    return element(chunk, bit / kPerVector<T>) + bit % kPerVector<T>;
  }

  /// One logit, bans not applied.
  __device__ __forceinline__ float logit(int32_t id) const { return to_float(row_[id]); }

  /// One logit of the open segment; -inf if it is banned or past the row's end.
  __device__ __forceinline__ float logit_in(int32_t segment, int32_t id) const {
    const int at = id - segment * kSegment;
    const bool is_banned = has_bans_ && (ban_bits_[at / 32] >> at % 32 & 1) != 0;
    return id < vocab_size_ && !is_banned ? logit(id) : -kInf;
  }

  /// Whether an id is banned, in whichever segment; for few ids.
  __device__ __forceinline__ bool is_banned(int32_t id) const {
    bool found = false;
    for (int64_t i = 0; i < num_banned_; ++i) found |= banned_ids_[i] == id;
    return found;
  }

  /// Any vector of the row, bans not applied.
  __device__ __forceinline__ uint4 load_vector(int32_t segment, int element, bool wanted) const {
    const int64_t at = int64_t{segment} * kSegment + element;
    const auto left = static_cast<int>(min(vocab_size_ - at, int64_t{kSegment}));
    return load_edge(row_ + at, wanted ? left : 0);
  }

  /// Loads a chunk, bans not applied; -inf for a lane that does not want it.
  __device__ __forceinline__ void load(Chunk& x, int32_t segment, int chunk,
                                       bool wanted = true) const {
    const int first = element(chunk, 0);
    const T* begin = row_ + (int64_t{segment} * kSegment + first);
    constexpr int kPerSlot = kWarpSize * kPerVector<T>;
    const int64_t left = vocab_size_ - int64_t{segment} * kSegment;
    const int n = wanted ? static_cast<int>(min(left, int64_t{kSegment})) : 0;
    if (is_aligned_ && n == kSegment) {
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) x[slot] = load_once(begin + slot * kPerSlot);
      return;
    }
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      x[slot] = load_edge(begin + slot * kPerSlot, n - first - slot * kPerSlot);
    }
  }

  /// Looks up what is banned in a segment, for ban().
  __device__ __forceinline__ void open(int32_t segment) {
    has_bans_ = false;
    for (int64_t i = lane_; i - lane_ < num_banned_; i += kWarpSize) {
      const int64_t begin = int64_t{segment} * kSegment;
      const int64_t at = i < num_banned_ ? banned_ids_[i] - begin : -1;
      const bool is_inside = at >= 0 && at < kSegment;
      if (!__any_sync(kAllLanes, is_inside)) continue;
      if (!has_bans_) {
        has_bans_ = true;
        __syncwarp();  // the bits of the segment before have been read
        for (int word = lane_; word < kBanWords; word += kWarpSize) ban_bits_[word] = 0;
        __syncwarp();
      }
      if (is_inside) atomicOr(ban_bits_ + at / 32, 1u << at % 32);
    }
    __syncwarp();
  }

  __device__ __forceinline__ void ban(Chunk& x, int chunk) const {
    if (!has_bans_) return;
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      const int at = element(chunk, slot);
      const uint32_t bits = ban_bits_[at / 32] >> at % 32 & ((1u << kPerVector<T>)-1);
      if (bits != 0) x[slot] = banned<T>(x[slot], bits);
    }
  }

 private:
  // The first n elements of a vector, one by one where it is not aligned or not whole.
  __device__ __forceinline__ uint4 load_edge(const T* x, int n) const {
    if (is_aligned_ && n >= kPerVector<T>) return load_once(x);
    using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;
    constexpr int kPerWord = kPerVector<T> / 4;
    uint32_t words[4] = {};
#pragma unroll
    for (int i = 0; i < kPerVector<T>; ++i) {
      const uint32_t bits =
          i < n ? __ldg(reinterpret_cast<const Bits*>(x) + i) : minus_infinity_bits<T>();
      words[i / kPerWord] |= bits << i % kPerWord * 16;
    }
    return {words[0], words[1], words[2], words[3]};
  }

  const T* row_;
  int64_t vocab_size_;
  const int64_t* banned_ids_;
  int64_t num_banned_;
  uint32_t* ban_bits_;
  int lane_;
  bool is_aligned_;
  bool has_bans_ = false;
};

}  // namespace pdiff::cuda::unmasking
