#pragma once

#include <cstdint>

#include "cuda/common/shared_tile.cuh"
#include "cuda/hybrid_attention/config.h"
#include "cuda/hybrid_attention/keys.cuh"
#include "cuda/hybrid_attention/walk.cuh"

namespace pdiff::cuda::attention {

/// The rows of a tile: row r is token r / group_size of them, query head r % group_size of the KV
/// head's group.
struct TileRows {
  int64_t first_token;  // of the batch
  int32_t kv_head, num_rows;
};

__device__ __forceinline__ TileRows tile_rows_of(const ForwardParams& params, const PlanTile& tile,
                                                 const PlanSequence& sequence, int32_t kv_head) {
  return {sequence.row_begin + tile.row_lo, kv_head,
          (tile.row_hi - tile.row_lo) * params.group_size};
}

/// Token and head of a row of the batch. Past the last row comes the last one again: what is
/// computed of it no one looks at.
struct RowPlace {
  int64_t token;
  int32_t head;
};

__device__ __forceinline__ RowPlace place_of(const ForwardParams& params, const TileRows& rows,
                                             int32_t row) {
  const int32_t r = min(row, rows.num_rows - 1), token = params.by_group.divide(r);
  return {rows.first_token + token,
          rows.kv_head * params.group_size + r - token * params.group_size};
}

/// The first element of a row's query.
__device__ __forceinline__ const unsigned char* query_at(const ForwardParams& params,
                                                         const RowPlace& place, int head_dim) {
  return static_cast<const unsigned char*>(params.q) + place.token * params.q_bytes +
         place.head * head_dim * 2;
}

/// Of the row's output, in elements; and of its lse.
__device__ __forceinline__ int64_t out_offset(const ForwardParams& params, const RowPlace& place,
                                              int head_dim) {
  const int64_t num_heads_q = int64_t{params.group_size} * params.num_heads_kv;
  return (place.token * num_heads_q + place.head) * head_dim;
}

__device__ __forceinline__ int64_t lse_offset(const ForwardParams& params, const RowPlace& place) {
  return int64_t{place.head} * params.total_q + place.token;
}

/// What the block keeps in shared memory while it works on a tile of many rows.
template <int kHeadDim>
struct ManyRowsTiles {
  struct Stage {
    unsigned char k[kTileBytes<kTileKeys, kHeadDim>];
    unsigned char v[kTileBytes<kTileKeys, kHeadDim>];
  };
  unsigned char q[kTileBytes<kTileRows, kHeadDim>];  // at the end the output
  Stage stages[kNumStages];
};

/// The same for one of few rows: each warp has key tiles of its own, and at the end its results.
template <int kHeadDim>
union FewRowsTiles {
  struct Step {
    unsigned char k[kTileBytes<kStepKeys, kHeadDim>];
    unsigned char v[kTileBytes<kStepKeys, kHeadDim>];
  };
  struct Results {
    float out[kNumWarps][kFewRows][kHeadDim + 8];  // the gap: rows begin in different banks
    float2 state[kNumWarps][kFewRows];             // maximum, sum
  };
  Step steps[kNumWarps][kNumSteps];
  Results results;
};

/// A block's shared memory.
template <int kHeadDim>
struct Shared {
  union alignas(1024) {
    ManyRowsTiles<kHeadDim> many;
    FewRowsTiles<kHeadDim> few;
  };
  PlanView plan;
  TileWalk walk;
  TileRows rows;
  Keys keys;
  int32_t item;
  bool is_last_part;
  int32_t visible[kTileRows];  // of the run at hand, to each row
};

static_assert(sizeof(Shared<128>) <= 99 * 1024, "what every architecture has");

/// How many keys of a run a row of the tile sees.
template <int kHeadDim>
__device__ __forceinline__ int32_t visible_to(const ForwardParams& params,
                                              const Shared<kHeadDim>& shared, int32_t row,
                                              const KeyRun& run) {
  const SegmentsView& view = shared.walk.view;
  const int32_t token =
      shared.walk.tile.row_lo + params.by_group.divide(min(row, shared.rows.num_rows - 1));
  return visible_to_row(view, segment_of_row(view, 0, token), token, run);
}

}  // namespace pdiff::cuda::attention
