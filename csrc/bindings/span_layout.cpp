#include "pdiff/span_layout.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <tuple>
#include <vector>

#include "bindings/bindings.h"
#include "pdiff/error.h"

namespace py = pybind11;

namespace pdiff::bindings {
namespace {

using TokenIds = py::array_t<int64_t, py::array::c_style>;

// A read-only int32 view [size] or [size, sizeof(T) / 4] of `values`, which `owner` keeps alive.
template <typename T>
py::array int32_view(const std::vector<T>& values, const py::object& owner) {
  constexpr py::ssize_t width = sizeof(T) / sizeof(int32_t);
  std::vector<py::ssize_t> shape{static_cast<py::ssize_t>(values.size())};
  if (width > 1) shape.push_back(width);
  py::array view(py::dtype::of<int32_t>(), shape, values.data(), owner);
  view.attr("setflags")(py::arg("write") = false);
  return view;
}

template <typename T>
size_t size_bytes(const std::vector<T>& values) {
  return values.size() * sizeof(T);
}

SpanLayout from_tokens(const TokenIds& token_ids, int64_t async_start, int64_t async_end,
                       int64_t sync, bool isolate_spans) {
  PDIFF_CHECK(token_ids.ndim() == 1, "token_ids: expected 1 dimension, got ", token_ids.ndim());
  const int64_t* data = token_ids.data();
  const int64_t size = token_ids.size();
  py::gil_scoped_release release;
  return layout_from_tokens(data, size, {async_start, async_end, sync}, isolate_spans);
}

SpanLayout from_segments(int64_t num_keys, const std::vector<int64_t>& num_rows,
                         const std::vector<int32_t>& kind, const std::vector<int64_t>& interval_ptr,
                         const std::vector<int64_t>& intervals) {
  const size_t num_segments = num_rows.size();
  PDIFF_CHECK(kind.size() == num_segments && interval_ptr.size() == num_segments + 1,
              "segments: expected kind and interval_ptr for ", num_segments, " segments, got ",
              kind.size(), " and ", interval_ptr.size());
  PDIFF_CHECK(interval_ptr.front() == 0 &&
                  std::is_sorted(interval_ptr.begin(), interval_ptr.end()) &&
                  2 * interval_ptr.back() == static_cast<int64_t>(intervals.size()),
              "interval_ptr: expected 0 ascending to the ", intervals.size() / 2, " intervals");
  return layout_from_segments(num_keys, static_cast<int64_t>(num_segments), num_rows.data(),
                              kind.data(), interval_ptr.data(), intervals.data());
}

// The arguments of from_segments, and whether the layout is one of a token sequence.
using LayoutState = std::tuple<int64_t, std::vector<int64_t>, std::vector<int32_t>,
                               std::vector<int64_t>, std::vector<int64_t>, bool>;

LayoutState layout_state(const SpanLayout& layout) {
  std::vector<int64_t> num_rows, intervals;
  std::vector<int32_t> kind;
  for (const Segment& segment : layout.segments) {
    num_rows.push_back(segment.q_hi - segment.q_lo);
    kind.push_back(segment.kind);
  }
  for (const KeyInterval& interval : layout.intervals) {
    intervals.insert(intervals.end(), {interval.lo, interval.hi});
  }
  return {layout.num_keys,
          num_rows,
          kind,
          {layout.interval_ptr.begin(), layout.interval_ptr.end()},
          intervals,
          layout.is_token_sequence};
}

SpanLayout layout_of_state(const LayoutState& state) {
  const auto& [num_keys, num_rows, kind, interval_ptr, intervals, is_token_sequence] = state;
  SpanLayout layout = from_segments(num_keys, num_rows, kind, interval_ptr, intervals);
  layout.is_token_sequence = is_token_sequence;
  return layout;
}

py::array_t<bool> dense_mask(const SpanLayout& layout) {
  py::array_t<bool> mask({layout.num_rows, layout.num_keys});
  write_dense_mask(layout, reinterpret_cast<uint8_t*>(mask.mutable_data()));
  return mask;
}

}  // namespace

void bind_span_layout(py::module_& m) {
  py::class_<SpanLayout>(m, "SpanLayout")
      .def_static("from_tokens", &from_tokens, py::arg("token_ids"), py::arg("async_start"),
                  py::arg("async_end"), py::arg("sync"), py::arg("isolate_spans"))
      .def_static("from_segments", &from_segments, py::arg("num_keys"), py::arg("num_rows"),
                  py::arg("kind"), py::arg("interval_ptr"), py::arg("intervals"))
      .def_readonly("num_rows", &SpanLayout::num_rows)
      .def_readonly("num_keys", &SpanLayout::num_keys)
      .def_property_readonly("num_segments", &SpanLayout::num_segments)
      .def_property_readonly("segments",
                             [](const py::object& self) {
                               return int32_view(self.cast<SpanLayout&>().segments, self);
                             })
      .def_property_readonly("interval_ptr",
                             [](const py::object& self) {
                               return int32_view(self.cast<SpanLayout&>().interval_ptr, self);
                             })
      .def_property_readonly("intervals",
                             [](const py::object& self) {
                               return int32_view(self.cast<SpanLayout&>().intervals, self);
                             })
      .def_property_readonly("nbytes",
                             [](const SpanLayout& self) {
                               return size_bytes(self.segments) + size_bytes(self.interval_ptr) +
                                      size_bytes(self.intervals);
                             })
      .def("num_visible_pairs", &num_visible_pairs)
      .def("dense_mask", &dense_mask)
      .def("key_major", &key_major)
      .def(py::pickle(&layout_state, &layout_of_state));

  py::class_<KeyMajorLayout>(m, "KeyMajorLayout")
      .def_property_readonly("segments",
                             [](const py::object& self) {
                               return int32_view(self.cast<KeyMajorLayout&>().segments, self);
                             })
      .def_property_readonly("range_ptr",
                             [](const py::object& self) {
                               return int32_view(self.cast<KeyMajorLayout&>().range_ptr, self);
                             })
      .def_property_readonly("ranges",
                             [](const py::object& self) {
                               return int32_view(self.cast<KeyMajorLayout&>().ranges, self);
                             })
      .def_property_readonly("nbytes", [](const KeyMajorLayout& self) {
        return size_bytes(self.segments) + size_bytes(self.range_ptr) + size_bytes(self.ranges);
      });
}

}  // namespace pdiff::bindings
