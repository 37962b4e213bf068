#include "pdiff/rms_norm.h"

#include "bindings/bindings.h"
#include "bindings/tensor.h"

namespace py = pybind11;

namespace pdiff::bindings {
namespace {

void rms_norm(const Tensor& x, const Tensor& weight, const Tensor& out, float eps,
              int num_threads) {
  PDIFF_CHECK(x.num_dims == 2, "x: expected [rows, size], got ", x.shape_text());
  PDIFF_CHECK(weight.num_elements() == x.shape[1], "weight: expected ", x.shape[1],
              " elements, got ", weight.shape_text());
  const RmsNormParams params{.x = x.data,
                             .weight = weight.data,
                             .out = out.data,
                             .dtype = x.dtype("x"),
                             .x_stride = x.strides[0],
                             .num_rows = x.shape[0],
                             .size = x.shape[1],
                             .eps = eps,
                             .num_threads = num_threads};
  const py::gil_scoped_release release;
  cpu::rms_norm(params);
}

}  // namespace

void bind_rms_norm(py::module_& m) { m.def("rms_norm", &rms_norm); }

}  // namespace pdiff::bindings
