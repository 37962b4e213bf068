#include "pdiff/rms_norm.h"

#include "bindings/address.h"
#include "bindings/bindings.h"

namespace py = pybind11;

namespace pdiff::bindings {
namespace {

void rms_norm(std::uintptr_t x, std::uintptr_t weight, std::uintptr_t out, int dtype,
              int64_t x_stride, int64_t num_rows, int64_t size, float eps, int num_threads) {
  const py::gil_scoped_release release;
  cpu::rms_norm({.x = address<const void>(x),
                 .weight = address<const void>(weight),
                 .out = address<void>(out),
                 .dtype = static_cast<DType>(dtype),
                 .x_stride = x_stride,
                 .num_rows = num_rows,
                 .size = size,
                 .eps = eps,
                 .num_threads = num_threads});
}

}  // namespace

void bind_rms_norm(py::module_& m) {
  m.def("rms_norm", &rms_norm, "pdiff/rms_norm.h; addresses as ints.");
}

}  // namespace pdiff::bindings
