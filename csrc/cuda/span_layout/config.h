#pragma once

// What the kernels that build a plan from tokens leave for one another.

#include <cstdint>

#include "common/token_items.h"
#include "pdiff/attention_plan.h"

namespace pdiff::cuda {

/// Most of what there can be. A span takes two tags, so a tag adds at most one segment.
struct PlanRoom {
  int32_t chunks, tags, items, intervals, ranges, tiles, key_tiles;
};

struct PlanWorkspace {
  // find_tags
  int32_t* chunk_tags;    // [chunks, kChunkTokens]
  int32_t* chunk_counts;  // [chunks]

  // build_segments
  int32_t* chunk_begin;        // [chunks]
  int32_t* tags;               // [tags] in order of position
  int32_t* rank;               // [tags] of a tag among the brackets, then of what was found
  int32_t* brackets;           // [tags] the tags that open or close
  TokenItem* found;            // [tags] spans and syncs, lo and hi counted in the batch
  TokenItem* items;            // [items]
  ItemPlace* places;           // [items]
  int32_t* syncs;              // [tags]
  KeyInterval* gaps;           // [2 * items]
  int32_t* first_gap;          // [num_sequences]
  ItemPlace* sequence_places;  // [num_sequences + 1]
  int32_t* tile_begin;         // [num_sequences]
  int32_t* key_tile_begin;     // [num_sequences]

  // cut_tiles
  PlanTile* tiles;         // [tiles] in order of rows
  PlanKeyTile* key_tiles;  // [key_tiles] in order of keys
  int32_t* tile_work;      // [tiles] in a unit of its own
  int32_t* key_tile_work;  // [key_tiles] likewise
};

inline constexpr int kFindThreads = 256, kChunkTokens = 1024;
inline constexpr int kMaxBuildThreads = 1024;

}  // namespace pdiff::cuda
