#include "pdiff/page_allocator.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "bindings/bindings.h"
#include "pdiff/error.h"

namespace py = pybind11;

namespace pdiff::bindings {
namespace {

using PageTokens = py::array_t<int64_t, py::array::c_style>;

// No wrong argument: a caller may wait, or take pages from someone else.
struct OutOfPagesError : std::runtime_error {
  OutOfPagesError(int64_t count, int64_t num_free)
      : std::runtime_error("pages: " + std::to_string(count) + " asked for, " +
                           std::to_string(num_free) + " free") {}
};

std::vector<int64_t> allocate(PageAllocator& self, int64_t count) {
  auto pages = self.allocate(count);
  if (!pages) throw OutOfPagesError(count, self.num_free());
  return *std::move(pages);
}

void check_one_dimension(const PageTokens& tokens) {
  PDIFF_CHECK(tokens.ndim() == 1, "tokens: expected 1 dimension, got ", tokens.ndim());
}

int64_t publish(PageAllocator& self, int64_t page, int64_t parent, const PageTokens& tokens) {
  check_one_dimension(tokens);
  return self.publish(page, parent, tokens.data(), tokens.size());
}

std::optional<std::pair<int64_t, int64_t>> find(const PageAllocator& self, int64_t parent,
                                                const PageTokens& tokens) {
  check_one_dimension(tokens);
  const auto found = self.find(parent, tokens.data(), tokens.size());
  if (!found) return std::nullopt;
  return std::pair{found->page, found->serial};
}

void check_integrity(const PageAllocator& self) {
  try {
    self.check_integrity();
  } catch (const Error& error) {
    throw std::runtime_error(error.what());  // no wrong argument: not a ValueError
  }
}

}  // namespace

void bind_page_allocator(py::module_& m) {
  py::register_local_exception<OutOfPagesError>(m, "OutOfPagesError", PyExc_RuntimeError).doc() =
      "More pages were asked for than are free.";
  py::class_<PageAllocator>(m, "PageAllocator",
                            "Who holds which page, and which pages hold prefixes to find again.")
      .def(py::init<int64_t>(), py::arg("num_pages"))
      .def_property_readonly("num_pages", &PageAllocator::num_pages, "Pages in all.")
      .def_property_readonly("num_free", &PageAllocator::num_free, "Pages that nobody holds.")
      .def_property_readonly("num_cached", &PageAllocator::num_cached,
                             "Pages in the prefix cache, held or not.")
      .def_property_readonly("num_evictions", &PageAllocator::num_evictions,
                             "Entries that had to leave the cache for allocations so far.")
      .def("allocate", &allocate, py::arg("count"), "Take pages, with one reference each.")
      .def("retain", &PageAllocator::retain, py::arg("pages"), "Add one reference to each page.")
      .def("release", &PageAllocator::release, py::arg("pages"),
           "Drop one reference of each page; pages in the order of positions.")
      .def("reference_count", &PageAllocator::reference_count, py::arg("page"),
           "How often a page is held.")
      .def("publish", &publish, py::arg("page"), py::arg("parent"), py::arg("tokens"),
           "Enter a held page into the prefix cache; its serial, or 0 where its key is taken.")
      .def("find", &find, py::arg("parent"), py::arg("tokens"),
           "(page, serial) of the entry with this key, or None.")
      .def("clear_cache", &PageAllocator::clear_cache, "Take every page out of the prefix cache.")
      .def("check_integrity", &check_integrity, "Raise RuntimeError if the books do not agree.");
}

}  // namespace pdiff::bindings
