#pragma once

// Tile registers: eight of 16 rows x 64 bytes. One instruction multiplies 16 x 32 by 32 x 16
// bfloat16 into 16 x 16 floats.
//
// Operand a is plain rows. Operand b holds pairs: row i of its tile is the 16 columns' elements 2 *
// i and 2 * i + 1, so a column's pairs run down the tile. Rows of a transposed matrix of pairs,
// then.

#include <immintrin.h>

#include <cstdint>

#include "common/macros.h"
#include "pdiff/dtype.h"

namespace pdiff::cpu::amx {
namespace {

constexpr int kTileRows = 16;   // rows of a and c, columns of b and c
constexpr int kTileDepth = 32;  // bfloat16 in a row of a
constexpr int kTileElements = kTileRows * kTileDepth;

// A task starts with this, all tiles whole, and ends with _tile_release(): the system then has no
// tile state to save in between.
PDIFF_INLINE void configure_tiles() {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  _tile_loadconfig(&config);
}

// One 32 x 32 block of a product, its left half, or its upper one:
//
//   c[32, 32] <- (c +) a[32, 32 * num_steps] @ b[32 * num_steps, 32]
struct BlockOperands {
  const bfloat16* a;
  int64_t a_row;      // elements from row to row within a tile of a
  int64_t a_below;    // from a tile to the tile of the next 16 rows
  int64_t a_step;     // from a tile to the tile of the next 32 columns
  const bfloat16* b;  // [num_steps][2] tiles
  float* c;
  int64_t c_row;
};

template <bool kAdd, bool kWide, bool kTall = true>
PDIFF_INLINE void multiply_block(const BlockOperands& x, int num_steps) {
  const int64_t c_row_bytes = x.c_row * 4, a_row_bytes = x.a_row * 2;
  float* c_below = x.c + kTileRows * x.c_row;
  if (kAdd) {
    _tile_loadd(0, x.c, c_row_bytes);
    if (kTall) _tile_loadd(1, c_below, c_row_bytes);
    if (kWide) _tile_loadd(2, x.c + kTileRows, c_row_bytes);
    if (kWide && kTall) _tile_loadd(3, c_below + kTileRows, c_row_bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if (kWide) _tile_zero(2);
    if (kWide) _tile_zero(3);
  }
  const bfloat16 *a = x.a, *b = x.b;
  for (int step = 0; step < num_steps; ++step, a += x.a_step, b += 2 * kTileElements) {
    _tile_loadd(4, a, a_row_bytes);
    _tile_loadd(6, b, 64);
    _tile_dpbf16ps(0, 4, 6);
    if (kTall) {
      _tile_loadd(5, a + x.a_below, a_row_bytes);
      _tile_dpbf16ps(1, 5, 6);
    }
    if (kWide) {
      _tile_loadd(7, b + kTileElements, 64);
      _tile_dpbf16ps(2, 4, 7);
      if (kTall) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, x.c, c_row_bytes);
  if (kTall) _tile_stored(1, c_below, c_row_bytes);
  if (kWide) _tile_stored(2, x.c + kTileRows, c_row_bytes);
  if (kWide && kTall) _tile_stored(3, c_below + kTileRows, c_row_bytes);
}

}  // namespace
}  // namespace pdiff::cpu::amx
