#pragma once

#include <cstdint>
#include <vector>

#include "pdiff/device.h"
#include "pdiff/span_layout.h"

namespace pdiff {

/// One sequence of a packed batch. Segments, intervals and tiles count rows and keys from the start
/// of their sequence; `*_begin` is where the sequence starts in the arrays of the batch.
struct PlanSequence {
  int32_t row_begin, num_rows;
  int32_t key_begin, num_keys;
  int32_t segment_begin, num_segments;
  int32_t page_begin;  // its pages: [page_begin, page_begin + ceil(num_keys / page_size))
  int32_t key_segment_begin, num_key_segments;
};

/// Rows [row_lo, row_hi) of one sequence; the first segment that reaches into them. A tile whose
/// keys are shared out is listed once per part: part p visits the key tiles [p, p + 1) *
/// kPartKeyTiles of its walk, and leaves its partial result in slot slot_begin + p.
struct PlanTile {
  int32_t sequence, row_lo, row_hi, segment;
  int32_t part, num_parts, slot_begin;
};

/// Keys [key_lo, key_hi) of one sequence; the first key segment that reaches into them.
struct PlanKeyTile {
  int32_t sequence, key_lo, key_hi, key_segment;
};

/// Who walks the tiles decides how large they are.
enum class Schedule : int32_t { kCpu = 0, kGpu = 1 };

/// Of the GPU schedule. A tile's rows are tokens with all heads of a group: `kGpuTileRows` of them
/// at most, or one token; a tile with at most kFewRows is bound by reading its keys, which is
/// shared out when there are many.
inline constexpr int32_t kGpuTileRows = 128, kGpuTileKeys = 64;
inline constexpr int32_t kFewRows = 16, kPartKeyTiles = 8;

inline constexpr int32_t kPlanMagic = 0x70646970;  // "pdip"

/// What kept a plan from being built on the device. It then has no tiles.
enum class PlanError : int32_t {
  kNone = 0,
  kNestedSpan = 1,    // a span was opened inside a span
  kTooManyTags = 2,   // more than max_tags
  kTooManyGaps = 3,   // more key intervals than kIntervalsPerSegment on average
  kBadCuSeqlens = 4,  // not ascending from 0 to total_tokens
};

/// The first words of a plan. Offsets count int32 words from the plan's start.
struct PlanHeader {
  int32_t magic, num_words;
  int32_t num_sequences, total_q, total_kv;
  int32_t num_heads_q, num_heads_kv, head_dim;
  int32_t schedule;   // Schedule
  int32_t tile_rows;  // rows of a tile; a tile row is one token with all heads of a group
  int32_t num_tiles, num_slots, num_key_tiles;
  int32_t page_size, num_pages;  // 0 when packed; else every page id is below num_pages
  int32_t sequences, sequence_order, tiles, segments, interval_ptr, intervals, pages;  // offsets
  int32_t key_tiles, key_segments, range_ptr, ranges;                                  // offsets
  int32_t error;                                                                       // PlanError
  int32_t split_keys;  // 0: every row sums in one order, whatever the rows beside it
};

/// A plan as kernels see it: pointers into one block of words, here or in device memory.
struct PlanView {
  PlanHeader header;
  const PlanSequence* sequences;  // [num_sequences]
  const int32_t* sequence_order;  // [num_sequences], most visible pairs first
  const PlanTile* tiles;          // [num_tiles], most work first
  const Segment* segments;        // all sequences, one after another
  const int32_t* interval_ptr;    // [num_segments + 1], over all sequences
  const KeyInterval* intervals;
  const int32_t* pages;  // page ids of all sequences, one after another

  // The same relation by keys (KeyMajorLayout), for the backward on a GPU: packed keys only.
  const PlanKeyTile* key_tiles;     // [num_key_tiles], most work first
  const KeyInterval* key_segments;  // all sequences, one after another
  const int32_t* range_ptr;         // [num_key_segments + 1], over all sequences
  const Segment* ranges;
};

struct AttentionPlanOptions {
  int32_t num_heads_q = 0, num_heads_kv = 0, head_dim = 0;
  Schedule schedule = Schedule::kCpu;
  bool split_keys = true;               // GPU: share out the keys of tiles with few rows
  int32_t tile_rows = 0;                // 0: what suits the schedule and, on a CPU,
  int32_t num_threads = 1;              // this many threads; no result depends on it
  int32_t page_size = 0;                // 0: packed keys and values
  const int32_t* page_table = nullptr;  // [num_sequences, max_pages], -1 past the end
  int64_t max_pages = 0;
};

/// The masks of a batch and the schedule of its tiles, in one block of int32 words that can be
/// copied as it is: to a device, or through a compiled graph as a tensor.
/// Tiling    a sequence's tiles start at its first row; how large they are changes no result.
/// Splitting whether and where a tile's keys are shared out depends on its sequence alone.
/// Order     tiles and sequences are listed by falling work; kernels may take them in any order.
class AttentionPlan {
 public:
  AttentionPlan(const std::vector<const SpanLayout*>& layouts, const AttentionPlanOptions& options);

  const int32_t* words() const { return words_.data(); }
  int64_t num_words() const { return static_cast<int64_t>(words_.size()); }
  const PlanHeader& header() const { return *reinterpret_cast<const PlanHeader*>(words_.data()); }

 private:
  std::vector<int32_t> words_;
};

/// A plan that is built on the device from packed token ids: what AttentionPlan holds for their
/// layouts (layout_from_tokens), with Schedule::kGpu and no keys shared out.
/// Room      for max_tags tags and syncs, stray ones included; what is left of it is not written.
/// Order     of tiles only roughly by work; of sequences as they come.
/// Errors    are in the header.
struct PlanFromTokensParams {
  static constexpr int64_t kIntervalsPerSegment = 4;

  const int64_t* token_ids;   // [total_tokens]
  const int32_t* cu_seqlens;  // [num_sequences + 1]
  int64_t total_tokens, num_sequences, max_tags;
  SpanTagIds tags;
  bool isolate_spans;
  int32_t num_heads_q, num_heads_kv, head_dim;
};

namespace cuda {

/// How many words the plan takes. Throws pdiff::Error when it can not be.
int64_t plan_from_tokens_words(const PlanFromTokensParams& params);
int64_t plan_from_tokens_workspace_bytes(const PlanFromTokensParams& params);

/// Nothing is read back; a graph may capture it.
void plan_from_tokens(const PlanFromTokensParams& params,
                      int32_t* words,   // [plan_from_tokens_words]
                      void* workspace,  // aligned to 16
                      const CudaQueue& queue);

}  // namespace cuda

/// Reads a block of words as a plan. Throws pdiff::Error when it is not one.
PlanView view_plan(const int32_t* words, int64_t num_words);

}  // namespace pdiff
