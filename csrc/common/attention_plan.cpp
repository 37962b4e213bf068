#include "pdiff/attention_plan.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>

#include "common/gpu_schedule.h"
#include "common/tile_walk.h"
#include "pdiff/error.h"

namespace pdiff {
namespace {

int32_t checked_sum(int64_t sum, const char* name) {
  PDIFF_CHECK(sum <= std::numeric_limits<int32_t>::max(), name, ": expected at most 2^31 - 1, got ",
              sum);
  return static_cast<int32_t>(sum);
}

// Tokens per tile of the CPU kernels. A tile reads its keys once for all its rows, so tiles are
// large, up to what the second-level cache holds, as long as every thread gets several of them.
int32_t cpu_tile_rows(const std::vector<const SpanLayout*>& layouts,
                      const AttentionPlanOptions& options) {
  constexpr int64_t kTasksPerThread = 4;
  const int32_t group_size = options.num_heads_q / options.num_heads_kv;
  int32_t rows = 0;
  for (const int32_t queries : {512, 256, 128}) {
    rows = std::max(1, queries / group_size);
    int64_t num_tasks = 0;
    for (const SpanLayout* layout : layouts) {
      num_tasks += int64_t{options.num_heads_kv} * ((layout->num_rows + rows - 1) / rows);
    }
    if (num_tasks >= kTasksPerThread * options.num_threads) break;
  }
  return rows;
}

// Indices in order of falling work.
std::vector<int32_t> by_falling(const std::vector<int64_t>& work) {
  std::vector<int32_t> order(work.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return work[a] > work[b]; });
  return order;
}

template <typename T>
std::vector<T> in_order(const std::vector<T>& records, const std::vector<int32_t>& order) {
  std::vector<T> ordered;
  ordered.reserve(records.size());
  for (const int32_t idx : order) ordered.push_back(records[idx]);
  return ordered;
}

// Appends trivially copyable records to the block of words and returns their offset.
template <typename T>
int32_t append(std::vector<int32_t>& words, const T* records, size_t count) {
  static_assert(sizeof(T) % sizeof(int32_t) == 0);
  const size_t offset = words.size();
  words.resize(offset + count * sizeof(T) / sizeof(int32_t));
  if (count > 0) std::memcpy(words.data() + offset, records, count * sizeof(T));
  return static_cast<int32_t>(offset);
}

template <typename T>
int32_t append(std::vector<int32_t>& words, const std::vector<T>& records) {
  return append(words, records.data(), records.size());
}

void check_layout(const SpanLayout& layout, size_t idx) {
  int32_t row = 0;
  for (int32_t s = 0; s < layout.num_segments(); ++s) {
    const Segment& segment = layout.segments[s];
    PDIFF_CHECK(
        row <= segment.q_lo && segment.q_lo < segment.q_hi && segment.q_hi <= layout.num_rows,
        "layouts[", idx, "]: expected segment rows that ascend within [0, ", layout.num_rows,
        "), got [", segment.q_lo, ", ", segment.q_hi, ")");
    row = segment.q_hi;
    int32_t key = 0;
    for (int32_t i = layout.interval_ptr[s]; i < layout.interval_ptr[s + 1]; ++i) {
      const KeyInterval& interval = layout.intervals[i];
      PDIFF_CHECK(key <= interval.lo && interval.lo < interval.hi && interval.hi <= layout.num_keys,
                  "layouts[", idx, "]: expected key intervals that ascend within [0, ",
                  layout.num_keys, "), got [", interval.lo, ", ", interval.hi, ")");
      key = interval.hi;
    }
    if (segment.kind == SegmentKind::kCausal) {
      const int32_t rows = segment.q_hi - segment.q_lo;
      const int32_t last = layout.interval_ptr[s + 1] - 1;
      PDIFF_CHECK(last >= layout.interval_ptr[s] &&
                      layout.intervals[last].hi - layout.intervals[last].lo >= rows,
                  "layouts[", idx, "]: expected a last key interval of at least ", rows,
                  " keys for the causal rows [", segment.q_lo, ", ", segment.q_hi, ")");
    }
  }
}

// Appends the pages that hold the keys of a sequence and returns one past the largest page id.
int32_t append_pages(const AttentionPlanOptions& options, size_t idx, int32_t num_keys,
                     std::vector<int32_t>& pages) {
  const int64_t needed = (int64_t{num_keys} + options.page_size - 1) / options.page_size;
  PDIFF_CHECK(needed <= options.max_pages, "page_table: expected at least ", needed,
              " columns for the ", num_keys, " keys of sequence ", idx, ", got ",
              options.max_pages);
  const int32_t* row = options.page_table + static_cast<int64_t>(idx) * options.max_pages;
  int32_t num_pages = 0;
  for (int64_t i = 0; i < needed; ++i) {
    PDIFF_CHECK(row[i] >= 0, "page_table: expected a page at [", idx, ", ", i, "], got ", row[i]);
    pages.push_back(row[i]);
    num_pages = std::max(num_pages, row[i] + 1);
  }
  return num_pages;
}

}  // namespace

