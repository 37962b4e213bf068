#include <algorithm>

#include "cuda/common/launch.h"
#include "cuda/span_layout/build_segments.cuh"
#include "cuda/span_layout/config.h"
#include "cuda/span_layout/find_tags.cuh"
#include "cuda/span_layout/schedule.cuh"
#include "pdiff/error.h"

namespace pdiff::cuda {
namespace {

template <typename T>
T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

void check(const PlanFromTokensParams& p) {
  constexpr int64_t kMaxTokens = int64_t{1} << 29;  // a tag's position and kind are one word
  PDIFF_CHECK(p.total_tokens >= 0 && p.total_tokens < kMaxTokens,
              "token_ids: expected less than 2^29 tokens, got ", p.total_tokens);
  PDIFF_CHECK(p.num_sequences >= 0 && p.num_sequences < kMaxTokens,
              "cu_seqlens: expected less than 2^29 sequences, got ", p.num_sequences);
  PDIFF_CHECK(p.max_tags >= 0 && p.max_tags < kMaxTokens, "max_tags: expected 0 to 2^29, got ",
              p.max_tags);
  PDIFF_CHECK(p.num_heads_kv > 0, "num_heads_kv: expected > 0, got ", p.num_heads_kv);
  PDIFF_CHECK(p.num_heads_q > 0 && p.num_heads_q % p.num_heads_kv == 0,
              "num_heads_q: expected a multiple of num_heads_kv (", p.num_heads_kv, "), got ",
              p.num_heads_q);
  PDIFF_CHECK(p.head_dim > 0 && p.head_dim <= 256, "head_dim: expected 1 to 256, got ", p.head_dim);
}

int32_t tile_rows_of(const PlanFromTokensParams& p) {
  return gpu_tile_rows(p.num_heads_q / p.num_heads_kv);
}

PlanRoom room_for(const PlanFromTokensParams& p) {
  const int64_t items = p.max_tags + p.num_sequences;
  const auto tiles = [&](int64_t size) {
    return static_cast<int32_t>(p.total_tokens / size + p.num_sequences);
  };
  const int64_t intervals = p.kIntervalsPerSegment * items;
  PDIFF_CHECK(8 * intervals < INT32_MAX, "max_tags: expected less, got ", p.max_tags, " for ",
              p.num_sequences, " sequences");
  return {.chunks = static_cast<int32_t>(ceil_div<int64_t>(p.total_tokens, kChunkTokens)),
          .tags = static_cast<int32_t>(p.max_tags),
          .items = static_cast<int32_t>(items),
          .intervals = static_cast<int32_t>(intervals),
          .ranges = static_cast<int32_t>(items + ceil_div<int64_t>(p.max_tags, 2)),
          .tiles = tiles(tile_rows_of(p)),
          .key_tiles = tiles(kGpuTileKeys)};
}

/// The header of a plan without tiles, with its sections as large as there is room.
PlanHeader header_for(const PlanFromTokensParams& p, const PlanRoom& room) {
  int64_t num_words = sizeof(PlanHeader) / sizeof(int32_t);
  const auto take = [&](int64_t count, size_t bytes) {
    const int64_t offset = num_words;
    num_words += count * static_cast<int64_t>(bytes / sizeof(int32_t));
    PDIFF_CHECK(num_words < INT32_MAX, "max_tags: expected a plan below 2^31 words, got ",
                p.max_tags, " tags");
    return static_cast<int32_t>(offset);
  };
  PlanHeader h{};
  h.magic = kPlanMagic;
  h.num_sequences = static_cast<int32_t>(p.num_sequences);
  h.total_q = h.total_kv = static_cast<int32_t>(p.total_tokens);
  h.num_heads_q = p.num_heads_q;
  h.num_heads_kv = p.num_heads_kv;
  h.head_dim = p.head_dim;
  h.schedule = static_cast<int32_t>(Schedule::kGpu);
  h.tile_rows = tile_rows_of(p);
  h.sequences = take(p.num_sequences, sizeof(PlanSequence));
  h.sequence_order = take(p.num_sequences, sizeof(int32_t));
  h.tiles = take(room.tiles, sizeof(PlanTile));
  h.segments = take(room.items, sizeof(Segment));
  h.interval_ptr = take(room.items + 1, sizeof(int32_t));
  h.intervals = take(room.intervals, sizeof(KeyInterval));
  h.pages = take(0, sizeof(int32_t));
  h.key_tiles = take(room.key_tiles, sizeof(PlanKeyTile));
  h.key_segments = take(room.items, sizeof(KeyInterval));
  h.range_ptr = take(room.items + 1, sizeof(int32_t));
  h.ranges = take(room.ranges, sizeof(Segment));
  h.num_words = static_cast<int32_t>(num_words);
  return h;
}

/// Lays the arrays over `memory`, which may be null to learn how many bytes they take.
PlanWorkspace workspace_at(void* memory, const PlanFromTokensParams& p, const PlanRoom& room,
                           int64_t* num_bytes) {
  constexpr int64_t kAlignment = 16;
  int64_t offset = 0;
  const auto take = [&]<typename T>(T*& array, int64_t count) {
    array = reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(memory) + offset);
    offset += ceil_div(count * static_cast<int64_t>(sizeof(T)), kAlignment) * kAlignment;
  };
  PlanWorkspace work;
  take(work.chunk_tags, int64_t{room.chunks} * kChunkTokens);
  take(work.chunk_counts, room.chunks);
  take(work.chunk_begin, room.chunks);
  take(work.tags, room.tags);
  take(work.rank, room.tags);
  take(work.brackets, room.tags);
  take(work.found, room.tags);
  take(work.items, room.items);
  take(work.places, room.items);
  take(work.syncs, room.tags);
  take(work.gaps, int64_t{2} * room.items);
  take(work.first_gap, p.num_sequences);
  take(work.sequence_places, p.num_sequences + 1);
  take(work.tile_begin, p.num_sequences);
  take(work.key_tile_begin, p.num_sequences);
  take(work.tiles, room.tiles);
  take(work.key_tiles, room.key_tiles);
  take(work.tile_work, room.tiles);
  take(work.key_tile_work, room.key_tiles);
  *num_bytes = offset;
  return work;
}

}  // namespace

