#pragma once

#include <algorithm>

#include "cuda/common/launch.h"
#include "cuda/hybrid_attention_backward/key_gradient.cuh"
#include "cuda/hybrid_attention_backward/query_gradient.cuh"
#include "cuda/hybrid_attention_backward/row_statistics.cuh"
#include "cuda/hybrid_attention_backward/sm90a/launch.h"

namespace pdiff::cuda::attention_backward {

template <typename T, int kHeadDim>
void launch_kernels(const Problem& problem, const CudaQueue& queue) {
  const auto& x = problem.tensors;
  if (x.total_q > 0) {
    constexpr int kRowsPerBlock = kStatisticsThreads / kRowLanes<kHeadDim>;
    const int64_t num_rows = int64_t{x.total_q} * x.num_heads_q;
    launch(row_statistics_kernel<T, kHeadDim>,
           {"hybrid_attention_backward: rows", (num_rows + kRowsPerBlock - 1) / kRowsPerBlock,
            kStatisticsThreads},
           queue, problem);
  }
  if (cuda_kernels(queue.device_idx) == CudaKernels::kSm90a && sm90a::takes_backward(x)) {
    return sm90a::launch_backward<T, kHeadDim>(problem, queue);
  }
  // Blocks that stay and take one tile after another; how many tiles there are, the plan knows.
  const int64_t num_blocks = int64_t{kBlocksPerSm} * num_sms(queue.device_idx);
  launch(key_gradient_kernel<T, kHeadDim>,
         {"hybrid_attention_backward: keys", num_blocks, kNumThreads,
          sizeof(KeyGradientMemory<T, kHeadDim>)},
         queue, problem);
  launch(query_gradient_kernel<T, kHeadDim>,
         {"hybrid_attention_backward: queries", num_blocks, kNumThreads,
          sizeof(QueryGradientMemory<T, kHeadDim>)},
         queue, problem);
}

template <typename T, int kHeadDim>
int64_t max_block_bytes() {
  return std::max(sizeof(KeyGradientMemory<T, kHeadDim>), sizeof(QueryGradientMemory<T, kHeadDim>));
}

}  // namespace pdiff::cuda::attention_backward
