#pragma once

#include <cstdint>

#include "pdiff/attention_plan.h"
#include "pdiff/device.h"
#include "pdiff/dtype.h"

namespace pdiff {

/// Hybrid attention: causal over prompt and plan; a span sees both and all of itself, and other
/// spans only after sync. Which row sees which key is the plan's; the kernel only walks it.
/// Keys      packed [total_kv, num_heads_kv, head_dim], or pages of page_size tokens when the plan
///           has a page table: token slot of a sequence's key i is pages[i / page_size].
/// Numerics  scores, softmax and sums in float; `lse` is natural log.
/// Empty     a row that sees no key gets out = 0 and lse = -inf.
/// Bits      a row's result depends on its query and the keys it sees, not on the batch, on how a
///           sequence is split over calls, or on the number of threads.
struct HybridAttentionParams {
  PlanView plan;
  DType dtype = DType::kFloat32;  // of q, k, v, out
  const void* q = nullptr;        // [total_q, num_heads_q, head_dim]
  const void* k = nullptr;        // [total_kv | num_pages, page_size, num_heads_kv, head_dim]
  const void* v = nullptr;        // as k
  void* out = nullptr;            // [total_q, num_heads_q, head_dim], contiguous
  float* lse = nullptr;           // [num_heads_q, total_q]; may be null
  int64_t q_stride = 0, k_stride = 0, v_stride = 0;  // elements from token to token
  int64_t k_page_stride = 0, v_page_stride = 0;      // elements from page to page
  float softmax_scale = 1.0f;                        // not negative
  int num_threads = 1;
};

void hybrid_attention(const HybridAttentionParams& params);  // throws pdiff::Error

/// Gradients of q, k, v; packed keys only, deterministic.
/// Task   one sequence and one KV head, or one query head where the sequence is long. It walks the
///        query tiles as the forward does, keeps dq of the tile at hand and adds to dk and dv; the
///        parts that several query heads of a KV head leave are added in order of the heads.
struct HybridAttentionBackwardParams {
  PlanView plan;
  DType dtype = DType::kFloat32;  // of q, k, v, out, dout, dq, dk, dv
  const void* q = nullptr;        // [total_q, num_heads_q, head_dim]
  const void* k = nullptr;        // [total_kv, num_heads_kv, head_dim]
  const void* v = nullptr;        // [total_kv, num_heads_kv, head_dim]
  const void* out = nullptr;      // [total_q, num_heads_q, head_dim], contiguous
  const float* lse = nullptr;     // [num_heads_q, total_q]
  const void* dout = nullptr;     // [total_q, num_heads_q, head_dim], contiguous
  const float* dlse = nullptr;    // [num_heads_q, total_q]; may be null
  void* dq = nullptr;             // [total_q, num_heads_q, head_dim], contiguous
  void* dk = nullptr;             // [total_kv, num_heads_kv, head_dim], contiguous
  void* dv = nullptr;             // [total_kv, num_heads_kv, head_dim], contiguous
  int64_t q_stride = 0, k_stride = 0, v_stride = 0;  // elements from token to token
  float softmax_scale = 1.0f;
  int num_threads = 1;
};

void hybrid_attention_backward(const HybridAttentionBackwardParams& params);  // throws pdiff::Error

namespace cuda {

/// The forward on a GPU. All pointers are to memory of the device, aligned to 16 bytes, strides a
/// multiple of 8 elements. What it takes from the plan it reads on the device, so that a captured
/// graph may run again after other words, of the same number of heads and at most as many slots,
/// were put in their place.
struct HybridAttentionParams {
  const int32_t* plan = nullptr;   // [num_words], of Schedule::kGpu
  int32_t num_slots = 0;           // the plan's, or more
  DType dtype = DType::kBFloat16;  // of q, k, v, out: kBFloat16 or kFloat16
  int32_t total_q = 0;             // rows of q, out and lse
  int64_t num_keys = 0;            // rows of k and v: total_kv, or num_pages
  int32_t num_heads_q = 0, num_heads_kv = 0;
  int32_t head_dim = 0;     // 64 or 128
  int32_t page_size = 0;    // 0: packed keys
  const void* q = nullptr;  // [total_q, num_heads_q, head_dim]
  const void* k = nullptr;  // [total_kv | num_pages, page_size, num_heads_kv, head_dim]
  const void* v = nullptr;  // as k
  void* out = nullptr;      // [total_q, num_heads_q, head_dim], contiguous
  float* lse = nullptr;     // [num_heads_q, total_q]; may be null
  int64_t q_stride = 0, k_stride = 0, v_stride = 0;  // elements from token to token
  int64_t k_page_stride = 0, v_page_stride = 0;      // elements from page to page
  float softmax_scale = 1.0f;                        // not negative
  void* workspace = nullptr;                         // [hybrid_attention_workspace_bytes]
};

/// Memory that one call of the forward needs beside its tensors, of any content.
int64_t hybrid_attention_workspace_bytes(int32_t num_slots, int32_t num_heads_kv, int32_t head_dim);

/// Throws pdiff::Error on an unsupported shape.
void hybrid_attention(const HybridAttentionParams& params, const CudaQueue& queue);

/// The backward on a GPU; memory, alignment and plan as for the forward, packed keys only.
/// Work   one kernel goes through the rows that see a tile of keys and sums dk and dv, another
///        through the keys that a tile of rows sees and sums dq; each works out the weights anew.
/// Bits   nothing is added up between blocks: a sequence's gradients do not depend on the batch.
struct HybridAttentionBackwardParams {
  const int32_t* plan = nullptr;   // [num_words], of Schedule::kGpu
  DType dtype = DType::kBFloat16;  // of q, k, v, out, dout, dq, dk, dv: kBFloat16 or kFloat16
  int32_t total_q = 0, total_kv = 0;
  int32_t num_heads_q = 0, num_heads_kv = 0;
  int32_t head_dim = 0;         // 64 or 128
  const void* q = nullptr;      // [total_q, num_heads_q, head_dim]
  const void* k = nullptr;      // [total_kv, num_heads_kv, head_dim]
  const void* v = nullptr;      // [total_kv, num_heads_kv, head_dim]
  const void* out = nullptr;    // [total_q, num_heads_q, head_dim], contiguous
  const float* lse = nullptr;   // [num_heads_q, total_q]
  const void* dout = nullptr;   // [total_q, num_heads_q, head_dim], contiguous
  const float* dlse = nullptr;  // [num_heads_q, total_q]; may be null
  void* dq = nullptr;           // [total_q, num_heads_q, head_dim], contiguous
  void* dk = nullptr;           // [total_kv, num_heads_kv, head_dim], contiguous
  void* dv = nullptr;           // [total_kv, num_heads_kv, head_dim], contiguous
  int64_t q_stride = 0, k_stride = 0, v_stride = 0;  // elements from token to token
  float softmax_scale = 1.0f;                        // not negative
  void* workspace = nullptr;                         // [hybrid_attention_backward_workspace_bytes]
};

int64_t hybrid_attention_backward_workspace_bytes(int64_t total_q, int32_t num_heads_q);

/// Whether a device has the shared memory that a block asks for.
bool hybrid_attention_backward_fits(int32_t head_dim, int device_idx);

/// Throws pdiff::Error on an unsupported shape.
void hybrid_attention_backward(const HybridAttentionBackwardParams& params, const CudaQueue& queue);

}  // namespace cuda

}  // namespace pdiff
