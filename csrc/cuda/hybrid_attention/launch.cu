#include <algorithm>
#include <cfloat>
#include <cstdint>

#include "cuda/common/launch.h"
#include "cuda/hybrid_attention/config.h"
#include "cuda/hybrid_attention/sm90a/launch.h"
#include "pdiff/error.h"

namespace pdiff::cuda {
namespace {

using attention::ForwardParams;
using attention::launch_forward;

constexpr int64_t kAlignment = 16;

int64_t aligned(int64_t num_bytes) {
  return (num_bytes + kAlignment - 1) / kAlignment * kAlignment;
}

/// What lies in the workspace, one after another.
struct Workspace {
  int64_t num_counters;  // the ticket, then the arrivals
  int64_t partial_out, partial_state, num_bytes;

  Workspace(int64_t num_slots, int64_t num_heads_kv, int64_t head_dim) {
    const int64_t num_parts = num_slots * num_heads_kv;
    num_counters = 1 + num_parts;
    partial_out = aligned(num_counters * static_cast<int64_t>(sizeof(uint32_t)));
    partial_state = partial_out + num_parts * kFewRows * head_dim * int64_t{sizeof(float)};
    num_bytes = partial_state + num_parts * kFewRows * 2 * int64_t{sizeof(float)};
  }
};

void check_pointer(const char* name, const void* data, bool is_needed) {
  PDIFF_CHECK(data != nullptr || !is_needed, name, ": expected memory, got a null pointer");
  PDIFF_CHECK(reinterpret_cast<uintptr_t>(data) % kAlignment == 0, name,
              ": expected memory aligned to 16 bytes, got ", data);
}

int64_t checked_bytes(const char* name, int64_t stride, int64_t max_stride) {
  PDIFF_CHECK(stride >= 0 && stride % 8 == 0 && stride <= max_stride, name,
              ": expected rows aligned to 16 bytes, a stride that is a multiple of 8 and at most ",
              max_stride, ", got ", stride);
  return stride * 2;
}

int32_t token_bytes(const char* name, int64_t stride) {
  return static_cast<int32_t>(checked_bytes(name, stride, int64_t{1} << 24));
}

int64_t page_bytes(const char* name, int64_t stride) {
  return checked_bytes(name, stride, int64_t{1} << 40);
}

void check_params(const HybridAttentionParams& p) {
  PDIFF_CHECK(p.dtype == DType::kBFloat16 || p.dtype == DType::kFloat16,
              "dtype: expected 1 (bfloat16) or 2 (float16), got ", static_cast<int32_t>(p.dtype));
  PDIFF_CHECK(p.head_dim == 64 || p.head_dim == 128, "head_dim: expected 64 or 128, got ",
              p.head_dim);
  PDIFF_CHECK(p.num_heads_kv > 0 && p.num_heads_q > 0 && p.num_heads_q % p.num_heads_kv == 0,
              "num_heads_q: expected a multiple of num_heads_kv (", p.num_heads_kv, "), got ",
              p.num_heads_q);
  const int32_t group_size = p.num_heads_q / p.num_heads_kv;
  PDIFF_CHECK(group_size <= kGpuTileRows, "num_heads_q: expected at most ", kGpuTileRows,
              " query heads for each of the ", p.num_heads_kv, " key heads, got ", group_size);
  PDIFF_CHECK(p.softmax_scale >= 0.0f, "softmax_scale: expected >= 0, got ", p.softmax_scale);
  PDIFF_CHECK(p.page_size >= 0, "page_size: expected >= 0, got ", p.page_size);
  PDIFF_CHECK(p.num_slots >= 0, "num_slots: expected >= 0, got ", p.num_slots);
  PDIFF_CHECK(p.plan != nullptr, "plan: expected memory, got a null pointer");
  check_pointer("q", p.q, true);
  check_pointer("k", p.k, false);
  check_pointer("v", p.v, false);
  check_pointer("out", p.out, true);
  check_pointer("workspace", p.workspace, true);
}

}  // namespace

int64_t hybrid_attention_workspace_bytes(int32_t num_slots, int32_t num_heads_kv,
                                         int32_t head_dim) {
  return Workspace(num_slots, num_heads_kv, head_dim).num_bytes;
}

void hybrid_attention(const HybridAttentionParams& params, const CudaQueue& queue) {
  if (params.total_q == 0) return;
  check_params(params);
  constexpr float kLog2E = 1.44269504088896341f;
  const Workspace layout(params.num_slots, params.num_heads_kv, params.head_dim);
  auto* workspace = static_cast<unsigned char*>(params.workspace);
  auto* counters = reinterpret_cast<uint32_t*>(workspace);
  const int32_t group_size = params.num_heads_q / params.num_heads_kv;
  const ForwardParams forward{
      .plan = params.plan,
      .q = params.q,
      .k = params.k,
      .v = params.v,
      .out = params.out,
      .lse = params.lse,
      .q_bytes = token_bytes("q", params.q_stride),
      .k_bytes = token_bytes("k", params.k_stride),
      .v_bytes = token_bytes("v", params.v_stride),
      .k_page_bytes = page_bytes("k", params.k_page_stride),
      .v_page_bytes = page_bytes("v", params.v_page_stride),
      .total_q = params.total_q,
      .num_heads_kv = params.num_heads_kv,
      .group_size = group_size,
      .page_size = params.page_size,
      .by_group = Divider(group_size),
      .by_page = Divider(std::max(1, params.page_size)),
      // Not 0, so that -inf times it is -inf: a masked score.
      .scale = std::max(params.softmax_scale * kLog2E, FLT_MIN),
      .ticket = counters,
      .arrivals = counters + 1,
      .partial_out = reinterpret_cast<float*>(workspace + layout.partial_out),
      .partial_state = reinterpret_cast<float*>(workspace + layout.partial_state),
  };
  const DeviceGuard guard(queue.device_idx);
  set_zero(counters, layout.num_counters * static_cast<int64_t>(sizeof(uint32_t)), queue);
  if (cuda_kernels(queue.device_idx) == CudaKernels::kSm90a && sm90a::takes_forward(params)) {
    sm90a::launch_forward(params, forward, queue);
    return;
  }
  const bool is_bfloat16 = params.dtype == DType::kBFloat16;
  if (params.head_dim == 128) {
    (is_bfloat16 ? launch_forward<bfloat16, 128> : launch_forward<float16, 128>)(forward, queue);
  } else {
    (is_bfloat16 ? launch_forward<bfloat16, 64> : launch_forward<float16, 64>)(forward, queue);
  }
}

}  // namespace pdiff::cuda
