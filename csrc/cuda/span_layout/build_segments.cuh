#pragma once

// Step 2, one block: from tags to the items of all sequences (common/token_items.h), and from those
// to segments, key intervals and their twin by keys.

#include "cuda/common/block_scan.cuh"
#include "cuda/ptx/shared.cuh"
#include "cuda/span_layout/config.h"
#include "cuda/span_layout/find_tags.cuh"

namespace pdiff::cuda {

struct BuildShared {
  Counts<int64_t, 4> scan[kWarpSize];
  int32_t error;
};

using Count = Counts<int32_t, 1>;

/// The first of [0, num) for which `is_past` holds; num if there is none. It holds from there on.
template <typename IsPast>
__device__ __forceinline__ int32_t first_past(int32_t num, const IsPast& is_past) {
  int32_t lo = 0, hi = num;
  while (lo < hi) {
    const int32_t mid = lo + (hi - lo) / 2;
    if (is_past(mid)) {
      hi = mid;
    } else {
      lo = mid + 1;
    }
  }
  return lo;
}

struct PlanBuilder {
  const PlanFromTokensParams& p;
  const PlanWorkspace& work;
  const PlanRoom& room;
  const PlanHeader& header;  // its offsets
  int32_t* words;
  BuildShared& shared;

  __device__ int32_t num_sequences() const { return static_cast<int32_t>(p.num_sequences); }
  __device__ int32_t num_rows(int32_t s) const { return p.cu_seqlens[s + 1] - p.cu_seqlens[s]; }
  __device__ void fail(PlanError error) const {
    atomicMax(&shared.error, static_cast<int32_t>(error));
  }
  template <typename F>
  __device__ void for_each(int32_t num, const F& f) const {
    for (int32_t i = static_cast<int32_t>(threadIdx.x); i < num;
         i += static_cast<int32_t>(blockDim.x)) {
      f(i);
    }
  }

  __device__ void check_sequences() const {
    for_each(num_sequences() + 1, [&](int32_t s) {
      const bool first = s == 0, last = s == num_sequences();
      const bool fits = (!first || p.cu_seqlens[s] == 0) &&
                        (!last || p.cu_seqlens[s] == p.total_tokens) &&
                        (last || p.cu_seqlens[s] <= p.cu_seqlens[s + 1]);
      if (!fits) fail(PlanError::kBadCuSeqlens);
    });
    __syncthreads();
  }

  /// The tags of all chunks in one list; how many there are.
  __device__ int32_t gather_tags() const {
    const int32_t num_tags =
        place_items(
            room.chunks, shared.scan, [&](int32_t c) { return Count{{work.chunk_counts[c]}}; },
            [&](int32_t c, const Count& before) { work.chunk_begin[c] = before.of[0]; })
            .of[0];
    if (num_tags > room.tags) return num_tags;
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    for (int32_t c = static_cast<int32_t>(threadIdx.x) / kWarpSize; c < room.chunks;
         c += static_cast<int32_t>(blockDim.x) / kWarpSize) {
      for (int32_t i = lane; i < work.chunk_counts[c]; i += kWarpSize) {
        work.tags[work.chunk_begin[c] + i] = work.chunk_tags[c * kChunkTokens + i];
      }
    }
    __syncthreads();
    return num_tags;
  }

  /// Spans and the syncs outside them. Of the brackets of a sequence, one that opens makes a span
  /// with the next if that closes; else it is nested if that opens, and a plain token if there is
  /// none.
  __device__ int32_t find_items(int32_t num_tags) const {
    const int32_t num_brackets =
        place_items(
            num_tags, shared.scan, [&](int32_t i) { return Count{{is_bracket(work.tags[i])}}; },
            [&](int32_t i, const Count& before) {
              work.rank[i] = before.of[0];
              if (is_bracket(work.tags[i])) work.brackets[before.of[0]] = work.tags[i];
            })
            .of[0];
    const auto kind_in = [&](int32_t bracket, int32_t begin, int32_t end) {
      if (bracket < 0 || bracket >= num_brackets) return int32_t{kNoTag};
      const int32_t position = position_of(work.brackets[bracket]);
      return position >= begin && position < end ? kind_of(work.brackets[bracket])
                                                 : int32_t{kNoTag};
    };
    const auto item_of = [&](int32_t i, bool* is_item) {
      const int32_t tag = work.tags[i], position = position_of(tag), rank = work.rank[i];
      const int32_t sequence =
          first_past(num_sequences(), [&](int32_t s) { return p.cu_seqlens[s + 1] > position; });
      const int32_t begin = p.cu_seqlens[sequence], end = p.cu_seqlens[sequence + 1];
      if (kind_of(tag) == kOpens) {
        const int32_t next = kind_in(rank + 1, begin, end);
        if (next == kOpens) fail(PlanError::kNestedSpan);
        *is_item = next == kCloses;
        const int32_t hi = *is_item ? position_of(work.brackets[rank + 1]) + 1 : 0;
        return TokenItem{position, hi, kSpanItem, sequence};
      }
      const bool is_inside =
          kind_in(rank - 1, begin, end) == kOpens && kind_in(rank, begin, end) == kCloses;
      *is_item = kind_of(tag) == kSync && !is_inside;
      return TokenItem{position, position, kSyncItem, sequence};
    };
    return place_items(
               num_tags, shared.scan,
               [&](int32_t i) {
                 bool is_item;
                 (void)item_of(i, &is_item);
                 return Count{{is_item}};
               },
               [&](int32_t i, const Count& before) {
                 bool is_item;
                 const TokenItem item = item_of(i, &is_item);
                 if (is_item) work.found[before.of[0]] = item;
               })
        .of[0];
  }

