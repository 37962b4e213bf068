#pragma once

// Products of small matrices by the 32 lanes of a warp (sm_80). With g = lane / 4, t = lane % 4:
//
//   a[16 x 16]  a0: row g, columns 2t, 2t + 1   a1: row g + 8, same   a2, a3: columns + 8
//   b[16 x 8]   b0: rows 2t, 2t + 1, column g   b1: rows + 8
//   d[16 x 8]   d0, d1: row g, columns 2t, 2t + 1   d2, d3: row g + 8

#include "cuda/ptx/shared.cuh"
#include "pdiff/dtype.h"

namespace pdiff::cuda {

/// Four 8 x 8 matrices of 16-bit elements. Lane l passes the address of row l % 8 of matrix l / 8,
/// aligned to 16; it gets elements 2t, 2t + 1 of row g of matrix i in x[i].
__device__ __forceinline__ void load_matrices(uint32_t (&x)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(shared_address(shared_row))
               : "memory");
}

/// As load_matrices, each matrix transposed: elements 2t, 2t + 1 of column g.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&x)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(shared_address(shared_row))
               : "memory");
}

/// d <- d + a @ b in float.
template <typename T>
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1);

template <>
__device__ __forceinline__ void multiply_add<bfloat16>(float (&d)[4], const uint32_t (&a)[4],
                                                       uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
      "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void multiply_add<float16>(float (&d)[4], const uint32_t (&a)[4],
                                                      uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
      "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace pdiff::cuda
