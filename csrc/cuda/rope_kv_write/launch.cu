#include <cstdint>
#include <initializer_list>

#include "cuda/common/launch.h"
#include "cuda/rope_kv_write/kernel.cuh"
#include "pdiff/error.h"

namespace pdiff::cuda {
namespace {

// May every piece be one access of 16 bytes?
template <typename T>
bool fits_vectors(const RopeKvWriteParams& p) {
  bool fits = p.head_dim / 2 % kPerVector<T> == 0;
  for (const void* begin :
       std::initializer_list<const void*>{p.q, p.k, p.v, p.cos, p.sin, p.k_cache, p.v_cache}) {
    fits = fits && reinterpret_cast<uintptr_t>(begin) % 16 == 0;
  }
  for (const int64_t stride : {p.q_stride, p.k_stride, p.v_stride}) {
    fits = fits && stride % kPerVector<T> == 0;
  }
  return fits;
}

template <typename T, int kCount>
void launch_rows(const RopeKvWriteParams& p, const CudaQueue& queue) {
  constexpr int64_t kThreadsWanted = 512;
  const int64_t pieces = p.head_dim / 2 / kCount;
  const int64_t num_heads = p.num_heads_q + p.num_heads_kv * (p.k_cache != nullptr ? 2 : 1);
  if (num_heads == 0) return;
  const int64_t num_passes = (num_heads * pieces + kThreadsWanted - 1) / kThreadsWanted;
  const int64_t heads_at_once = (num_heads + num_passes - 1) / num_passes;
  launch(rope_kv_write_kernel<T, kCount>,
         {.name = "rope_kv_write",
          .num_blocks = p.num_rows,
          .num_threads = static_cast<int>(heads_at_once * pieces)},
         queue, p);
}

template <typename T>
void launch_for(const RopeKvWriteParams& p, const CudaQueue& queue) {
  if (fits_vectors<T>(p)) return launch_rows<T, kPerVector<T>>(p, queue);
  launch_rows<T, 1>(p, queue);
}

}  // namespace

void rope_kv_write(const RopeKvWriteParams& params, const CudaQueue& queue) {
  constexpr int64_t kMaxHeadDim = 1024;  // a thread per rotated pair is then still one block
  const RopeKvWriteParams& p = params;
  PDIFF_CHECK(p.head_dim > 0 && p.head_dim % 2 == 0 && p.head_dim <= kMaxHeadDim,
              "head_dim: expected an even number up to ", kMaxHeadDim, ", got ", p.head_dim);
  PDIFF_CHECK(p.num_rows <= INT32_MAX, "q: expected at most 2^31 - 1 rows, got ", p.num_rows);
  if (p.num_rows == 0) return;
  const DeviceGuard guard(queue.device_idx);
  if (p.dtype == DType::kBFloat16) return launch_for<bfloat16>(p, queue);
  if (p.dtype == DType::kFloat16) return launch_for<float16>(p, queue);
  launch_for<float>(p, queue);
}

}  // namespace pdiff::cuda
