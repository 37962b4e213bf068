#pragma once

// Tiles of 16-bit elements in shared memory: how rows get there, how fragments are read from them.
//
// A row's 16-byte pieces are permuted: piece p of row r lies where piece p ^ (r % 8) would. The
// rows of an 8 x 8 matrix then lie in eight different groups of banks, and so do the pieces that
// a copy writes, without padding.

#include <cstdint>

#include "cuda/common/warp.cuh"
#include "cuda/ptx/copy.cuh"
#include "cuda/ptx/mma.cuh"

namespace pdiff::cuda {

inline constexpr int kPieceBytes = 16, kPieceElements = 8;

template <int kRows, int kColumns>
inline constexpr int kTileBytes = kRows * kColumns * 2;

/// Where a piece of a row lies, in bytes from the tile's first.
template <int kColumns>
__device__ __forceinline__ int piece_offset(int row, int piece) {
  static_assert(kColumns % 64 == 0, "a row fills all banks");
  return row * (kColumns * 2) + (piece ^ row % 8) * kPieceBytes;
}

/// A row in global memory; where not `valid`, zeros stand for it.
template <typename T>
struct SourceRow {
  const T* data;
  bool valid = true;
};

/// Starts to copy the tile's rows, each a SourceRow that `row_at(row)` returns. kThreads threads
/// take part, `thread` is 0 to kThreads - 1. The caller commits, waits and meets the others.
template <int kRows, int kColumns, int kThreads, typename RowAt>
__device__ __forceinline__ void copy_rows_async(unsigned char* tile, int thread,
                                                const RowAt& row_at) {
  constexpr int kPieces = kColumns / kPieceElements, kRowsAtOnce = kThreads / kPieces;
  static_assert(kThreads % kPieces == 0 && kRows % kRowsAtOnce == 0);
  const int piece = thread % kPieces, first_row = thread / kPieces;
#pragma unroll
  for (int i = 0; i < kRows / kRowsAtOnce; ++i) {
    const int row = first_row + i * kRowsAtOnce;
    const auto source = row_at(row);
    copy_async_16(tile + piece_offset<kColumns>(row, piece), source.data + piece * kPieceElements,
                  source.valid);
  }
}

/// Reads 16 x 16 blocks of a tile as fragments (cuda/ptx/mma.cuh). For x = load(tile, row, column),
/// both multiples of 16, y = load_transposed(...):
///
///   as a[row, column]                 {x0, x1, x2, x3}
///   as a[column, row]                 {y0, y2, y1, y3}
///   as b[column, row], rows 0-7, 8-15 {x0, x2}, {x1, x3}   (keys of a product with queries)
///   as b[row, column], columns 0-7, 8-15 {y0, y1}, {y2, y3}   (values of a product with weights)
template <int kColumns>
class BlockReader {
 public:
  __device__ __forceinline__ explicit BlockReader(int lane)
      : row_bytes_(lane % 16 * (kColumns * 2)), flip_((lane / 16 ^ lane % 8) * kPieceBytes) {}

  __device__ __forceinline__ void load(uint32_t (&x)[4], const unsigned char* tile, int row,
                                       int column) const {
    load_matrices(x, tile + offset(row, column));
  }

  __device__ __forceinline__ void load_transposed(uint32_t (&x)[4], const unsigned char* tile,
                                                  int row, int column) const {
    load_matrices_transposed(x, tile + offset(row, column));
  }

 private:
  // The column's lowest piece is even, so that the lane's half and the row's permutation, both in
  // flip_, come in by one exclusive or.
  __device__ __forceinline__ int offset(int row, int column) const {
    return row * (kColumns * 2) + row_bytes_ + (column * 2 ^ flip_);
  }

  int row_bytes_, flip_;
};

/// The offset of elements (2t, 2t + 1) of row g of an 8 x 8 matrix at (row, column), multiples of
/// 8: where a lane's d0, d1 of a product go. No two lanes' words collide.
template <int kColumns>
__device__ __forceinline__ int pair_offset(int row, int column, int lane) {
  return piece_offset<kColumns>(row + lane / 4, column / kPieceElements) + lane % 4 * 4;
}

}  // namespace pdiff::cuda
