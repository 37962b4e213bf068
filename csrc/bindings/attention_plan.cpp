#include "pdiff/attention_plan.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <vector>

#include "bindings/bindings.h"

namespace py = pybind11;

namespace pdiff::bindings {
namespace {

AttentionPlan pack(const std::vector<const SpanLayout*>& layouts, int32_t num_heads_q,
                   int32_t num_heads_kv, int32_t head_dim, int64_t page_table, int64_t max_pages,
                   int32_t page_size, bool for_gpu, bool split_keys, int32_t num_threads) {
  return AttentionPlan(layouts, {.num_heads_q = num_heads_q,
                                 .num_heads_kv = num_heads_kv,
                                 .head_dim = head_dim,
                                 .schedule = for_gpu ? Schedule::kGpu : Schedule::kCpu,
                                 .split_keys = split_keys,
                                 .num_threads = num_threads,
                                 .page_size = page_size,
                                 .page_table = reinterpret_cast<const int32_t*>(page_table),
                                 .max_pages = max_pages});
}

}  // namespace

void bind_attention_plan(py::module_& m) {
  const auto header_field = [](int32_t PlanHeader::* field) {
    return [field](const AttentionPlan& plan) { return plan.header().*field; };
  };
  py::class_<AttentionPlan>(m, "AttentionPlan", py::buffer_protocol())
      .def(py::init(&pack), py::arg("layouts"), py::arg("num_heads_q"), py::arg("num_heads_kv"),
           py::arg("head_dim"), py::arg("page_table"), py::arg("max_pages"), py::arg("page_size"),
           py::arg("for_gpu"), py::arg("split_keys"), py::arg("num_threads"))
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
}

}  // namespace pdiff::bindings
