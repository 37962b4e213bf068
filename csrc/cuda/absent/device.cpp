#include "pdiff/device.h"

#include "pdiff/error.h"

// Takes the place of ../device.cu in a build without CUDA.
namespace pdiff {

bool built_with_cuda() { return false; }
int cuda_device_count() { return 0; }
const char* cuda_unavailable_reason() { return "built without CUDA"; }
int cuda_runtime_version() { return 0; }
CudaDevice cuda_device(int) { detail::throw_error("built without CUDA"); }
bool cuda_can_launch(int) { return false; }

CudaKernels cuda_kernels(int) { return CudaKernels::kPortable; }
const char* cuda_kernels_name(CudaKernels) { return "portable"; }
void select_cuda_kernels(const char*) {}

}  // namespace pdiff
