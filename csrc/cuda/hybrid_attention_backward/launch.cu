#include <cstdint>
#include <limits>

#include "cuda/common/launch.h"
#include "cuda/hybrid_attention_backward/config.h"
#include "pdiff/error.h"
#include "pdiff/hybrid_attention.h"

namespace pdiff::cuda {
namespace {

using attention_backward::launch_kernels;
using attention_backward::Problem;

constexpr int64_t kTicketBytes = 16;

void check_aligned(const char* name, const void* data, int64_t stride) {
  constexpr int64_t kMaxStride = int64_t{1} << 24;
  PDIFF_CHECK(reinterpret_cast<uintptr_t>(data) % 16 == 0, name,
              ": expected memory aligned to 16 bytes, got ", data);
  PDIFF_CHECK(stride >= 0 && stride % 8 == 0 && stride <= kMaxStride, name,
              ": expected rows aligned to 16 bytes, a stride that is a multiple of 8 and at most ",
              kMaxStride, ", got ", stride);
}

void check_params(const HybridAttentionBackwardParams& x) {
  PDIFF_CHECK(x.plan != nullptr, "plan: expected memory, got a null pointer");
  PDIFF_CHECK(x.dtype == DType::kBFloat16 || x.dtype == DType::kFloat16,
              "dtype: expected 1 (bfloat16) or 2 (float16), got ", static_cast<int32_t>(x.dtype));
  PDIFF_CHECK(x.head_dim == 64 || x.head_dim == 128, "head_dim: expected 64 or 128, got ",
              x.head_dim);
  PDIFF_CHECK(x.num_heads_kv > 0 && x.num_heads_q > 0 && x.num_heads_q % x.num_heads_kv == 0,
              "num_heads_q: expected a multiple of num_heads_kv (", x.num_heads_kv, "), got ",
              x.num_heads_q);
  const int32_t group_size = x.num_heads_q / x.num_heads_kv;
  PDIFF_CHECK(group_size <= kGpuTileRows, "num_heads_q: expected at most ", kGpuTileRows,
              " query heads for each of the ", x.num_heads_kv, " key heads, got ", group_size);
  // Packed rows and keys are counted in 32 bits, also a block past the last.
  constexpr int64_t kMaxRows = std::numeric_limits<int32_t>::max() - 2 * kGpuTileRows;
  PDIFF_CHECK(x.total_q >= 0 && x.total_q <= kMaxRows / x.num_heads_q,
              "q: expected at most 2^31 rows of tokens and heads, got ", x.total_q, " x ",
              x.num_heads_q);
  PDIFF_CHECK(x.total_kv >= 0 && x.total_kv <= kMaxRows, "k: expected at most 2^31 tokens, got ",
              x.total_kv);
  PDIFF_CHECK(x.softmax_scale >= 0.0f, "softmax_scale: expected >= 0, got ", x.softmax_scale);
  PDIFF_CHECK(x.total_q == 0 || (x.q != nullptr && x.out != nullptr && x.lse != nullptr &&
                                 x.dout != nullptr && x.dq != nullptr),
              "q, out, lse, dout, dq: expected memory, got a null pointer");
  PDIFF_CHECK(
      x.total_kv == 0 || (x.k != nullptr && x.v != nullptr && x.dk != nullptr && x.dv != nullptr),
      "k, v, dk, dv: expected memory, got a null pointer");
  check_aligned("q", x.q, x.q_stride);
  check_aligned("k", x.k, x.k_stride);
  check_aligned("v", x.v, x.v_stride);
  check_aligned("out", x.out, 0);
  check_aligned("dout", x.dout, 0);
  check_aligned("dq", x.dq, 0);
  check_aligned("dk", x.dk, 0);
  check_aligned("dv", x.dv, 0);
  PDIFF_CHECK(x.workspace != nullptr, "workspace: expected memory, got a null pointer");
  check_aligned("workspace", x.workspace, 0);
}

}  // namespace

int64_t hybrid_attention_backward_workspace_bytes(int64_t total_q, int32_t num_heads_q) {
  return kTicketBytes + 2 * total_q * num_heads_q * static_cast<int64_t>(sizeof(float));
}

bool hybrid_attention_backward_fits(int32_t head_dim, int device_idx) {
  using namespace attention_backward;
  const int64_t bytes =
      head_dim == 64 ? max_block_bytes<bfloat16, 64>() : max_block_bytes<bfloat16, 128>();
  return bytes <= max_shared_bytes(device_idx);
}

void hybrid_attention_backward(const HybridAttentionBackwardParams& params,
                               const CudaQueue& queue) {
  check_params(params);
  const int32_t group_size = params.num_heads_q / params.num_heads_kv;
  const int64_t group_elements = int64_t{group_size} * params.head_dim;
  const auto bytes = [](int64_t elements) { return static_cast<int32_t>(2 * elements); };
  Problem problem{.tensors = params,
                  .group_size = group_size,
                  .by_group = Divider(group_size),
                  .q_gap = bytes(params.q_stride - group_elements),
                  .dout_gap = bytes(int64_t{params.num_heads_q} * params.head_dim - group_elements),
                  .k_bytes = bytes(params.k_stride),
                  .v_bytes = bytes(params.v_stride),
                  .row_lse = nullptr,
                  .row_delta = nullptr,
                  .tickets = static_cast<int32_t*>(params.workspace)};
  problem.row_lse = static_cast<float*>(params.workspace) + kTicketBytes / sizeof(float);
  problem.row_delta = problem.row_lse + int64_t{params.total_q} * params.num_heads_q;

  const DeviceGuard guard(queue.device_idx);
  set_zero(problem.tickets, kTicketBytes, queue);
  const bool is_bfloat16 = params.dtype == DType::kBFloat16;
  if (params.head_dim == 64) {
    (is_bfloat16 ? launch_kernels<bfloat16, 64> : launch_kernels<float16, 64>)(problem, queue);
  } else {
    (is_bfloat16 ? launch_kernels<bfloat16, 128> : launch_kernels<float16, 128>)(problem, queue);
  }
}

}  // namespace pdiff::cuda
