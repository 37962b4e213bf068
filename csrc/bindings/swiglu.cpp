#include "pdiff/swiglu.h"

#include "bindings/bindings.h"
#include "bindings/tensor.h"

namespace py = pybind11;

namespace pdiff::bindings {
namespace {

void swiglu(const Tensor& gate, const Tensor& up, const Tensor& out, int num_threads) {
  PDIFF_CHECK(gate.num_dims == 2 && up.num_dims == 2, "gate, up: expected [rows, size], got ",
              gate.shape_text(), ", ", up.shape_text());
  const SwigluParams params{.gate = gate.data,
                            .up = up.data,
                            .out = out.data,
                            .dtype = gate.dtype("gate"),
                            .gate_stride = gate.strides[0],
                            .up_stride = up.strides[0],
                            .num_rows = gate.shape[0],
                            .size = gate.shape[1],
                            .num_threads = num_threads};
  const py::gil_scoped_release release;
  cpu::swiglu(params);
}

}  // namespace

void bind_swiglu(py::module_& m) { m.def("swiglu", &swiglu); }

}  // namespace pdiff::bindings
