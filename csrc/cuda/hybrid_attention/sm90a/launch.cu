#include <climits>

#include "cuda/common/launch.h"
#include "cuda/hybrid_attention/sm90a/kernel.cuh"
#include "cuda/hybrid_attention/sm90a/launch.h"
#include "cuda/hybrid_attention/sm90a/maps.h"

namespace pdiff::cuda::sm90a {
namespace {

// Pages as one row of tokens: then a page is a range of them.
int64_t num_key_tokens(const HybridAttentionParams& p) {
  return p.page_size > 0 ? p.num_keys * p.page_size : p.num_keys;
}

template <typename T, int kHeadDim, bool kPaged, bool kParts>
void launch_kernel(const HybridAttentionParams& p, const attention::ForwardParams& forward,
                   const CudaQueue& queue) {
  const int group_size = p.num_heads_q / p.num_heads_kv;
  const int tokens = kGpuTileRows / group_size;
  const auto map_of_keys = [&](const void* data, int64_t stride) {
    return map_of_tokens(data, p.dtype, num_key_tokens(p), p.num_heads_kv, kHeadDim, stride, 1,
                         kBoxKeys);
  };
  const Params params{.plan = p.plan,
                      .ticket = forward.ticket,
                      .out = p.out,
                      .lse = p.lse,
                      .arrivals = forward.arrivals,
                      .partial_out = forward.partial_out,
                      .partial_state = reinterpret_cast<float2*>(forward.partial_state),
                      .score_scale = forward.scale,
                      .rows_per_box = tokens * group_size};
  launch(forward_kernel<T, kHeadDim, kPaged, kParts>,
         {"hybrid_attention", num_sms(queue.device_idx), kNumThreads, sizeof(Shared<kHeadDim>)},
         queue, params,
         map_of_tokens(p.q, p.dtype, p.total_q, p.num_heads_q, kHeadDim, p.q_stride, group_size,
                       tokens),
         map_of_keys(p.k, p.k_stride), map_of_keys(p.v, p.v_stride));
}

template <typename T, int kHeadDim>
void launch_kernel_of(const HybridAttentionParams& p, const attention::ForwardParams& forward,
                      const CudaQueue& queue) {
  if (p.page_size > 0) {
    (p.num_slots > 0 ? launch_kernel<T, kHeadDim, true, true>
                     : launch_kernel<T, kHeadDim, true, false>)(p, forward, queue);
  } else {
    (p.num_slots > 0 ? launch_kernel<T, kHeadDim, false, true>
                     : launch_kernel<T, kHeadDim, false, false>)(p, forward, queue);
  }
}

}  // namespace

bool takes_forward(const HybridAttentionParams& p) {
  // A tensor map's box of keys lies in one page, and all pages are rows of one array.
  const bool is_gapless =
      p.k_page_stride == p.page_size * p.k_stride && p.v_page_stride == p.page_size * p.v_stride;
  const bool maps_pages = p.page_size == 0 || (p.page_size % kBoxKeys == 0 && is_gapless);
  return p.num_keys > 0 && num_key_tokens(p) <= INT_MAX && maps_pages;
}

void launch_forward(const HybridAttentionParams& p, const attention::ForwardParams& forward,
                    const CudaQueue& queue) {
  const bool is_bfloat16 = p.dtype == DType::kBFloat16;
  if (p.head_dim == 128) {
    (is_bfloat16 ? launch_kernel_of<bfloat16, 128> : launch_kernel_of<float16, 128>)(p, forward,
                                                                                     queue);
  } else {
    (is_bfloat16 ? launch_kernel_of<bfloat16, 64> : launch_kernel_of<float16, 64>)(p, forward,
                                                                                   queue);
  }
}

}  // namespace pdiff::cuda::sm90a
