#pragma once

// A tile of up to 128 rows, bound by its products. Each warp has 32 rows, and the block shares the
// key tiles.

#include <cstdint>

#include "cuda/common/shared_tile.cuh"
#include "cuda/hybrid_attention/keys.cuh"
#include "cuda/hybrid_attention/shared.cuh"
#include "cuda/hybrid_attention/softmax.cuh"
#include "cuda/ptx/compiler.cuh"

namespace pdiff::cuda::attention {

template <typename T, int kHeadDim, bool kPaged>
class ManyRows {
 public:
  __device__ __forceinline__ ManyRows(const ForwardParams& params, Shared<kHeadDim>& shared,
                                      int thread)
      : params_(params),
        shared_(shared),
        thread_(thread),
        lane_(thread % kWarpSize),
        warp_(thread / kWarpSize) {}

  /// Attends to all keys of the tile that shared.walk holds.
  __device__ __forceinline__ void run() {
    copy_queries_async();
    copy_async_commit();
    KeyCursor next;
    bool has_next = first_keys(shared_.walk, &next);
    if (has_next) copy_keys(next, 0);
    copy_async_commit();
    copy_async_wait<1>();
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kQuerySteps; ++k) load_queries(q_[k], Reader(lane_), k);

    for (int stage = 0; has_next; stage ^= 1) {
      const KeyCursor keys = next;
      has_next = advance_keys(shared_.walk, &next);
      const KeyRows rows = has_next ? rows_of(next) : KeyRows{};
      copy_async_wait<0>();
      __syncthreads();  // this tile is there, and the other stage is no longer read
      if (has_next) {
        copy_keys_async<kPaged, kTileKeys, kHeadDim, kNumThreads>(
            shared_.many.stages[stage ^ 1].k, shared_.many.stages[stage ^ 1].v, opaque(thread_),
            params_, shared_.keys, rows);
      }
      copy_async_commit();

      // Every row of the warp sees the whole tile, none sees any of it, or there is a mask.
      if (keys.key == keys.run.key_lo) enter_run(keys.run);
      const int32_t offset = keys.offset();
      if (least_visible_ >= offset + kTileKeys) {
        attend<false>(shared_.many.stages[stage], offset);
      } else if (most_visible_ > offset) {
        attend<true>(shared_.many.stages[stage], offset);
      }
    }
    copy_async_wait<0>();
  }