int64_t plan_from_tokens_words(const PlanFromTokensParams& params) {
  check(params);
  return header_for(params, room_for(params)).num_words;
}

int64_t plan_from_tokens_workspace_bytes(const PlanFromTokensParams& params) {
  check(params);
  int64_t num_bytes = 0;
  (void)workspace_at(nullptr, params, room_for(params), &num_bytes);
  return num_bytes;
}

void plan_from_tokens(const PlanFromTokensParams& params, int32_t* words, void* workspace,
                      const CudaQueue& queue) {
  check(params);
  const DeviceGuard guard(queue.device_idx);
  const PlanRoom room = room_for(params);
  const PlanHeader header = header_for(params, room);
  int64_t num_bytes = 0;
  const PlanWorkspace work = workspace_at(workspace, params, room, &num_bytes);
  if (room.chunks > 0) {
    launch(find_tags_kernel,
           {.name = "find_tags",
            .num_blocks = room.chunks,
            .num_threads = kFindThreads,
            .shared_bytes = kWarpSize * sizeof(uint32_t)},
           queue, params, work);
  }
  // One block does not wait for others; with little to do, not for idle warps either.
  const int num_threads =
      static_cast<int>(std::clamp(ceil_div(room.items, 64) * 32, 128, kMaxBuildThreads));
  launch(build_segments_kernel,
         {.name = "build_segments",
          .num_blocks = 1,
          .num_threads = num_threads,
          .shared_bytes = sizeof(BuildShared)},
         queue, params, work, room, header, words);
  const int64_t most_tiles = int64_t{room.tiles} + room.key_tiles;
  if (most_tiles == 0) return;
  launch(cut_tiles_kernel,
         {.name = "cut_tiles",
          .num_blocks = ceil_div<int64_t>(most_tiles, kCutThreads),
          .num_threads = kCutThreads},
         queue, words, work, room);
  launch(order_tiles_kernel,
         {.name = "order_tiles",
          .num_blocks = 2,
          .num_threads = most_tiles > 512 ? kMaxBuildThreads : 128,
          .shared_bytes = sizeof(OrderShared)},
         queue, words, work);
}

}  // namespace pdiff::cuda
