#pragma once

// The forward: blocks that stay, and take one query tile and KV head after another.

#include <cstdint>

#include "cuda/common/launch.h"
#include "cuda/hybrid_attention/few_rows.cuh"
#include "cuda/hybrid_attention/many_rows.cuh"
#include "cuda/hybrid_attention/shared.cuh"

namespace pdiff::cuda::attention {

/// Works on the tile that is staged; thread 0 gets a ticket for another one, which is on its way
/// while results are written.
template <typename Rows, int kHeadDim>
__device__ __forceinline__ uint32_t attend(const ForwardParams& params, Shared<kHeadDim>& shared,
                                           int thread) {
  Rows rows(params, shared, opaque(thread));
  rows.run();
  const uint32_t ticket = thread == 0 ? atomicAdd(params.ticket, 1u) : 0;
  rows.write();
  return ticket;
}

template <typename T, int kHeadDim, bool kPaged>
__global__ void __launch_bounds__(kNumThreads, kBlocksPerSm<kHeadDim>)
    hybrid_attention_kernel(const __grid_constant__ ForwardParams params) {
  auto& shared = *reinterpret_cast<Shared<kHeadDim>*>(shared_memory());
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    shared.plan = plan_view_of(params.plan);
    shared.item = static_cast<int32_t>(blockIdx.x);
  }
  __syncthreads();

  // Tiles are listed by falling work, so whoever is free takes the largest that is left.
  while (shared.item < shared.plan.header.num_tiles * params.num_heads_kv) {
    if (thread < kWarpSize) {
      const PlanTile tile = shared.plan.tiles[shared.item / params.num_heads_kv];
      const int32_t kv_head = shared.item % params.num_heads_kv;
      const PlanSequence sequence = shared.plan.sequences[tile.sequence];
      stage_walk(shared.walk, shared.plan, tile, sequence, thread);
      if (thread == 0) {
        shared.rows = tile_rows_of(params, tile, sequence, kv_head);
        shared.keys = keys_of<kPaged>(params, shared.plan, sequence, kv_head * kHeadDim * 2);
      }
    }
    __syncthreads();
    uint32_t ticket;
    if (shared.plan.header.split_keys != 0 && shared.rows.num_rows <= kFewRows) {
      ticket = attend<FewRows<T, kHeadDim, kPaged>>(params, shared, thread);
    } else {
      ticket = attend<ManyRows<T, kHeadDim, kPaged>>(params, shared, thread);
    }
    if (thread == 0) shared.item = static_cast<int32_t>(gridDim.x + ticket);
    __syncthreads();
  }
}

template <typename T, int kHeadDim>
void launch_forward(const ForwardParams& params, const CudaQueue& queue) {
  const LaunchShape shape{.name = "hybrid_attention",
                          .num_blocks = num_sms(queue.device_idx) * kBlocksPerSm<kHeadDim>,
                          .num_threads = kNumThreads,
                          .shared_bytes = sizeof(Shared<kHeadDim>)};
  if (params.page_size > 0) {
    launch(hybrid_attention_kernel<T, kHeadDim, true>, shape, queue, params);
  } else {
    launch(hybrid_attention_kernel<T, kHeadDim, false>, shape, queue, params);
  }
}

}  // namespace pdiff::cuda::attention
