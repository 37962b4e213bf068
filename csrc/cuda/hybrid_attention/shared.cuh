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
  int32_t first_head, num_rows;
};

__device__ __forceinline__ TileRows tile_rows_of(const ForwardParams& params, const PlanTile& tile,
                                                 const PlanSequence& sequence, int32_t kv_head) {
  return {sequence.row_begin + tile.row_lo, kv_head * params.group_size,
          (tile.row_hi - tile.row_lo) * params.group_size};
}

/// Token and head of a row of the batch.
struct RowPlace {
  int64_t token;
  int32_t head;
};

__device__ __forceinline__ RowPlace place_of(const ForwardParams& params, const TileRows& rows,
                                             int32_t row) {
  const int32_t token = params.by_group.divide(row);
  return {rows.first_token + token, rows.first_head + row - token * params.group_size};
}

/// A block's shared memory.
template <int kHeadDim>
struct Shared {
  struct Stage {
    unsigned char k[kTileBytes<kTileKeys, kHeadDim>];
    unsigned char v[kTileBytes<kTileKeys, kHeadDim>];
  };

  alignas(1024) unsigned char q[kTileBytes<kTileRows, kHeadDim>];  // at the end the output
  Stage stages[kNumStages];
  PlanView plan;
  TileWalk walk;
  TileRows rows;
  Keys keys;
  int32_t item;
  int32_t visible[kTileRows];  // of the run at hand, to each row
};

static_assert(sizeof(Shared<128>) <= 99 * 1024, "what every architecture has");

}  // namespace pdiff::cuda::attention
