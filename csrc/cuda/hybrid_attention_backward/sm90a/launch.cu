#include <algorithm>
#include <cfloat>

#include "cuda/common/launch.h"
#include "cuda/hybrid_attention/sm90a/maps.h"
#include "cuda/hybrid_attention_backward/sm90a/kernel.cuh"
#include "cuda/hybrid_attention_backward/sm90a/launch.h"

namespace pdiff::cuda::sm90a {

using attention_backward::kLog2E;
using attention_backward::Problem;

bool takes_backward(const HybridAttentionBackwardParams& params) {
  return params.num_heads_q / params.num_heads_kv <= kPositions && params.total_q > 0 &&
         params.total_kv > 0;
}

template <typename T, int kHeadDim>
void launch_backward(const Problem& problem, const CudaQueue& queue) {
  const HybridAttentionBackwardParams& x = problem.tensors;
  const int group_size = problem.group_size;
  const int64_t dout_stride = int64_t{x.num_heads_q} * kHeadDim;
  const auto rows = [&](const void* data, int64_t stride, int tokens) {
    return map_of_tokens(data, x.dtype, x.total_q, x.num_heads_q, kHeadDim, stride, group_size,
                         tokens);
  };
  const auto keys = [&](const void* data, int64_t stride, int tokens) {
    return map_of_tokens(data, x.dtype, x.total_kv, x.num_heads_kv, kHeadDim, stride, 1, tokens);
  };
  const int tile_tokens = kGpuTileRows / group_size, box_tokens = kPositions / group_size;
  BackwardParams params{.plan = x.plan,
                        .ticket = problem.tickets,
                        .lse = problem.row_lse,
                        .delta = problem.row_delta,
                        .sum = {x.dk, x.dv},
                        .score_scale = std::max(x.softmax_scale * kLog2E, FLT_MIN),
                        .softmax_scale = x.softmax_scale,
                        .group = problem.by_group,
                        .group_size = group_size,
                        .tokens_per_box = box_tokens,
                        .rows_per_owner_box = kOwners};
  const int num_blocks = num_sms(queue.device_idx);
  launch(backward_kernel<T, kHeadDim, true>,
         {"hybrid_attention_backward: keys", num_blocks, kBackwardThreads,
          sizeof(BackwardShared<kHeadDim>)},
         queue, params,
         BackwardMaps{{keys(x.k, x.k_stride, kOwners), keys(x.v, x.v_stride, kOwners)},
                      {rows(x.q, x.q_stride, box_tokens), rows(x.dout, dout_stride, box_tokens)}});
  params.ticket = problem.tickets + 1;
  params.sum[0] = x.dq;
  params.sum[1] = nullptr;
  params.rows_per_owner_box = tile_tokens * group_size;
  launch(backward_kernel<T, kHeadDim, false>,
         {"hybrid_attention_backward: rows", num_blocks, kBackwardThreads,
          sizeof(BackwardShared<kHeadDim>)},
         queue, params,
         BackwardMaps{{rows(x.q, x.q_stride, tile_tokens), rows(x.dout, dout_stride, tile_tokens)},
                      {keys(x.k, x.k_stride, kPositions), keys(x.v, x.v_stride, kPositions)}});
}

template void launch_backward<bfloat16, 64>(const Problem&, const CudaQueue&);
template void launch_backward<bfloat16, 128>(const Problem&, const CudaQueue&);
template void launch_backward<float16, 64>(const Problem&, const CudaQueue&);
template void launch_backward<float16, 128>(const Problem&, const CudaQueue&);

}  // namespace pdiff::cuda::sm90a
