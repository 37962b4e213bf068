#include <atomic>
#include <cstdlib>
#include <cstring>
#include <string>

#include "cuda/common/launch.h"
#include "pdiff/device.h"
#include "pdiff/error.h"

namespace pdiff {
namespace {

constexpr int kProbeAnswer = 42;

__global__ void probe_kernel(int* answer) { *answer = kProbeAnswer; }

// Count devices and forget the error, which would otherwise stay for the next caller to find.
cudaError_t count_devices(int* count) {
  *count = 0;
  const cudaError_t status = cudaGetDeviceCount(count);
  if (status != cudaSuccess) {
    *count = 0;
    (void)cudaGetLastError();
  }
  return status;
}

CudaKernels parse_kernels(const char* name, const char* source) {
  for (const CudaKernels kernels : {CudaKernels::kPortable, CudaKernels::kSm90a}) {
    if (std::strcmp(name, cuda_kernels_name(kernels)) == 0) return kernels;
  }
  detail::throw_error(source, ": expected portable or sm90a, got ", name);
}

CudaKernels default_kernels() {
  const char* name = std::getenv("PDIFF_CUDA_KERNELS");
  if (name == nullptr || name[0] == '\0') return CudaKernels::kPortable;
  return parse_kernels(name, "PDIFF_CUDA_KERNELS");
}

std::atomic<CudaKernels>& selection() {
  static std::atomic<CudaKernels> kernels{default_kernels()};
  return kernels;
}

}  // namespace

const char* cuda_kernels_name(CudaKernels kernels) {
  return kernels == CudaKernels::kSm90a ? "sm90a" : "portable";
}

void select_cuda_kernels(const char* name) {
  const bool reset = name == nullptr || name[0] == '\0';
  selection().store(reset ? default_kernels() : parse_kernels(name, "cuda_kernels"));
}

CudaKernels cuda_kernels(int device_idx) {
  const CudaKernels kernels = selection().load(std::memory_order_relaxed);
  if (kernels == CudaKernels::kPortable) return kernels;
  int major = 0, minor = 0;
  cuda::check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device_idx),
              "device_idx");
  cuda::check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device_idx),
              "device_idx");
  return major == 9 && minor == 0 ? kernels : CudaKernels::kPortable;
}

bool built_with_cuda() { return true; }

int cuda_device_count() {
  int count = 0;
  (void)count_devices(&count);
  return count;
}

const char* cuda_unavailable_reason() {
  int count = 0;
  const cudaError_t status = count_devices(&count);
  if (status != cudaSuccess) return cudaGetErrorString(status);
  return count > 0 ? "" : "no CUDA device";
}

int cuda_runtime_version() { return CUDART_VERSION / 10 * 10; }

CudaDevice cuda_device(int device_idx) {
  const int count = cuda_device_count();
  PDIFF_CHECK(device_idx >= 0 && device_idx < count, "device_idx: expected 0 to ", count - 1,
              ", got ", device_idx);
  cudaDeviceProp prop{};
  const cudaError_t status = cudaGetDeviceProperties(&prop, device_idx);
  PDIFF_CHECK(status == cudaSuccess, "device_idx ", device_idx, ": ", cudaGetErrorString(status));
  return CudaDevice{prop.name, prop.major, prop.minor, prop.multiProcessorCount,
                    static_cast<int64_t>(prop.totalGlobalMem)};
}

bool cuda_can_launch(int device_idx) {
  if (device_idx < 0 || device_idx >= cuda_device_count()) return false;
  const cuda::DeviceGuard guard(device_idx);
  int* answer = nullptr;
  if (cudaMalloc(&answer, sizeof(int)) != cudaSuccess) {
    (void)cudaGetLastError();
    return false;
  }
  int result = 0;
  cudaError_t status = cudaErrorUnknown;
  try {
    cuda::launch(probe_kernel, {"probe", 1, 1}, {device_idx, nullptr}, answer);
    status = cudaMemcpy(&result, answer, sizeof(int), cudaMemcpyDeviceToHost);
  } catch (const Error&) {  // no image for this device
  }
  (void)cudaFree(answer);
  (void)cudaGetLastError();
  return status == cudaSuccess && result == kProbeAnswer;
}

}  // namespace pdiff