  /// The items: of the syncs those right after a span, joint spans as one, ends of sequences.
  __device__ int32_t keep_items(int32_t num_found) const {
    const TokenItem* found = work.found;
    const auto follows_span = [&](int32_t i) {
      return i > 0 && found[i - 1].sequence == found[i].sequence && found[i - 1].kind == kSpanItem;
    };
    const auto continues = [&](int32_t i) {
      return i < num_found && !p.isolate_spans && found[i].kind == kSpanItem && follows_span(i) &&
             found[i - 1].hi == found[i].lo;
    };
    const auto is_kept = [&](int32_t i) {
      return found[i].kind == kSpanItem ? !continues(i) : follows_span(i);
    };
    const int32_t num_kept =
        place_items(
            num_found, shared.scan, [&](int32_t i) { return Count{{is_kept(i)}}; },
            [&](int32_t i, const Count& before) {
              work.rank[i] = before.of[0];
              const bool kept = is_kept(i);
              const int32_t origin = p.cu_seqlens[found[i].sequence];
              TokenItem& item = work.items[before.of[0] - !kept + found[i].sequence];
              if (kept) {
                item.lo = found[i].lo - origin;
                item.kind = found[i].kind;
                item.sequence = found[i].sequence;
              }
              const bool ends_here = found[i].kind == kSpanItem ? !continues(i + 1) : kept;
              if (ends_here) item.hi = found[i].hi - origin;
            })
            .of[0];
    for_each(num_sequences(), [&](int32_t s) {
      const int32_t next =
          first_past(num_found, [&](int32_t i) { return found[i].lo >= p.cu_seqlens[s + 1]; });
      const int32_t num_before = next < num_found ? work.rank[next] : num_kept;
      work.items[num_before + s] = {num_rows(s), num_rows(s), kEndItem, s};
    });
    __syncthreads();
    return num_kept + num_sequences();
  }

  /// Where each item's segments go, and the gaps.
  __device__ TokenItems place(int32_t num_items) const {
    TokenItems all{work.items, work.places, work.syncs, work.first_gap, 0};
    using PlaceCounts = Counts<int32_t, 4>;
    const PlaceCounts total = place_items(
        num_items, shared.scan,
        [&](int32_t i) {
          const ItemPlace adds = all.adds(i);
          return PlaceCounts{{adds.segments, adds.gaps, adds.key_segments, adds.syncs}};
        },
        [&](int32_t i, const PlaceCounts& before) {
          const ItemPlace place{before.of[0], before.of[1], before.of[2], before.of[3]};
          const TokenItem& item = all.items[i];
          work.places[i] = place;
          if (all.is_first(i)) {
            work.first_gap[item.sequence] = place.gaps;
            work.sequence_places[item.sequence] = place;
          }
          const bool starts_gap = all.starts_gap(i);
          if (starts_gap) work.gaps[place.gaps] = {all.text_lo(i), item.lo};
          if (item.kind == kSyncItem) {
            work.gaps[place.gaps + starts_gap] = {0, all.items[i + 1].lo};
            work.syncs[place.syncs] = i;
          }
        });
    if (threadIdx.x == 0) {
      work.sequence_places[num_sequences()] = {total.of[0], total.of[1], total.of[2], total.of[3]};
    }
    __syncthreads();
    all.num_syncs = total.of[3];
    return all;
  }

  /// Writes [lo, hi) behind the gaps that the rows see, or instead of the last of them.
  __device__ void write_intervals(KeyInterval* to, const KeyInterval& gaps, bool extends_last,
                                  int32_t lo, int32_t hi) const {
    int32_t num = 0;
    for (int32_t gap = gaps.lo; gap < gaps.hi; ++gap) to[num++] = work.gaps[gap];
    if (extends_last) {
      to[num - 1].hi = hi;
    } else {
      to[num] = {lo, hi};
    }
  }

