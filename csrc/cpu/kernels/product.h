#pragma once

// Products of small matrices that lie in cache, the arithmetic of attention:
//
//   c[rows, cols] <- init + a[rows, depth] @ b[depth, cols]
//
// `a` is read one number at a time, `b` and `c` a vector of columns at a time, so b and c are row
// major and their rows may be read and written up to the next multiple of Vec::kLanes columns.
// Each element of c is one chain of multiply-adds in order of depth: it does not depend on what
// else is in the block.

#include <cstdint>

#include "common/macros.h"

namespace pdiff::cpu::PDIFF_ISA {
namespace {

enum class Init {
  kZero,   // c <- a @ b
  kAdd,    // c <- c + a @ b
  kScale,  // c <- scale[row] * c + a @ b
};

enum class Layout {
  kRowMajor,    // a[row * lda + t]
  kDepthMajor,  // a[t * lda + row]: the transpose of a matrix stored by depth
};

struct ProductOperands {
  const float* a;
  int64_t lda;
  const float* b;
  int64_t ldb;
  float* c;
  int64_t ldc;
  int depth;
  const float* scale;
};

// With 32 registers 8 x 2 vectors: 16 chains hide the latency of multiply-add, and 10 loads feed 16
// of them. With 16 registers no more than 6 x 2 fit.
constexpr int kBlockRows = Vec::kLanes >= 16 ? 8 : 6, kBlockVecs = 2;

template <int kRows, int kVecs, Init kInit, Layout kLayout>
PDIFF_INLINE void product_block(const ProductOperands& x, int row, int col) {
  const bool by_row = kLayout == Layout::kRowMajor;
  const float* a = x.a + (by_row ? row * x.lda : row);
  const float* b = x.b + col;
  float* c = x.c + row * x.ldc + col;
  Vec acc[kRows][kVecs];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVecs; ++v) {
      acc[r][v] = kInit == Init::kZero ? zero() : load(c + r * x.ldc + v * Vec::kLanes);
      if (kInit == Init::kScale) acc[r][v] = acc[r][v] * broadcast(x.scale[row + r]);
    }
  }
  for (int t = 0; t < x.depth; ++t) {
    Vec bv[kVecs];
    for (int v = 0; v < kVecs; ++v) bv[v] = load(b + v * Vec::kLanes);
    for (int r = 0; r < kRows; ++r) {
      const Vec ar = broadcast(by_row ? a[r * x.lda] : a[r]);
      for (int v = 0; v < kVecs; ++v) acc[r][v] = fma(ar, bv[v], acc[r][v]);
    }
    a += by_row ? 1 : x.lda;
    b += x.ldb;
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVecs; ++v) store(c + r * x.ldc + v * Vec::kLanes, acc[r][v]);
  }
}

template <int kVecs, Init kInit, Layout kLayout>
PDIFF_INLINE void product_columns(const ProductOperands& x, int rows, int col) {
  int row = 0;
  for (; row + kBlockRows <= rows; row += kBlockRows) {
    product_block<kBlockRows, kVecs, kInit, kLayout>(x, row, col);
  }
  if (rows - row >= 4) {
    product_block<4, kVecs, kInit, kLayout>(x, row, col);
    row += 4;
  }
  for (; row < rows; ++row) product_block<1, kVecs, kInit, kLayout>(x, row, col);
}

template <Init kInit, Layout kLayout>
void product(const ProductOperands& x, int rows, int cols) {
  constexpr int kBlockCols = kBlockVecs * Vec::kLanes;
  int col = 0;
  for (; col + Vec::kLanes < cols; col += kBlockCols) {
    product_columns<kBlockVecs, kInit, kLayout>(x, rows, col);
  }
  if (col < cols) product_columns<1, kInit, kLayout>(x, rows, col);
}

}  // namespace
}  // namespace pdiff::cpu::PDIFF_ISA
