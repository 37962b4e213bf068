#pragma once

// Copies of boxes of a tensor to shared memory by the copy engine (sm_90).
//
// A box's innermost dimension is 128 bytes long, a row. Row r of the box lies at byte 128 r of the
// destination, which is aligned to 1024; its 16-byte pieces are permuted: piece i is at i ^ (r %
// 8).

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/ptx/barrier.cuh"
#include "pdiff/dtype.h"
#include "pdiff/error.h"

namespace pdiff::cuda {

using TensorMap = CUtensorMap;  // a kernel takes it as `const __grid_constant__ TensorMap`

/// A tensor [size2, size1, size0] of 16-bit elements, the innermost contiguous, and its boxes
/// [box2, box1, 64]. Rows out of the tensor read as zeros. Throws pdiff::Error.
inline TensorMap make_tensor_map(const void* data, DType dtype, const int64_t (&size)[3],
                                 const int64_t (&stride)[2],  // elements, of dimensions 1 and 2
                                 const int (&box)[2]) {       // of dimensions 1 and 2
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    const cudaError_t status = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry,
                                                                12000, cudaEnableDefault, &found);
    PDIFF_CHECK(status == cudaSuccess && found == cudaDriverEntryPointSuccess,
                "cuTensorMapEncodeTiled: not in this driver");
    return reinterpret_cast<Encode>(entry);
  }();
  const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(size[0]), static_cast<cuuint64_t>(size[1]),
                               static_cast<cuuint64_t>(size[2])};
  const cuuint64_t strides[2] = {static_cast<cuuint64_t>(stride[0]) * 2,
                                 static_cast<cuuint64_t>(stride[1]) * 2};
  const cuuint32_t boxes[3] = {64, static_cast<cuuint32_t>(box[0]),
                               static_cast<cuuint32_t>(box[1])};
  const cuuint32_t steps[3] = {1, 1, 1};
  TensorMap map;
  const CUresult status =
      encode(&map,
             dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                       : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
             3, const_cast<void*>(data), sizes, strides, boxes, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  PDIFF_CHECK(status == CUDA_SUCCESS, "cuTensorMapEncodeTiled: error ", static_cast<int>(status));
  return map;
}

/// Copies the box at (x0, x1, x2), x0 in elements of the innermost dimension; one thread. Its
/// box1 * box2 * 128 bytes count at the barrier, also those out of the tensor.
__device__ __forceinline__ void copy_box(void* shared, const TensorMap& map, CopyBarrier& barrier,
                                         int x0, int x1, int x2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(shared_address(shared)),
      "l"(&map), "r"(barrier.address()), "r"(x0), "r"(x1), "r"(x2)
      : "memory");
}

__device__ __forceinline__ void prefetch_tensor_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

}  // namespace pdiff::cuda
