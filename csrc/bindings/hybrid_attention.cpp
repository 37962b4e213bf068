#include "pdiff/hybrid_attention.h"

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "bindings/bindings.h"
#include "pdiff/error.h"

namespace py = pybind11;

namespace pdiff::bindings {
namespace {

// A tensor as Python hands it over: address, shape and strides in elements.
struct TensorArg {
  static constexpr int kMaxDims = 4;
  const char* name;
  void* data;
  int num_dims;
  int64_t shape[kMaxDims], strides[kMaxDims];

  TensorArg(const char* name, int64_t address, const py::tuple& shape_tuple,
            const py::tuple& strides_tuple)
      : name(name), data(reinterpret_cast<void*>(address)) {
    PDIFF_CHECK(shape_tuple.size() <= kMaxDims && shape_tuple.size() == strides_tuple.size(), name,
                ": expected 3 or 4 dimensions, got ", shape_tuple.size());
    num_dims = static_cast<int>(shape_tuple.size());
    for (int i = 0; i < num_dims; ++i) {
      shape[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(shape_tuple.ptr(), i));
      strides[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(strides_tuple.ptr(), i));
    }
  }

  std::string shape_text() const {
    std::string text = "[";
    for (int i = 0; i < num_dims; ++i) text += (i > 0 ? ", " : "") + std::to_string(shape[i]);
    return text + "]";
  }
};

// Heads and elements must lie together; tokens (and pages) may be any number of elements apart.
void check_rows(const TensorArg& x, int64_t num_heads, int64_t head_dim) {
  const int heads = x.num_dims - 2, element = x.num_dims - 1;
  const bool together = (x.strides[element] == 1 || head_dim == 1) &&
                        (x.strides[heads] == head_dim || num_heads == 1);
  PDIFF_CHECK(together || x.shape[0] == 0, x.name,
              ": expected contiguous heads and elements (strides ", head_dim, ", 1), got strides ",
              x.strides[heads], ", ", x.strides[element]);
}

void check_packed(const TensorArg& x, int64_t total, int64_t num_heads, int64_t head_dim) {
  PDIFF_CHECK(
      x.num_dims == 3 && x.shape[0] == total && x.shape[1] == num_heads && x.shape[2] == head_dim,
      x.name, ": expected [", total, ", ", num_heads, ", ", head_dim, "], got ", x.shape_text());
  check_rows(x, num_heads, head_dim);
}

void check_pages(const TensorArg& x, const PlanHeader& plan) {
  PDIFF_CHECK(x.num_dims == 4 && x.shape[0] >= plan.num_pages && x.shape[1] == plan.page_size &&
                  x.shape[2] == plan.num_heads_kv && x.shape[3] == plan.head_dim,
              x.name, ": expected [at least ", plan.num_pages, ", ", plan.page_size, ", ",
              plan.num_heads_kv, ", ", plan.head_dim, "], got ", x.shape_text());
  check_rows(x, plan.num_heads_kv, plan.head_dim);
}

void forward(int64_t plan_address, int64_t plan_words, int32_t dtype, int64_t q_address,
             const py::tuple& q_shape, const py::tuple& q_strides, int64_t k_address,
             const py::tuple& k_shape, const py::tuple& k_strides, int64_t v_address,
             const py::tuple& v_shape, const py::tuple& v_strides, int64_t out, int64_t lse,
             float softmax_scale, int num_threads) {
  const PlanView plan = view_plan(reinterpret_cast<const int32_t*>(plan_address), plan_words);
  const PlanHeader& h = plan.header;
  const TensorArg q("q", q_address, q_shape, q_strides);
  const TensorArg k("k", k_address, k_shape, k_strides);
  const TensorArg v("v", v_address, v_shape, v_strides);
  check_packed(q, h.total_q, h.num_heads_q, h.head_dim);
  const bool paged = h.page_size > 0;
  for (const TensorArg* x : {&k, &v}) {
    if (paged) {
      check_pages(*x, h);
    } else {
      check_packed(*x, h.total_kv, h.num_heads_kv, h.head_dim);
    }
  }
  const int token_dim = paged ? 1 : 0;
  const HybridAttentionParams params{.plan = plan,
                                     .dtype = static_cast<DType>(dtype),
                                     .q = q.data,
                                     .k = k.data,
                                     .v = v.data,
                                     .out = reinterpret_cast<void*>(out),
                                     .lse = reinterpret_cast<float*>(lse),
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

void backward(int64_t plan_address, int64_t plan_words, int32_t dtype, int64_t q_address,
              const py::tuple& q_shape, const py::tuple& q_strides, int64_t k_address,
              const py::tuple& k_shape, const py::tuple& k_strides, int64_t v_address,
              const py::tuple& v_shape, const py::tuple& v_strides, int64_t out, int64_t lse,
              int64_t dout, int64_t dlse, int64_t dq, int64_t dk, int64_t dv, float softmax_scale,
              int num_threads) {
  const PlanView plan = view_plan(reinterpret_cast<const int32_t*>(plan_address), plan_words);
  const PlanHeader& h = plan.header;
  const TensorArg q("q", q_address, q_shape, q_strides);
  const TensorArg k("k", k_address, k_shape, k_strides);
  const TensorArg v("v", v_address, v_shape, v_strides);
  PDIFF_CHECK(h.page_size == 0, "plan: expected packed keys, got a page table");
  check_packed(q, h.total_q, h.num_heads_q, h.head_dim);
  check_packed(k, h.total_kv, h.num_heads_kv, h.head_dim);
  check_packed(v, h.total_kv, h.num_heads_kv, h.head_dim);
  const HybridAttentionBackwardParams params{.plan = plan,
                                             .dtype = static_cast<DType>(dtype),
                                             .q = q.data,
                                             .k = k.data,
                                             .v = v.data,
                                             .out = reinterpret_cast<const void*>(out),
                                             .lse = reinterpret_cast<const float*>(lse),
                                             .dout = reinterpret_cast<const void*>(dout),
                                             .dlse = reinterpret_cast<const float*>(dlse),
                                             .dq = reinterpret_cast<void*>(dq),
                                             .dk = reinterpret_cast<void*>(dk),
                                             .dv = reinterpret_cast<void*>(dv),
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
void forward_cuda(int64_t plan, int32_t num_slots, int32_t dtype, int64_t q_address,
                  const py::tuple& q_shape, const py::tuple& q_strides, int64_t k_address,
                  const py::tuple& k_shape, const py::tuple& k_strides, int64_t v_address,
                  const py::tuple& v_shape, const py::tuple& v_strides, int64_t out, int64_t lse,
                  float softmax_scale, int64_t workspace, int device_idx, int64_t stream) {
  const TensorArg q("q", q_address, q_shape, q_strides);
  const TensorArg k("k", k_address, k_shape, k_strides);
  const TensorArg v("v", v_address, v_shape, v_strides);
  PDIFF_CHECK(q.num_dims == 3, "q: expected [total_q, num_heads_q, head_dim], got ",
              q.shape_text());
  PDIFF_CHECK(k.num_dims == 3 || k.num_dims == 4, "k: expected 3 or 4 dimensions, got ",
              k.shape_text());
  const bool paged = k.num_dims == 4;
  const int token_dim = paged ? 1 : 0;
  const int64_t head_dim = q.shape[2], num_heads_kv = k.shape[token_dim + 1];
  check_rows(q, q.shape[1], head_dim);
  for (const TensorArg* x : {&k, &v}) {
    const bool fits = x->num_dims == k.num_dims && x->shape[0] == k.shape[0] &&
                      x->shape[1] == k.shape[1] && x->shape[token_dim + 1] == num_heads_kv &&
                      x->shape[token_dim + 2] == head_dim;
    PDIFF_CHECK(fits, x->name, ": expected the shape of k and the head_dim of q (", head_dim,
                "), got ", x->shape_text());
    check_rows(*x, num_heads_kv, head_dim);
  }
  const cuda::HybridAttentionParams params{
      .plan = reinterpret_cast<const int32_t*>(plan),
      .num_slots = num_slots,
      .dtype = static_cast<DType>(dtype),
      .total_q = static_cast<int32_t>(q.shape[0]),
      .num_keys = k.shape[0],
      .num_heads_q = static_cast<int32_t>(q.shape[1]),
      .num_heads_kv = static_cast<int32_t>(num_heads_kv),
      .head_dim = static_cast<int32_t>(head_dim),
      .page_size = paged ? static_cast<int32_t>(k.shape[1]) : 0,
      .q = q.data,
      .k = k.data,
      .v = v.data,
      .out = reinterpret_cast<void*>(out),
      .lse = reinterpret_cast<float*>(lse),
      .q_stride = q.strides[0],
      .k_stride = k.strides[token_dim],
      .v_stride = v.strides[token_dim],
      .k_page_stride = paged ? k.strides[0] : 0,
      .v_page_stride = paged ? v.strides[0] : 0,
      .softmax_scale = softmax_scale,
      .workspace = reinterpret_cast<void*>(workspace)};
  py::gil_scoped_release release;
  cuda::hybrid_attention(params, {device_idx, reinterpret_cast<void*>(stream)});
}

void backward_cuda(int64_t plan, int32_t dtype, int64_t q_address, const py::tuple& q_shape,
                   const py::tuple& q_strides, int64_t k_address, const py::tuple& k_shape,
                   const py::tuple& k_strides, int64_t v_address, const py::tuple& v_shape,
                   const py::tuple& v_strides, int64_t out, int64_t lse, int64_t dout, int64_t dlse,
                   int64_t dq, int64_t dk, int64_t dv, float softmax_scale, int64_t workspace,
                   int device_idx, int64_t stream) {
  const TensorArg q("q", q_address, q_shape, q_strides);
  const TensorArg k("k", k_address, k_shape, k_strides);
  const TensorArg v("v", v_address, v_shape, v_strides);
  PDIFF_CHECK(q.num_dims == 3, "q: expected [total_q, num_heads_q, head_dim], got ",
              q.shape_text());
  PDIFF_CHECK(k.num_dims == 3, "plan: expected packed keys, got a page table");
  check_rows(q, q.shape[1], q.shape[2]);
  check_packed(k, k.shape[0], k.shape[1], q.shape[2]);
  check_packed(v, k.shape[0], k.shape[1], q.shape[2]);
  const cuda::HybridAttentionBackwardParams params{.plan = reinterpret_cast<const int32_t*>(plan),
                                                   .dtype = static_cast<DType>(dtype),
                                                   .total_q = static_cast<int32_t>(q.shape[0]),
                                                   .total_kv = static_cast<int32_t>(k.shape[0]),
                                                   .num_heads_q = static_cast<int32_t>(q.shape[1]),
                                                   .num_heads_kv = static_cast<int32_t>(k.shape[1]),
                                                   .head_dim = static_cast<int32_t>(q.shape[2]),
                                                   .q = q.data,
                                                   .k = k.data,
                                                   .v = v.data,
                                                   .out = reinterpret_cast<const void*>(out),
                                                   .lse = reinterpret_cast<const float*>(lse),
                                                   .dout = reinterpret_cast<const void*>(dout),
                                                   .dlse = reinterpret_cast<const float*>(dlse),
                                                   .dq = reinterpret_cast<void*>(dq),
                                                   .dk = reinterpret_cast<void*>(dk),
                                                   .dv = reinterpret_cast<void*>(dv),
                                                   .q_stride = q.strides[0],
                                                   .k_stride = k.strides[0],
                                                   .v_stride = v.strides[0],
                                                   .softmax_scale = softmax_scale,
                                                   .workspace = reinterpret_cast<void*>(workspace)};
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
