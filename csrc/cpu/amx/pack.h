#pragma once

// Rows of bfloat16 tensors, put into the tiles that products want and back.

#include <cstdint>

#include "cpu/amx/tile.h"
#include "cpu/kernels/attention_tile.h"

namespace pdiff::cpu::amx {
namespace {

constexpr int kKeySteps = kTileKeys / kTileDepth;

PDIFF_INLINE void transpose_words(__m512i (&rows)[16]) {
  Vec square[16];
  for (int i = 0; i < 16; ++i) square[i].v = _mm512_castsi512_ps(rows[i]);
  transpose(square);
  for (int i = 0; i < 16; ++i) rows[i] = _mm512_castps_si512(square[i].v);
}

// 32 elements of a row from `column` on; zero past the row's end, and for no row.
PDIFF_INLINE __m512i load_elements(const bfloat16* row, int column, int head_dim) {
  const int n = row == nullptr ? 0 : min(head_dim - column, kTileDepth);
  return n == kTileDepth ? _mm512_loadu_si512(row + column)
                         : _mm512_maskz_loadu_epi16((uint64_t{1} << n) - 1, row + column);
}

// Rows across, pairs of elements down, to be multiplied by keys:
// to[panel][head_dim step][half] <- tiles of 32 elements of 16 rows
inline void pack_pairs_of_elements(const bfloat16* const* rows, int padded_rows, int head_dim,
                                   bfloat16* to) {
  const int num_steps = (head_dim + kTileDepth - 1) / kTileDepth;
  for (int row = 0; row < padded_rows; row += kTileRows) {
    for (int step = 0; step < num_steps; ++step) {
      __m512i words[16];
      for (int r = 0; r < kTileRows; ++r) {
        words[r] = load_elements(rows[row + r], step * kTileDepth, head_dim);
      }
      transpose_words(words);
      const int panel = row / kPanelRows, half = row % kPanelRows / kTileRows;
      bfloat16* tile = to + ((panel * num_steps + step) * 2 + half) * kTileElements;
      for (int i = 0; i < kTileRows; ++i) _mm512_store_si512(tile + i * kTileDepth, words[i]);
    }
  }
}

// Elements across, pairs of rows down, to be summed into keys:
// to[head_dim step][panel][half] <- tiles of 32 rows of 16 elements
inline void pack_pairs_of_rows(const bfloat16* const* rows, int padded_rows, int head_dim,
                               bfloat16* to) {
  const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
  const __m512i second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  // Row by row, as they lie in memory: that is what is fetched ahead.
  for (int row = 0; row < padded_rows; row += 2) {
    bfloat16* pair = to + row / kPanelRows * 2 * kTileElements + row % kPanelRows / 2 * kTileDepth;
    for (int column = 0; column < head_dim; column += kTileDepth) {
      const __m512i even = load_elements(rows[row], column, head_dim);
      const __m512i odd = load_elements(rows[row + 1], column, head_dim);
      // Of each 8 elements, `low` has the pairs of the first 4 and `high` of the others.
      const __m512i low = _mm512_unpacklo_epi16(even, odd);
      const __m512i high = _mm512_unpackhi_epi16(even, odd);
      _mm512_store_si512(pair, _mm512_permutex2var_epi64(low, first, high));
      _mm512_store_si512(pair + kTileElements, _mm512_permutex2var_epi64(low, second, high));
      pair += padded_rows * kTileDepth;
    }
  }
}

// Keys down, elements across: to[key][padded head_dim]
inline void pack_keys(const KeyRows<bfloat16>& keys, const KeyTile& tile, int head_dim,
                      bfloat16* to) {
  const int64_t padded_dim = round_up(head_dim, kTileDepth);
  for_each_key(keys, tile.key_lo, tile.num_keys, [&](int j, const bfloat16* row) {
    for (int i = 0; i < head_dim; i += kTileDepth) {
      _mm512_store_si512(to + j * padded_dim + i, load_elements(row, i, head_dim));
    }
  });
}

// Elements down, keys across: to[head_dim / 16][key step] <- tiles of 16 elements of 32 keys.
// Keys past the last are zero up to a whole step.
inline void pack_keys_transposed(const KeyRows<bfloat16>& keys, const KeyTile& tile, int head_dim,
                                 bfloat16* to) {
  const bfloat16* rows[kTileKeys] = {};
  for_each_key(keys, tile.key_lo, tile.num_keys,
               [&](int j, const bfloat16* row) { rows[j] = row; });
  for (int step = 0; step * kTileDepth < tile.num_keys; ++step) {
    for (int column = 0; column < head_dim; column += kTileDepth) {
      __m512i low[16], high[16];
      for (int i = 0; i < 16; ++i) {
        const bfloat16** pair = rows + step * kTileDepth + 2 * i;
        const __m512i even = load_elements(pair[0], column, head_dim);
        const __m512i odd = load_elements(pair[1], column, head_dim);
        low[i] = _mm512_unpacklo_epi16(even, odd);
        high[i] = _mm512_unpackhi_epi16(even, odd);
      }
      transpose_words(low);
      transpose_words(high);
      const auto row_of = [&](int element) {
        return to + (element / kTileRows * kKeySteps + step) * kTileElements +
               element % kTileRows * kTileDepth;
      };
      for (int i = 0; i < 16; ++i) {  // of each 8 elements, `low` has the first 4
        const int element = column + i / 4 * 8 + i % 4;
        _mm512_store_si512(row_of(element), low[i]);
        _mm512_store_si512(row_of(element + 4), high[i]);
      }
    }
  }
}

// rows[r][element] <- factor[r] * from[panel][element][r]
inline void unpack_rows(const float* from, const float* factor, int num_rows, int head_dim,
                        bfloat16* const* rows) {
  const int padded_dim = round_up(head_dim, kTileDepth);
  for (int row = 0; row < num_rows; row += kTileRows) {
    const float* panel = from + row / kPanelRows * kPanelRows * padded_dim + row % kPanelRows;
    for (int i = 0; i < head_dim; i += kTileRows) {
      Vec square[kTileRows];
      for (int j = 0; j < kTileRows; ++j) {
        square[j] = load(panel + (i + j) * kPanelRows) * load(factor + row);
      }
      transpose(square);
      for (int r = 0; r < min(num_rows - row, kTileRows); ++r) {
        store_first(rows[row + r] + i, square[r], head_dim - i);
      }
    }
  }
}

// 2^x for x <= 128, relative error below 3e-6: what is rounded to bfloat16 needs no more.
PDIFF_INLINE Vec exp2_coarse(Vec x) {
  x = max(broadcast(-126.0f), x);
  constexpr int kFromFloor = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
  const Vec f = {_mm512_reduce_ps(x.v, kFromFloor)};
  Vec p = broadcast(0x1.bb7cd4p-7f);
  p = fma(p, f, broadcast(0x1.aa13fp-5f));
  p = fma(p, f, broadcast(0x1.ee798ap-3f));
  p = fma(p, f, broadcast(0x1.62d166p-1f));
  p = fma(p, f, broadcast(0x1.00002cp+0f));
  return {_mm512_scalef_ps(p.v, x.v)};  // times 2^floor(x)
}

PDIFF_INLINE __m512i narrow_two(Vec first, Vec second) {
  return (__m512i)_mm512_cvtne2ps_pbh(second.v, first.v);
}

// Two keys' numbers for 16 rows as a row of pairs: row of a tile operand b.
PDIFF_INLINE __m512i narrow_pairs(Vec even, Vec odd) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, narrow_two(even, odd));
}

// Where pair (j, j + 1) of keys lies in [key step][2] tiles of pairs.
PDIFF_INLINE int pair_offset(int j) {
  return j / kTileDepth * 2 * kTileElements + j % kTileDepth / 2 * kTileDepth;
}

}  // namespace
}  // namespace pdiff::cpu::amx
