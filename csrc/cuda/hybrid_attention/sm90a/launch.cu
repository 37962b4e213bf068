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

template <typename T, int kHeadDim, bool kPaged>
void launch_kernel(const HybridAttentionParams& p, float score_scale, int32_t* ticket,
                   const CudaQueue& queue) {
  const int group_size = p.num_heads_q / p.num_heads_kv;
  const int tokens = kGpuTileRows / group_size;
  const auto map_of_keys = [&](const void* data, int64_t stride) {
    return map_of_tokens(data, p.dtype, num_key_tokens(p), p.num_heads_kv, kHeadDim, stride, 1,
                         kBoxKeys);
  };
  const Params params{p.plan, ticket, p.out, p.lse, score_scale, tokens * group_size};
  launch(forward_kernel<T, kHeadDim, kPaged>,
         {"hybrid_attention", num_sms(queue.device_idx), kNumThreads, sizeof(Shared<kHeadDim>)},
         queue, params,
         map_of_tokens(p.q, p.dtype, p.total_q, p.num_heads_q, kHeadDim, p.q_stride, group_size,
                       tokens),
         map_of_keys(p.k, p.k_stride), map_of_keys(p.v, p.v_stride));
}

template <typename T, int kHeadDim>
void launch_kernel_of(const HybridAttentionParams& p, float score_scale, int32_t* ticket,
                      const CudaQueue& queue) {
  (p.page_size > 0 ? launch_kernel<T, kHeadDim, true>
                   : launch_kernel<T, kHeadDim, false>)(p, score_scale, ticket, queue);
}

}  // namespace

bool takes_forward(const HybridAttentionParams& p) {
  // A tensor map's box of keys lies in one page, and all pages are rows of one array.
  const bool is_gapless =
      p.k_page_stride == p.page_size * p.k_stride && p.v_page_stride == p.page_size * p.v_stride;
  const bool maps_pages = p.page_size == 0 || (p.page_size % kBoxKeys == 0 && is_gapless);
  return p.num_keys > 0 && num_key_tokens(p) <= INT_MAX && maps_pages;
}

void launch_forward(const HybridAttentionParams& p, float score_scale, int32_t* ticket,
                    const CudaQueue& queue) {
  const bool is_bfloat16 = p.dtype == DType::kBFloat16;
  if (p.head_dim == 128) {
    (is_bfloat16 ? launch_kernel_of<bfloat16, 128> : launch_kernel_of<float16, 128>)(p, score_scale,
                                                                                     ticket, queue);
  } else {
    (is_bfloat16 ? launch_kernel_of<bfloat16, 64> : launch_kernel_of<float16, 64>)(p, score_scale,
                                                                                   ticket, queue);
  }
}

}  // namespace pdiff::cuda::sm90a
