#pragma once

// Rows of tensors as floats, and back.

#include <cstdint>

#include "cpu/kernels/attention_tile.h"

namespace pdiff::cpu::PDIFF_ISA {
namespace {

template <typename T>
PDIFF_INLINE void load_row(const T* from, int n, float* to) {
  int i = 0;
  for (; i + Vec::kLanes <= n; i += Vec::kLanes) store(to + i, load(from + i));
  if (i < n) store(to + i, load_first(from + i, n - i));
}

template <typename T>
PDIFF_INLINE void store_row(const float* from, int n, T* to) {
  int i = 0;
  for (; i + Vec::kLanes <= n; i += Vec::kLanes) store(to + i, load(from + i));
  if (i < n) store_first(to + i, load(from + i), n - i);
}

PDIFF_INLINE void fill_zero(float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = 0.0f;
}

template <typename T>
void copy_keys(const KeyRows<T>& keys, const KeyTile& tile, int head_dim, float* to) {
  const int64_t ld = row_floats(head_dim);
  for_each_key(keys, tile.key_lo, tile.num_keys,
               [&](int j, const T* row) { load_row(row, head_dim, to + j * ld); });
}

// to[panel][i][row in panel] <- scale * element i of the row; zero for no row
template <typename T>
void transpose_rows(const T* const* rows, int padded_rows, int head_dim, float scale, float* to) {
  for (int row = 0; row < padded_rows; row += Vec::kLanes) {
    float* block = to + int64_t{row / kPanelRows} * head_dim * kPanelRows + row % kPanelRows;
    for (int i = 0; i < head_dim; i += Vec::kLanes) {
      const int n = min(head_dim - i, Vec::kLanes);
      Vec square[Vec::kLanes];
      for (int r = 0; r < Vec::kLanes; ++r) {
        const T* from = rows[row + r];
        square[r] = from == nullptr ? zero() : load_first(from + i, n) * broadcast(scale);
      }
      transpose(square);
      for (int j = 0; j < n; ++j) store(block + (i + j) * kPanelRows, square[j]);
    }
  }
}

}  // namespace
}  // namespace pdiff::cpu::PDIFF_ISA
