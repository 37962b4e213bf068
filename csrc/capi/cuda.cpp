// The CUDA kernels behind the C interface.

#include <algorithm>

#include "capi/support.h"
#include "pdiff/hybrid_attention.h"

using namespace pdiff::capi;

namespace {

#if PDIFF_WITH_CUDA
bool filters(const pdiff_unmask_args& args) {
  return args.top_p_per_span != nullptr || args.top_k_per_span != nullptr || args.top_k > 0 ||
         (args.top_p > 0.0f && args.top_p < 1.0f);
}

pdiff::CudaQueue queue_of(const pdiff_cuda_queue& queue) {
  return {queue.device_idx, queue.stream};
}
#else
[[noreturn]] void refuse() { pdiff::detail::throw_error("built without CUDA"); }
#endif

}  // namespace

extern "C" {

#if PDIFF_WITH_CUDA

int64_t pdiff_cuda_hybrid_attention_workspace_bytes(const pdiff_attention_plan* plan) {
  const pdiff::PlanHeader& h = plan->plan.header();
  return pdiff::cuda::hybrid_attention_workspace_bytes(h.num_slots, h.num_heads_kv, h.head_dim);
}

pdiff_status pdiff_cuda_hybrid_attention(const pdiff_attention_plan* plan,
                                         const int32_t* device_words,
                                         const pdiff_hybrid_attention_args* args, void* workspace,
                                         pdiff_cuda_queue queue) {
  return guarded([&] {
    check_pointer(plan, "plan");
    check_pointer(device_words, "device_words");
    check_pointer(args, "args");
    const pdiff::PlanHeader& h = plan->plan.header();
    PDIFF_CHECK(h.schedule == static_cast<int32_t>(pdiff::Schedule::kGpu),
                "plan: expected one made for_gpu, got one for the CPU");
    const AttentionStrides strides = checked_strides(*args, h);
    pdiff::cuda::hybrid_attention(
        {.plan = device_words,
         .num_slots = h.num_slots,
         .dtype = dtype_of(args->dtype, "dtype"),
         .total_q = h.total_q,
         .num_keys = h.page_size > 0 ? h.num_pages : h.total_kv,
         .num_heads_q = h.num_heads_q,
         .num_heads_kv = h.num_heads_kv,
         .head_dim = h.head_dim,
         .page_size = h.page_size,
         .q = args->q,
         .k = args->k,
         .v = args->v,
         .out = args->out,
         .lse = args->lse,
         .q_stride = strides.q,
         .k_stride = strides.k,
         .v_stride = strides.v,
         .k_page_stride = strides.k_page,
         .v_page_stride = strides.v_page,
         .softmax_scale = scale_or_default(args->softmax_scale, h.head_dim),
         .workspace = workspace},
        queue_of(queue));
  });
}

int64_t pdiff_cuda_unmask_workspace_bytes(const pdiff_unmask_args* args) {
  const int64_t num_bytes =
      pdiff::cuda::unmask_workspace_bytes(args->num_rows, args->vocab_size, filters(*args));
  return std::max<int64_t>(1, num_bytes);
}

pdiff_status pdiff_cuda_unmask(const pdiff_unmask_args* args, void* workspace,
                               int64_t workspace_bytes, pdiff_cuda_queue queue) {
  return guarded([&] {
    check_pointer(args, "args");
    check_pointer(workspace, "workspace");
    pdiff::cuda::unmask(unmask_params(*args), workspace, workspace_bytes, queue_of(queue));
  });
}

#else

int64_t pdiff_cuda_hybrid_attention_workspace_bytes(const pdiff_attention_plan*) { return 1; }

pdiff_status pdiff_cuda_hybrid_attention(const pdiff_attention_plan*, const int32_t*,
                                         const pdiff_hybrid_attention_args*, void*,
                                         pdiff_cuda_queue) {
  return guarded(refuse);
}

int64_t pdiff_cuda_unmask_workspace_bytes(const pdiff_unmask_args*) { return 1; }

pdiff_status pdiff_cuda_unmask(const pdiff_unmask_args*, void*, int64_t, pdiff_cuda_queue) {
  return guarded(refuse);
}

#endif

}  // extern "C"