  /// Writes the warp's rows, through its part of shared.q.
  __device__ __forceinline__ void write() {
    const TileRows rows = shared_.rows;
    const int lane = opaque(lane_), first_row = warp_ * kWarpRows;
    __syncwarp();  // all lanes have read the queries
#pragma unroll
    for (int m = 0; m < kBlocks; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float sum = row_sum(states_.sum[m][h]), inverse = inverse_sum(sum);
        const int row = first_row + m * 16 + h * 8;
#pragma unroll
        for (int n = 0; n < kHeadDim / 8; ++n) {
          *reinterpret_cast<uint32_t*>(shared_.many.q + pair_offset<kHeadDim>(row, n * 8, lane)) =
              pack2<T>(o_[m][n][2 * h] * inverse, o_[m][n][2 * h + 1] * inverse);
        }
        const int r = row + lane / 4;
        if (params_.lse != nullptr && lane % 4 == 0 && r < rows.num_rows) {
          params_.lse[lse_offset(params_, place_of(params_, rows, r))] =
              log_sum(states_.max[m][h], sum);
        }
      }
    }
    __syncwarp();
    constexpr int kPieces = kHeadDim / kPieceElements, kRowsAtOnce = kWarpSize / kPieces;
#pragma unroll
    for (int i = 0; i < kWarpRows; i += kRowsAtOnce) {
      const int row = first_row + i + lane / kPieces, piece = lane % kPieces;
      if (row >= rows.num_rows) continue;
      T* to = static_cast<T*>(params_.out) +
              out_offset(params_, place_of(params_, rows, row), kHeadDim);
      *reinterpret_cast<uint4*>(to + piece * kPieceElements) =
          *reinterpret_cast<const uint4*>(shared_.many.q + piece_offset<kHeadDim>(row, piece));
    }
  }

 private:
  static constexpr int kBlocks = kWarpRows / 16;
  static constexpr int kQuerySteps = kQueryStepsInRegisters<kHeadDim>;
  using Reader = BlockReader<kHeadDim>;
  using Stage = typename ManyRowsTiles<kHeadDim>::Stage;

  __device__ __forceinline__ void copy_queries_async() {
    const TileRows rows = shared_.rows;
    copy_pieces_async<kTileRows, kHeadDim, kNumThreads>(
        shared_.many.q, opaque(thread_), [&](int row, int piece) {
          const unsigned char* q = query_at(params_, place_of(params_, rows, row), kHeadDim);
          return SourcePiece{q + piece * kPieceBytes};
        });
  }

  __device__ __forceinline__ KeyRows rows_of(const KeyCursor& cursor) const {
    return key_rows<kPaged, kTileKeys>(params_, shared_.keys, cursor.key, cursor.num_keys());
  }

  __device__ __forceinline__ void copy_keys(const KeyCursor& cursor, int stage) {
    copy_keys_async<kPaged, kTileKeys, kHeadDim, kNumThreads>(
        shared_.many.stages[stage].k, shared_.many.stages[stage].v, opaque(thread_), params_,
        shared_.keys, rows_of(cursor));
  }

  __device__ __forceinline__ void load_queries(uint32_t (&q)[kBlocks][4], const Reader& reader,
                                               int k) const {
#pragma unroll
    for (int m = 0; m < kBlocks; ++m) {
      reader.load(q[m], shared_.many.q + warp_ * kTileBytes<kWarpRows, kHeadDim>, m * 16, k * 16);
    }
  }

  /// How many keys of the run each row of the warp sees: none, if the tile has no row for the warp.
  /// Each lane looks after one row.
  __device__ __forceinline__ void enter_run(const KeyRun& run) {
    const int32_t row = warp_ * kWarpRows + lane_;
    const bool has_rows = warp_ * kWarpRows < shared_.rows.num_rows;
    const int32_t visible = has_rows ? visible_to(params_, shared_, row, run) : 0;
    __syncwarp();
    shared_.visible[row] = visible;
    __syncwarp();
    least_visible_ = static_cast<int32_t>(__reduce_min_sync(kAllLanes, visible));
    most_visible_ = static_cast<int32_t>(__reduce_max_sync(kAllLanes, visible));
  }

  /// One key tile, of whose run `offset` keys lie before it.
  template <bool kMasked>
  __device__ __forceinline__ void attend(const Stage& stage, int32_t offset) {
    // Masking takes registers: there, addresses are not kept in them from tile to tile.
    const int lane = kMasked ? opaque(lane_) : lane_;
    const Reader reader(lane);
    const BlockReader<kHeadDim, BlockOrder::kAlong> key_reader(lane);

    // s <- q @ k^T
    float s[kBlocks][kTileKeys / 8][4] = {};
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; ++k) {
      uint32_t q[kBlocks][4];
      if (k >= kQuerySteps) load_queries(q, reader, k);
#pragma unroll
      for (int n = 0; n < kTileKeys / 16; ++n) {
        uint32_t b[4];
        key_reader.load(b, stage.k, n * 16, k * 16);
#pragma unroll
        for (int m = 0; m < kBlocks; ++m) {
          const uint32_t (&a)[4] = k < kQuerySteps ? q_[k % kNumQuerySteps][m] : q[m];
          multiply_add<T>(s[m][2 * n], a, b[0], b[1]);
          multiply_add<T>(s[m][2 * n + 1], a, b[2], b[3]);
        }
      }
    }

    if constexpr (kMasked) {
      const int32_t* visible = shared_.visible + warp_ * kWarpRows + lane / 4;
      mask_scores<kBlocks, kTileKeys>(
          s, lane, [&](int m, int h) { return visible[m * 16 + h * 8] - offset; });
    }

    // s <- weights; o <- o * factor
    float factor[kBlocks][2];
    if (weigh_scores<kBlocks, kTileKeys>(s, states_, params_.scale, factor)) {
      scale_rows(o_, factor);
    }

    // o <- o + weights @ v, the weights rounded to T
#pragma unroll
    for (int k = 0; k < kTileKeys / 16; ++k) {
      uint32_t a[kBlocks][4];
#pragma unroll
      for (int m = 0; m < kBlocks; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float (&w)[4] = s[m][2 * k + i / 2];
          a[m][i] = pack2<T>(w[i % 2 * 2], w[i % 2 * 2 + 1]);
        }
      }
#pragma unroll
      for (int n = 0; n < kHeadDim / 16; ++n) {
        uint32_t b[4];
        reader.load_transposed(b, stage.v, k * 16, n * 16);
#pragma unroll
        for (int m = 0; m < kBlocks; ++m) {
          multiply_add<T>(o_[m][2 * n], a[m], b[0], b[1]);
          multiply_add<T>(o_[m][2 * n + 1], a[m], b[2], b[3]);
        }
      }
    }
  }

  static constexpr int kNumQuerySteps = kQuerySteps > 0 ? kQuerySteps : 1;

  const ForwardParams& params_;
  Shared<kHeadDim>& shared_;
  const int thread_, lane_, warp_;
  uint32_t q_[kNumQuerySteps][kBlocks][4];
  float o_[kBlocks][kHeadDim / 8][4] = {};
  RowStates<kBlocks> states_;
  int32_t least_visible_ = 0, most_visible_ = 0;  // of the run, over the warp's rows
};

}  // namespace pdiff::cuda::attention
