#include "pdiff/hybrid_attention.h"

#include <pybind11/pybind11.h>

#include <cstdint>
#include <utility>

#include "bindings/bindings.h"
#include "bindings/tensor.h"
#include "pdiff/error.h"

namespace py = pybind11;

namespace pdiff::bindings {
namespace {

// Heads and elements must lie together; tokens (and pages) may be any number of elements apart.
void check_rows(const char* name, const Tensor& x, int64_t num_heads, int64_t head_dim) {
  const int heads = x.num_dims - 2, element = x.num_dims - 1;
  const bool together = (x.strides[element] == 1 || head_dim == 1) &&
                        (x.strides[heads] == head_dim || num_heads == 1);
  PDIFF_CHECK(together || x.shape[0] == 0, name,
              ": expected contiguous heads and elements (strides ", head_dim, ", 1), got strides ",
              x.strides[heads], ", ", x.strides[element]);
}

void check_packed(const char* name, const Tensor& x, int64_t total, int64_t num_heads,
                  int64_t head_dim) {
  PDIFF_CHECK(
      x.num_dims == 3 && x.shape[0] == total && x.shape[1] == num_heads && x.shape[2] == head_dim,
      name, ": expected [", total, ", ", num_heads, ", ", head_dim, "], got ", x.shape_text());
  check_rows(name, x, num_heads, head_dim);
}

void check_pages(const char* name, const Tensor& x, const PlanHeader& plan) {
  PDIFF_CHECK(x.num_dims == 4 && x.shape[0] >= plan.num_pages && x.shape[1] == plan.page_size &&
                  x.shape[2] == plan.num_heads_kv && x.shape[3] == plan.head_dim,
              name, ": expected [at least ", plan.num_pages, ", ", plan.page_size, ", ",
              plan.num_heads_kv, ", ", plan.head_dim, "], got ", x.shape_text());
  check_rows(name, x, plan.num_heads_kv, plan.head_dim);
}

// The one element type of all three, which are on the CPU.
DType checked_dtype(const Tensor& q, const Tensor& k, const Tensor& v) {
  PDIFF_CHECK(q.is_on_cpu() && k.is_on_cpu() && v.is_on_cpu(),
              "q, k, v: expected tensors on cpu, with memory of their own");
  const auto is_as_q = [&](const Tensor& x) { return x.type == q.type && x.bits == q.bits; };
  PDIFF_CHECK(is_as_q(k) && is_as_q(v),
              "q, k, v: expected float32, bfloat16 or float16, all the same, got ", q.type_text(),
              ", ", k.type_text(), ", ", v.type_text());
  return q.dtype("q");
}

PlanView view_words(const Tensor& plan) {
  return view_plan(plan.as<const int32_t>("plan"), plan.num_elements());
}

void forward(const Tensor& plan_words, const Tensor& q, const Tensor& k, const Tensor& v,
             const Tensor& out, const Tensor& lse, float softmax_scale, int num_threads) {
  const DType dtype = checked_dtype(q, k, v);
  const PlanView plan = view_words(plan_words);
  const PlanHeader& h = plan.header;
  check_packed("q", q, h.total_q, h.num_heads_q, h.head_dim);
  const bool paged = h.page_size > 0;
  for (const auto& [name, x] : {std::pair{"k", &k}, std::pair{"v", &v}}) {
    if (paged) {
      check_pages(name, *x, h);
    } else {
      check_packed(name, *x, h.total_kv, h.num_heads_kv, h.head_dim);
    }
  }
  const int token_dim = paged ? 1 : 0;
  const HybridAttentionParams params{.plan = plan,
                                     .dtype = dtype,
                                     .q = q.data,
                                     .k = k.data,
                                     .v = v.data,
                                     .out = out.data,
                                     .lse = lse.as<float>("lse", q.shape[0] * q.shape[1]),
                                     .q_stride = q.strides[0],
                                     .k_stride = k.strides[token_dim],
                                     .v_stride = v.strides[token_dim],
                                     .k_page_stride = paged ? k.strides[0] : 0,
                                     .v_page_stride = paged ? v.strides[0] : 0,
                                     .softmax_scale = softmax_scale,
                                     .num_threads = num_threads};
  py::gil_scoped_release release;
  hybrid_attention(params);
}

void backward(const Tensor& plan_words, const Tensor& q, const Tensor& k, const Tensor& v,
              const Tensor& out, const Tensor& lse, const Tensor& dout, const Tensor& dlse,
              const Tensor& dq, const Tensor& dk, const Tensor& dv, float softmax_scale,
              int num_threads) {
  const DType dtype = checked_dtype(q, k, v);
  const PlanView plan = view_words(plan_words);
  const PlanHeader& h = plan.header;
  PDIFF_CHECK(h.page_size == 0, "plan: expected packed keys, got a page table");
  check_packed("q", q, h.total_q, h.num_heads_q, h.head_dim);
  check_packed("k", k, h.total_kv, h.num_heads_kv, h.head_dim);
  check_packed("v", v, h.total_kv, h.num_heads_kv, h.head_dim);
  const HybridAttentionBackwardParams params{
      .plan = plan,
      .dtype = dtype,
      .q = q.data,
      .k = k.data,
      .v = v.data,
      .out = out.data,
      .lse = lse.as<const float>("lse", q.shape[0] * q.shape[1]),
      .dout = dout.data,
      .dlse = dlse.as<const float>("dlse", q.shape[0] * q.shape[1]),
      .dq = dq.data,
      .dk = dk.data,
      .dv = dv.data,
      .q_stride = q.strides[0],
      .k_stride = k.strides[0],
      .v_stride = v.strides[0],
      .softmax_scale = softmax_scale,
      .num_threads = num_threads};
  py::gil_scoped_release release;
  hybrid_attention_backward(params);
}

#if PDIFF_WITH_CUDA
// Sizes come from the tensors: the plan is in device memory.
void forward_cuda(const Tensor& plan, int32_t num_slots, const Tensor& q, const Tensor& k,
                  const Tensor& v, const Tensor& out, const Tensor& lse, float softmax_scale,
                  const Tensor& workspace, int device_idx, int64_t stream) {
  PDIFF_CHECK(q.num_dims == 3, "q: expected [total_q, num_heads_q, head_dim], got ",
              q.shape_text());
  PDIFF_CHECK(k.num_dims == 3 || k.num_dims == 4, "k: expected 3 or 4 dimensions, got ",
              k.shape_text());
  const bool paged = k.num_dims == 4;
  const int token_dim = paged ? 1 : 0;
  const int64_t head_dim = q.shape[2], num_heads_kv = k.shape[token_dim + 1];
  check_rows("q", q, q.shape[1], head_dim);
  for (const auto& [name, x] : {std::pair{"k", &k}, std::pair{"v", &v}}) {
    const bool fits = x->num_dims == k.num_dims && x->shape[0] == k.shape[0] &&
                      x->shape[1] == k.shape[1] && x->shape[token_dim + 1] == num_heads_kv &&
                      x->shape[token_dim + 2] == head_dim;
    PDIFF_CHECK(fits, name, ": expected the shape of k and the head_dim of q (", head_dim,
                "), got ", x->shape_text());
    check_rows(name, *x, num_heads_kv, head_dim);
  }
  const cuda::HybridAttentionParams params{
      .plan = plan.as<const int32_t>("plan"),
      .num_slots = num_slots,
      .dtype = q.dtype("q"),
      .total_q = static_cast<int32_t>(q.shape[0]),
      .num_keys = k.shape[0],
      .num_heads_q = static_cast<int32_t>(q.shape[1]),
      .num_heads_kv = static_cast<int32_t>(num_heads_kv),
      .head_dim = static_cast<int32_t>(head_dim),
      .page_size = paged ? static_cast<int32_t>(k.shape[1]) : 0,
      .q = q.data,
      .k = k.data,
      .v = v.data,
      .out = out.data,
      .lse = lse.as<float>("lse", q.shape[0] * q.shape[1]),
      .q_stride = q.strides[0],
      .k_stride = k.strides[token_dim],
      .v_stride = v.strides[token_dim],
      .k_page_stride = paged ? k.strides[0] : 0,
      .v_page_stride = paged ? v.strides[0] : 0,
      .softmax_scale = softmax_scale,
      .workspace = workspace.data};
  py::gil_scoped_release release;
  cuda::hybrid_attention(params, {device_idx, reinterpret_cast<void*>(stream)});
}

void backward_cuda(const Tensor& plan, const Tensor& q, const Tensor& k, const Tensor& v,
                   const Tensor& out, const Tensor& lse, const Tensor& dout, const Tensor& dlse,
                   const Tensor& dq, const Tensor& dk, const Tensor& dv, float softmax_scale,
                   const Tensor& workspace, int device_idx, int64_t stream) {
  PDIFF_CHECK(q.num_dims == 3, "q: expected [total_q, num_heads_q, head_dim], got ",
              q.shape_text());
  PDIFF_CHECK(k.num_dims == 3, "plan: expected packed keys, got a page table");
  check_rows("q", q, q.shape[1], q.shape[2]);
  check_packed("k", k, k.shape[0], k.shape[1], q.shape[2]);
  check_packed("v", v, k.shape[0], k.shape[1], q.shape[2]);
  const cuda::HybridAttentionBackwardParams params{
      .plan = plan.as<const int32_t>("plan"),
      .dtype = q.dtype("q"),
      .total_q = static_cast<int32_t>(q.shape[0]),
      .total_kv = static_cast<int32_t>(k.shape[0]),
      .num_heads_q = static_cast<int32_t>(q.shape[1]),
      .num_heads_kv = static_cast<int32_t>(k.shape[1]),
      .head_dim = static_cast<int32_t>(q.shape[2]),
      .q = q.data,
      .k = k.data,
      .v = v.data,
      .out = out.data,
      .lse = lse.as<const float>("lse", q.shape[0] * q.shape[1]),
      .dout = dout.data,
      .dlse = dlse.as<const float>("dlse", q.shape[0] * q.shape[1]),
      .dq = dq.data,
      .dk = dk.data,
      .dv = dv.data,
      .q_stride = q.strides[0],
      .k_stride = k.strides[0],
      .v_stride = v.strides[0],
      .softmax_scale = softmax_scale,
      .workspace = workspace.data};
  py::gil_scoped_release release;
  cuda::hybrid_attention_backward(params, {device_idx, reinterpret_cast<void*>(stream)});
}
#endif

}  // namespace

void bind_hybrid_attention(py::module_& m) {
  m.def("hybrid_attention", &forward);
  m.def("hybrid_attention_backward", &backward);
#if PDIFF_WITH_CUDA
  m.def("hybrid_attention_workspace_bytes", &cuda::hybrid_attention_workspace_bytes);
  m.def("hybrid_attention_cuda", &forward_cuda);
  m.def("hybrid_attention_backward_workspace_bytes",
        &cuda::hybrid_attention_backward_workspace_bytes);
  m.def("hybrid_attention_backward_fits", &cuda::hybrid_attention_backward_fits);
  m.def("hybrid_attention_backward_cuda", &backward_cuda);
#endif
}

}  // namespace pdiff::bindings
