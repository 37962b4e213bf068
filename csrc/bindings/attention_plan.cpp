#include "pdiff/attention_plan.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/tensor.h"

namespace py = pybind11;

namespace pdiff::bindings {
namespace {

AttentionPlan pack(const std::vector<const SpanLayout*>& layouts, int32_t num_heads_q,
                   int32_t num_heads_kv, int32_t head_dim, const Tensor& page_table,
                   int32_t page_size, bool for_gpu, bool split_keys, int32_t num_threads) {
  return AttentionPlan(layouts, {.num_heads_q = num_heads_q,
                                 .num_heads_kv = num_heads_kv,
                                 .head_dim = head_dim,
                                 .schedule = for_gpu ? Schedule::kGpu : Schedule::kCpu,
                                 .split_keys = split_keys,
                                 .num_threads = num_threads,
                                 .page_size = page_size,
                                 .page_table = page_table.as<const int32_t>("page_table"),
                                 .max_pages = page_table.is_none ? 0 : page_table.shape[1]});
}

#if PDIFF_WITH_CUDA
// The words and the bytes of workspace that a plan from tokens takes.
py::tuple plan_from_tokens_sizes(int64_t total_tokens, int64_t num_sequences, int64_t max_tags,
                                 int32_t num_heads_q, int32_t num_heads_kv, int32_t head_dim) {
  const PlanFromTokensParams params = {.token_ids = nullptr,
                                       .cu_seqlens = nullptr,
                                       .total_tokens = total_tokens,
                                       .num_sequences = num_sequences,
                                       .max_tags = max_tags,
                                       .tags = {},
                                       .isolate_spans = true,
                                       .num_heads_q = num_heads_q,
                                       .num_heads_kv = num_heads_kv,
                                       .head_dim = head_dim};
  return py::make_tuple(cuda::plan_from_tokens_words(params),
                        cuda::plan_from_tokens_workspace_bytes(params));
}

void plan_from_tokens_cuda(const Tensor& token_ids, const Tensor& cu_seqlens, int64_t max_tags,
                           int64_t async_start, int64_t async_end, int64_t sync, bool isolate_spans,
                           int32_t num_heads_q, int32_t num_heads_kv, int32_t head_dim,
                           const Tensor& words, const Tensor& workspace, int device_idx,
                           int64_t stream) {
  const PlanFromTokensParams params = {.token_ids = token_ids.as<const int64_t>("token_ids"),
                                       .cu_seqlens = cu_seqlens.as<const int32_t>("cu_seqlens"),
                                       .total_tokens = token_ids.num_elements(),
                                       .num_sequences = cu_seqlens.num_elements() - 1,
                                       .max_tags = max_tags,
                                       .tags = {async_start, async_end, sync},
                                       .isolate_spans = isolate_spans,
                                       .num_heads_q = num_heads_q,
                                       .num_heads_kv = num_heads_kv,
                                       .head_dim = head_dim};
  auto* const plan = words.as<int32_t>("words");
  const py::gil_scoped_release release;
  cuda::plan_from_tokens(params, plan, workspace.data,
                         {device_idx, reinterpret_cast<void*>(stream)});
}
#endif

}  // namespace

void bind_attention_plan(py::module_& m) {
  const auto header_field = [](int32_t PlanHeader::* field) {
    return [field](const AttentionPlan& plan) { return plan.header().*field; };
  };
  py::class_<AttentionPlan>(m, "AttentionPlan", py::buffer_protocol())
      .def(py::init(&pack), py::arg("layouts"), py::arg("num_heads_q"), py::arg("num_heads_kv"),
           py::arg("head_dim"), py::arg("page_table"), py::arg("page_size"), py::arg("for_gpu"),
           py::arg("split_keys"), py::arg("num_threads"))
      .def_buffer([](AttentionPlan& plan) {
        return py::buffer_info(const_cast<int32_t*>(plan.words()), plan.num_words());
      })
      .def_property_readonly("total_q", header_field(&PlanHeader::total_q))
      .def_property_readonly("total_kv", header_field(&PlanHeader::total_kv))
      .def_property_readonly("num_tiles", header_field(&PlanHeader::num_tiles))
      .def_property_readonly("tile_rows", header_field(&PlanHeader::tile_rows))
      .def_property_readonly("num_slots", header_field(&PlanHeader::num_slots))
      .def_property_readonly("num_key_tiles", header_field(&PlanHeader::num_key_tiles))
      .def_property_readonly("num_pages", header_field(&PlanHeader::num_pages));
#if PDIFF_WITH_CUDA
  m.def("plan_from_tokens_sizes", &plan_from_tokens_sizes);
  m.def("plan_from_tokens_cuda", &plan_from_tokens_cuda);
#endif
  m.attr("plan_error_word") = offsetof(PlanHeader, error) / sizeof(int32_t);
}

}  // namespace pdiff::bindings
