#pragma once

// Products by the four warps of a warpgroup, on operands in shared memory (sm_90a).
//
// Panels: a matrix of 16-bit elements lies in panels of 64 columns; row r of a panel is 128 bytes
// at byte 128 r, permuted as ptx/tensor_copy.cuh says; panels are aligned to 1024.
// Accumulator: warp w has rows 16 w to 16 w + 15 of 64. With g = lane / 4, t = lane % 4, d[4j],
// d[4j + 1] are row g, columns 8j + 2t and next; d[4j + 2], d[4j + 3] are row g + 8.
// Asynchronous: from the call until `products_wait`, nobody may touch accumulators or operands.

#include "cuda/ptx/shared.cuh"
#include "pdiff/dtype.h"

namespace pdiff::cuda {

/// Before the first product, and after the warpgroup's registers were written otherwise.
__device__ __forceinline__ void products_begin() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

/// Closes a group of products.
__device__ __forceinline__ void products_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

/// Waits until at most `kGroups` of the latest groups are under way.
template <int kGroups>
__device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
}

/// After a wait: keeps the compiler from moving what uses an accumulator before it.
template <int kSize>
__device__ __forceinline__ void settle(float (&x)[kSize]) {
#pragma unroll
  for (float& element : x) asm volatile("" : "+f"(element)::"memory");
}

/// Where an operand lies: what the instruction calls a matrix descriptor. In bytes: its address,
/// from panel to panel where rows are the summed dimension (else a step lies in one panel), from 8
/// rows to the next 8.
__device__ __forceinline__ uint64_t describe_panels(const void* shared, int panel_bytes = 0) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  constexpr uint64_t kEightRows = uint64_t{1024 >> 4} << 32;
  return kSwizzle128 | kEightRows | static_cast<uint64_t>(panel_bytes >> 4) << 16 |
         ((shared_address(shared) & 0x3ffff) >> 4);
}

/// d[64 x kColumns] <- (accumulate ? d : 0) + a[64 x 16] @ b[kColumns x 16]^T, of rows that lie as
/// rows: q @ k^T. A step of 16 columns within a panel is 32 bytes: 2 in the descriptor.
template <typename T, int kColumns>
__device__ __forceinline__ void multiply_panels(float (&d)[kColumns / 2], uint64_t a, uint64_t b,
                                                bool accumulate);

/// d[64 x kColumns] <- (accumulate ? d : 0) + a[64 x 16] @ b[16 x kColumns]: p @ v, a from
/// registers (as d: a[0] row g, columns 2t, 2t + 1; a[1] row g + 8; a[2], a[3] columns + 8), b's
/// rows are the summed dimension. A step of 16 rows is 2048 bytes: 128 in the descriptor.
template <typename T, int kColumns>
__device__ __forceinline__ void multiply_fragment(float (&d)[kColumns / 2], const uint32_t (&a)[4],
                                                  uint64_t b, bool accumulate);

// The registers of an instruction's accumulators, by eights: their names in it, and what they are.
#define PDIFF_REGISTERS_32                                                                     \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, " \
  "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define PDIFF_REGISTERS_64                                                                       \
  PDIFF_REGISTERS_32                                                                             \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, " \
  "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define PDIFF_ACCUMULATORS_8(i)                                                               \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define PDIFF_ACCUMULATORS_32                                                 \
  PDIFF_ACCUMULATORS_8(0), PDIFF_ACCUMULATORS_8(8), PDIFF_ACCUMULATORS_8(16), \
      PDIFF_ACCUMULATORS_8(24)
#define PDIFF_ACCUMULATORS_64                                                \
  PDIFF_ACCUMULATORS_32, PDIFF_ACCUMULATORS_8(32), PDIFF_ACCUMULATORS_8(40), \
      PDIFF_ACCUMULATORS_8(48), PDIFF_ACCUMULATORS_8(56)

// Both products of one shape. `A`, `B`, ... name the operands behind the accumulators.
#define PDIFF_PRODUCTS(T, TYPE, COLUMNS, SIZE, A, B, C, D, E, F)                             \
  template <>                                                                                \
  __device__ __forceinline__ void multiply_panels<T, COLUMNS>(float (&d)[SIZE], uint64_t a,  \
                                                              uint64_t b, bool accumulate) { \
    asm volatile("{ .reg .pred accumulate; setp.ne.b32 accumulate, " C                       \
                 ", 0;\n"                                                                    \
                 "wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32." TYPE "." TYPE       \
                 " {" PDIFF_REGISTERS_##SIZE "}, " A ", " B ", accumulate, 1, 1, 0, 0; }\n"  \
                 : PDIFF_ACCUMULATORS_##SIZE                                                 \
                 : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));                       \
  }                                                                                          \
  template <>                                                                                \
  __device__ __forceinline__ void multiply_fragment<T, COLUMNS>(                             \
      float (&d)[SIZE], const uint32_t (&a)[4], uint64_t b, bool accumulate) {               \
    asm volatile("{ .reg .pred accumulate; setp.ne.b32 accumulate, " F                       \
                 ", 0;\n"                                                                    \
                 "wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32." TYPE "." TYPE       \
                 " {" PDIFF_REGISTERS_##SIZE "}, {" A ", " B ", " C ", " D "}, " E           \
                                             ", accumulate, 1, 1, 1; }\n"                    \
                 : PDIFF_ACCUMULATORS_##SIZE                                                 \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b),                       \
                   "r"(static_cast<int>(accumulate)));                                       \
  }

PDIFF_PRODUCTS(bfloat16, "bf16", 64, 32, "%32", "%33", "%34", "%35", "%36", "%37")
PDIFF_PRODUCTS(bfloat16, "bf16", 128, 64, "%64", "%65", "%66", "%67", "%68", "%69")
PDIFF_PRODUCTS(float16, "f16", 64, 32, "%32", "%33", "%34", "%35", "%36", "%37")
PDIFF_PRODUCTS(float16, "f16", 128, 64, "%64", "%65", "%66", "%67", "%68", "%69")

#undef PDIFF_PRODUCTS
#undef PDIFF_ACCUMULATORS_64
#undef PDIFF_ACCUMULATORS_32
#undef PDIFF_ACCUMULATORS_8
#undef PDIFF_REGISTERS_64
#undef PDIFF_REGISTERS_32

}  // namespace pdiff::cuda
