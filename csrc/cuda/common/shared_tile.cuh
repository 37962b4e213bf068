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

/// 16 bytes in global memory; where not `valid`, zeros stand for them.
struct SourcePiece {
  const void* data;
  bool valid = true;
};

/// Starts to copy the tile's pieces, each a SourcePiece that `piece_at(row, piece)` returns.
/// kThreads threads take part, `thread` is 0 to kThreads - 1; a thread asks for one and the same
/// piece of several rows. The caller commits, waits and meets the others.
template <int kRows, int kColumns, int kThreads, typename PieceAt>
__device__ __forceinline__ void copy_pieces_async(unsigned char* tile, int thread,
                                                  const PieceAt& piece_at) {
  constexpr int kPieces = kColumns / kPieceElements, kRowsAtOnce = kThreads / kPieces;
  static_assert(kThreads % kPieces == 0 && kRows % kRowsAtOnce == 0);
  const unsigned id = static_cast<unsigned>(thread);  // so that quotients are shifts
  const int piece = static_cast<int>(id % kPieces), first_row = static_cast<int>(id / kPieces);
  const int first = piece_offset<kColumns>(first_row, piece);
#pragma unroll
  for (int i = 0; i < kRows / kRowsAtOnce; ++i) {
    const int rows = i * kRowsAtOnce;  // a sum with first_row has no carry: bits are permuted alone
    const int offset = (first ^ rows % 8 * kPieceBytes) + rows * (kColumns * 2);
    const SourcePiece source = piece_at(first_row + rows, piece);
    copy_async_16(tile + offset, source.data, source.valid);
  }
}

/// A row in global memory; where not `valid`, zeros stand for it.
template <typename T>
struct SourceRow {
  const T* data;
  bool valid = true;
};

/// The same by rows: `row_at(row)` returns a SourceRow.
template <int kRows, int kColumns, int kThreads, typename RowAt>
__device__ __forceinline__ void copy_rows_async(unsigned char* tile, int thread,
                                                const RowAt& row_at) {
  copy_pieces_async<kRows, kColumns, kThreads>(tile, thread, [&](int row, int piece) {
    const auto source = row_at(row);
    return SourcePiece{source.data + piece * kPieceElements, source.valid};
  });
}

/// The same for num_rows rows at a distance of row_bytes; a row's address is one multiply-add.
template <int kRows, int kColumns, int kThreads>
__device__ __forceinline__ void copy_strided_rows_async(unsigned char* tile, int thread,
                                                        const void* first_row, int32_t row_bytes,
                                                        int32_t num_rows) {
  copy_pieces_async<kRows, kColumns, kThreads>(tile, thread, [&](int row, int piece) {
    const auto* first = static_cast<const unsigned char*>(first_row) + piece * kPieceBytes;
    return SourcePiece{first + static_cast<int64_t>(row) * row_bytes, row < num_rows};
  });
}

/// The order of the four 8 x 8 matrices of a 16 x 16 block: down the rows first, or along them.
enum class BlockOrder { kDown, kAlong };

/// Reads 16 x 16 blocks of a tile as fragments (cuda/ptx/mma.cuh). With x of load(tile, row,
/// column) and y of load_transposed, both offsets multiples of 16:
///
///   as a[row, column]                       kDown    {x0, x1, x2, x3}
///   as a[column, row]                       kAlong   {y0, y1, y2, y3}
///   as b[column, row], for keys of scores   kAlong   {x0, x1}, {x2, x3}, eight rows each
///   as b[row, column], for values           kDown    {y0, y1}, {y2, y3}, eight columns each
///
/// An instruction takes neighbouring registers: in the other order each fragment would cost moves.
template <int kColumns, BlockOrder kOrder = BlockOrder::kDown>
class BlockReader {
 public:
  __device__ __forceinline__ explicit BlockReader(int lane) {
    const int matrix = lane / 8, i = kOrder == BlockOrder::kDown ? matrix % 2 : matrix / 2;
    const int j = kOrder == BlockOrder::kDown ? matrix / 2 : matrix % 2;
    row_bytes_ = (i * 8 + lane % 8) * (kColumns * 2);
    flip_ = (j ^ lane % 8) * kPieceBytes;
  }

  __device__ __forceinline__ void load(uint32_t (&x)[4], const unsigned char* tile, int row,
                                       int column) const {
    load_matrices(x, tile + offset(row, column));
  }

  __device__ __forceinline__ void load_transposed(uint32_t (&x)[4], const unsigned char* tile,
                                                  int row, int column) const {
    load_matrices_transposed(x, tile + offset(row, column));
  }

 private:
  // Half and permutation of the lane, in flip_, change the lowest three bits of a piece. What is
  // beyond them stays a constant, which the instruction adds itself.
  __device__ __forceinline__ int offset(int row, int column) const {
    constexpr int kLine = 8 * kPieceBytes;
    const int begin = column * 2;
    return row_bytes_ + (begin % kLine ^ flip_) + (row * (kColumns * 2) + begin / kLine * kLine);
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
