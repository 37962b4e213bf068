#include "pdiff/swiglu.h"

#include "bindings/address.h"
#include "bindings/bindings.h"

namespace py = pybind11;

namespace pdiff::bindings {
namespace {

void swiglu(std::uintptr_t gate, std::uintptr_t up, std::uintptr_t out, int dtype,
            int64_t gate_stride, int64_t up_stride, int64_t num_rows, int64_t size,
            int num_threads) {
  const py::gil_scoped_release release;
  cpu::swiglu({.gate = address<const void>(gate),
               .up = address<const void>(up),
               .out = address<void>(out),
               .dtype = static_cast<DType>(dtype),
               .gate_stride = gate_stride,
               .up_stride = up_stride,
               .num_rows = num_rows,
               .size = size,
               .num_threads = num_threads});
}

}  // namespace

void bind_swiglu(py::module_& m) { m.def("swiglu", &swiglu, "pdiff/swiglu.h; addresses as ints."); }

}  // namespace pdiff::bindings