  __device__ void write_segments(const TokenItems& all, int32_t num_items) const {
    auto* segments = reinterpret_cast<Segment*>(words + header.segments);
    auto* intervals = reinterpret_cast<KeyInterval*>(words + header.intervals);
    auto* key_segments = reinterpret_cast<KeyInterval*>(words + header.key_segments);
    auto* ranges = reinterpret_cast<Segment*>(words + header.ranges);
    int32_t* interval_ptr = words + header.interval_ptr;
    int32_t* range_ptr = words + header.range_ptr;
    if (threadIdx.x == 0) interval_ptr[0] = range_ptr[0] = 0;
    using Sizes = Counts<int64_t, 2>;  // intervals, ranges
    const Sizes total = place_items(
        num_items, shared.scan,
        [&](int32_t i) {
          return Sizes{{int64_t{all.num_text_intervals(i)} + all.num_span_intervals(i),
                        all.num_ranges(i, num_rows(all.items[i].sequence))}};
        },
        [&](int32_t i, const Sizes& before) {
          const TokenItem& item = all.items[i];
          const ItemPlace& place = all.places[i];
          const bool has_text = all.has_text(i), is_span = item.kind == kSpanItem;
          const int32_t text_lo = all.text_lo(i), rows = num_rows(item.sequence);
          const int32_t num_text = all.num_text_intervals(i);
          const int32_t num_span = all.num_span_intervals(i);
          if (before.of[0] + num_text + num_span > room.intervals) return;
          const KeyInterval gaps = all.visible_gaps(i);
          const int32_t at = static_cast<int32_t>(before.of[0]);
          if (has_text) {
            segments[place.segments] = {text_lo, item.lo, kCausal};
            interval_ptr[place.segments + 1] = at + num_text;
            write_intervals(intervals + at, gaps, true, 0, item.lo);
          }
          if (is_span) {
            segments[place.segments + has_text] = {item.lo, item.hi, kFull};
            interval_ptr[place.segments + has_text + 1] = at + num_text + num_span;
            write_intervals(intervals + at + num_text, gaps, has_text, item.lo, item.hi);
          }

          int32_t range = static_cast<int32_t>(before.of[1]), key_segment = place.key_segments;
          if (all.starts_key_text(i)) {
            const int32_t hi = item.kind == kSyncItem ? all.items[i + 1].lo : item.lo;
            key_segments[key_segment] = {text_lo, hi};
            ranges[range++] = {text_lo, rows, kCausal};
            range_ptr[++key_segment] = range;
          }
          if (is_span) {
            const int32_t opened_at = all.opened_at(i, rows);
            const bool is_one = opened_at == item.hi;
            key_segments[key_segment] = {item.lo, item.hi};
            ranges[range++] = {item.lo, is_one ? rows : item.hi, kFull};
            if (!is_one && opened_at < rows) ranges[range++] = {opened_at, rows, kFull};
            range_ptr[++key_segment] = range;
          }
        });
    if (threadIdx.x == 0 && total.of[0] > room.intervals) fail(PlanError::kTooManyGaps);
    __syncthreads();
  }

  /// The sequences, and how many tiles each has.
  __device__ Counts<int32_t, 2> write_sequences() const {
    auto* sequences = reinterpret_cast<PlanSequence*>(words + header.sequences);
    using Tiles = Counts<int32_t, 2>;
    const auto tiles_of = [&](int32_t s) {
      const int32_t rows = num_rows(s);
      return Tiles{{(rows + header.tile_rows - 1) / header.tile_rows,
                    (rows + kGpuTileKeys - 1) / kGpuTileKeys}};
    };
    const Tiles total =
        place_items(num_sequences(), shared.scan, tiles_of, [&](int32_t s, const Tiles& before) {
          const ItemPlace &place = work.sequence_places[s], &next = work.sequence_places[s + 1];
          sequences[s] = {.row_begin = p.cu_seqlens[s],
                          .num_rows = num_rows(s),
                          .key_begin = p.cu_seqlens[s],
                          .num_keys = num_rows(s),
                          .segment_begin = place.segments,
                          .num_segments = next.segments - place.segments,
                          .page_begin = 0,
                          .key_segment_begin = place.key_segments,
                          .num_key_segments = next.key_segments - place.key_segments};
          words[header.sequence_order + s] = s;
          work.tile_begin[s] = before.of[0];
          work.key_tile_begin[s] = before.of[1];
        });
    return total;
  }
};

__global__ void __launch_bounds__(kMaxBuildThreads, 1)
    build_segments_kernel(const __grid_constant__ PlanFromTokensParams p,
                          const __grid_constant__ PlanWorkspace work,
                          const __grid_constant__ PlanRoom room,
                          const __grid_constant__ PlanHeader header, int32_t* words) {
  auto& shared = *reinterpret_cast<BuildShared*>(shared_memory());
  const PlanBuilder builder{p, work, room, header, words, shared};
  if (threadIdx.x == 0) shared.error = 0;
  __syncthreads();
  builder.check_sequences();
  Counts<int32_t, 2> num_tiles{};
  if (shared.error == 0) {
    const int32_t num_tags = builder.gather_tags();
    if (num_tags > room.tags) {
      builder.fail(PlanError::kTooManyTags);
    } else {
      const int32_t num_items = builder.keep_items(builder.find_items(num_tags));
      builder.write_segments(builder.place(num_items), num_items);
      num_tiles = builder.write_sequences();
    }
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  PlanHeader& written = *reinterpret_cast<PlanHeader*>(words);
  written = header;
  written.error = shared.error;
  written.num_tiles = shared.error == 0 ? num_tiles.of[0] : 0;
  written.num_key_tiles = shared.error == 0 ? num_tiles.of[1] : 0;
}

}  // namespace pdiff::cuda