AttentionPlan::AttentionPlan(const std::vector<const SpanLayout*>& layouts,
                             const AttentionPlanOptions& options) {
  PDIFF_CHECK(options.num_heads_kv > 0, "num_heads_kv: expected > 0, got ", options.num_heads_kv);
  PDIFF_CHECK(options.num_heads_q > 0 && options.num_heads_q % options.num_heads_kv == 0,
              "num_heads_q: expected a multiple of num_heads_kv (", options.num_heads_kv, "), got ",
              options.num_heads_q);
  PDIFF_CHECK(options.head_dim > 0 && options.head_dim <= 256, "head_dim: expected 1 to 256, got ",
              options.head_dim);
  PDIFF_CHECK(options.page_size >= 0, "page_size: expected > 0, got ", options.page_size);

  PlanHeader header{};
  header.magic = kPlanMagic;
  header.num_sequences = static_cast<int32_t>(layouts.size());
  header.num_heads_q = options.num_heads_q;
  header.num_heads_kv = options.num_heads_kv;
  header.head_dim = options.head_dim;
  header.page_size = options.page_size;
  header.schedule = static_cast<int32_t>(options.schedule);
  const bool for_gpu = options.schedule == Schedule::kGpu;
  header.split_keys = for_gpu && options.split_keys ? 1 : 0;
  header.tile_rows = options.tile_rows > 0 ? options.tile_rows
                     : for_gpu ? gpu_tile_rows(options.num_heads_q / options.num_heads_kv)
                               : cpu_tile_rows(layouts, options);
  PDIFF_CHECK(
      !for_gpu || header.tile_rows <= gpu_tile_rows(options.num_heads_q / options.num_heads_kv),
      "tile_rows: expected no more than fill a tile of ", kGpuTileRows, " rows, got ",
      header.tile_rows);

  std::vector<PlanSequence> sequences;
  std::vector<Segment> segments;
  std::vector<int32_t> interval_ptr{0};
  std::vector<KeyInterval> intervals;
  std::vector<int32_t> pages;
  sequences.reserve(layouts.size());
  for (size_t idx = 0; idx < layouts.size(); ++idx) {
    const SpanLayout& layout = *layouts[idx];
    check_layout(layout, idx);
    sequences.push_back({.row_begin = header.total_q,
                         .num_rows = layout.num_rows,
                         .key_begin = header.total_kv,
                         .num_keys = layout.num_keys,
                         .segment_begin = static_cast<int32_t>(segments.size()),
                         .num_segments = layout.num_segments(),
                         .page_begin = static_cast<int32_t>(pages.size()),
                         .key_segment_begin = 0,
                         .num_key_segments = 0});
    header.total_q = checked_sum(int64_t{header.total_q} + layout.num_rows, "total_q");
    header.total_kv = checked_sum(int64_t{header.total_kv} + layout.num_keys, "total_kv");
    const int32_t base = interval_ptr.back();
    checked_sum(int64_t{base} + layout.interval_ptr.back(), "number of key intervals");
    segments.insert(segments.end(), layout.segments.begin(), layout.segments.end());
    for (int32_t s = 1; s <= layout.num_segments(); ++s) {
      interval_ptr.push_back(base + layout.interval_ptr[s]);
    }
    intervals.insert(intervals.end(), layout.intervals.begin(), layout.intervals.end());
    if (options.page_size > 0) {
      header.num_pages =
          std::max(header.num_pages, append_pages(options, idx, layout.num_keys, pages));
    }
  }

  PlanView view{};
  view.segments = segments.data();
  view.interval_ptr = interval_ptr.data();
  view.intervals = intervals.data();

  // Tiles and their work: on a CPU the visible pairs, on a GPU the pairs of visited key tiles.
  std::vector<PlanTile> tiles;
  std::vector<int64_t> tile_work, sequence_work(layouts.size(), 0);
  const int32_t group_size = options.num_heads_q / options.num_heads_kv;
  for (int32_t idx = 0; idx < header.num_sequences; ++idx) {
    const SegmentsView local = segments_of(view, sequences[idx]);
    int32_t segment = 0;
    for (int32_t row = 0; row < sequences[idx].num_rows; row += header.tile_rows) {
      const int32_t row_hi = std::min(sequences[idx].num_rows, row + header.tile_rows);
      while (segment < local.num_segments && local.segments[segment].q_hi <= row) ++segment;
      PlanTile tile{.sequence = idx,
                    .row_lo = row,
                    .row_hi = row_hi,
                    .segment = segment,
                    .part = 0,
                    .num_parts = 1,
                    .slot_begin = 0};
      if (!for_gpu) {
        tiles.push_back(tile);
        tile_work.push_back(visible_pairs(local, segment, row, row_hi));
        sequence_work[idx] += tile_work.back();
        continue;
      }
      const int32_t key_tiles = num_key_tiles_of(local, segment, row_hi);
      const bool few_rows = has_few_rows(row_hi - row, group_size);
      if (few_rows && options.split_keys && key_tiles > kPartKeyTiles) {
        tile.num_parts = (key_tiles + kPartKeyTiles - 1) / kPartKeyTiles;
        tile.slot_begin = header.num_slots;
        header.num_slots =
            checked_sum(int64_t{header.num_slots} + tile.num_parts, "parts of the plan");
      }
      for (; tile.part < tile.num_parts; ++tile.part) {
        tiles.push_back(tile);
        const int32_t left = key_tiles - tile.part * kPartKeyTiles;
        const int64_t visited = tile.num_parts > 1 ? std::min(left, kPartKeyTiles) : key_tiles;
        tile_work.push_back(visited * (few_rows ? kFewRows : kGpuTileRows));
        sequence_work[idx] += tile_work.back();
      }
    }
  }
  header.num_tiles = checked_sum(static_cast<int64_t>(tiles.size()), "tiles of the plan");

  // The twin by keys.
  std::vector<PlanKeyTile> key_tiles;
  std::vector<int64_t> key_tile_work;
  std::vector<KeyInterval> key_segments;
  std::vector<int32_t> range_ptr{0};
  std::vector<Segment> ranges;
  for (int32_t idx = 0; for_gpu && options.page_size == 0 && idx < header.num_sequences; ++idx) {
    const KeyMajorLayout twin = key_major(*layouts[idx]);
    sequences[idx].key_segment_begin = static_cast<int32_t>(key_segments.size());
    sequences[idx].num_key_segments = static_cast<int32_t>(twin.segments.size());
    const KeySegmentsView local{twin.segments.data(), twin.range_ptr.data(), twin.ranges.data(),
                                sequences[idx].num_key_segments};
    int32_t segment = 0;
    for (int32_t key = 0; key < sequences[idx].num_keys; key += kGpuTileKeys) {
      const int32_t key_hi = std::min(sequences[idx].num_keys, key + kGpuTileKeys);
      while (segment < sequences[idx].num_key_segments && twin.segments[segment].hi <= key) {
        ++segment;
      }
      key_tiles.push_back(
          {.sequence = idx, .key_lo = key, .key_hi = key_hi, .key_segment = segment});
      key_tile_work.push_back(pairs_of_keys(local, segment, key, key_hi));
    }
    const int32_t base = range_ptr.back();
    key_segments.insert(key_segments.end(), twin.segments.begin(), twin.segments.end());
    for (size_t s = 1; s < twin.range_ptr.size(); ++s)
      range_ptr.push_back(base + twin.range_ptr[s]);
    ranges.insert(ranges.end(), twin.ranges.begin(), twin.ranges.end());
  }
  header.num_key_tiles = static_cast<int32_t>(key_tiles.size());

  append(words_, &header, 1);
  header.sequences = append(words_, sequences);
  header.sequence_order = append(words_, by_falling(sequence_work));
  header.tiles = append(words_, in_order(tiles, by_falling(tile_work)));
  header.segments = append(words_, segments);
  header.interval_ptr = append(words_, interval_ptr);
  header.intervals = append(words_, intervals);
  header.pages = append(words_, pages);
  header.key_tiles = append(words_, in_order(key_tiles, by_falling(key_tile_work)));
  header.key_segments = append(words_, key_segments);
  header.range_ptr = append(words_, range_ptr);
  header.ranges = append(words_, ranges);
  header.num_words = checked_sum(static_cast<int64_t>(words_.size()), "words of the plan");
  std::memcpy(words_.data(), &header, sizeof(header));
}

PlanView view_plan(const int32_t* words, int64_t num_words) {
  constexpr int64_t kHeaderWords = sizeof(PlanHeader) / sizeof(int32_t);
  PDIFF_CHECK(words != nullptr && num_words >= kHeaderWords && words[0] == kPlanMagic &&
                  words[1] == num_words,
              "plan: expected the words of an AttentionPlan");
  return plan_view_of(words);
}

}  // namespace pdiff
