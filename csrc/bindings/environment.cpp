#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "bindings/bindings.h"
#include "pdiff/device.h"
#include "pdiff/isa.h"

namespace py = pybind11;

namespace pdiff::bindings {
namespace {

std::vector<std::string> built_isas() {
  std::vector<std::string> names;
  for (int i = 0; i < kNumIsas; ++i) {
    if (isa_built(static_cast<Isa>(i))) names.emplace_back(isa_name(static_cast<Isa>(i)));
  }
  return names;
}

py::dict cuda_device_dict(int device_idx) {
  const CudaDevice device = cuda_device(device_idx);
  py::dict result;
  result["name"] = device.name;
  result["compute_capability"] =
      py::make_tuple(device.compute_capability_major, device.compute_capability_minor);
  result["num_sms"] = device.num_sms;
  result["memory_bytes"] = device.memory_bytes;
  return result;
}

}  // namespace

void bind_environment(py::module_& m) {
  m.attr("__version__") = PDIFF_VERSION;
  m.attr("compiler") = PDIFF_COMPILER;
  m.attr("build_type") = PDIFF_BUILD_TYPE;
  m.attr("cuda_architectures") = PDIFF_CUDA_ARCHITECTURES;
  m.attr("built_with_cuda") = built_with_cuda();
  m.attr("emulates_cuda") = PDIFF_EMULATE_CUDA != 0;
#if defined(_OPENMP)
  m.attr("built_with_openmp") = true;
#else
  m.attr("built_with_openmp") = false;
#endif

  m.def("isa_built", &built_isas, "Names of the instruction sets in this build, lowest first.");
  m.def("isa_detected", [] { return isa_name(detected_isa()); });
  m.def("isa_selected", [] { return isa_name(selected_isa()); });
  m.def(
      "select_isa", [](const char* name) { select_isa(name); }, py::arg("name").none(true),
      "Lower the instruction set by name; None goes back to the default.");

  m.def("cuda_device_count", &cuda_device_count);
  m.def("cuda_unavailable_reason", &cuda_unavailable_reason);
  m.def("cuda_runtime_version", &cuda_runtime_version);
  m.def("cuda_device", &cuda_device_dict, py::arg("device_idx"));
  m.def("cuda_kernels", [](int device_idx) { return cuda_kernels_name(cuda_kernels(device_idx)); });
  m.def(
      "select_cuda_kernels", [](const char* name) { select_cuda_kernels(name); },
      py::arg("name").none(true), "portable or sm90a; None goes back to the default.");
  m.def("cuda_can_launch", &cuda_can_launch, py::arg("device_idx"));
}

}  // namespace pdiff::bindings
