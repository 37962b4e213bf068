#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "pdiff/device.h"
#include "pdiff/error.h"

namespace pdiff::cuda {

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) [[unlikely]] {
    (void)cudaGetLastError();  // or the caller's next call would find it
    detail::throw_error(what, ": ", cudaGetErrorString(status));
  }
}

/// Makes a device current, and puts the caller's back.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device_idx) {
    (void)cudaGetDevice(&previous_);
    if (previous_ != device_idx) check(cudaSetDevice(device_idx), "device_idx");
    device_idx_ = device_idx;
  }
  ~DeviceGuard() {
    if (previous_ != device_idx_) (void)cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0, device_idx_ = 0;
};

inline int num_sms(int device_idx) {
  int count = 0;
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device_idx), "device_idx");
  return count;
}

/// What one block may ask for.
inline int64_t max_shared_bytes(int device_idx) {
  int bytes = 0;
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device_idx),
        "device_idx");
  return bytes;
}

struct LaunchShape {
  const char* name;  // for messages
  int64_t num_blocks;
  int num_threads;
  int64_t shared_bytes = 0;
};

inline void set_zero(void* memory, int64_t num_bytes, const CudaQueue& queue) {
  check(cudaMemsetAsync(memory, 0, static_cast<size_t>(num_bytes),
                        static_cast<cudaStream_t>(queue.stream)),
        "memset");
}

/// Puts a kernel into a stream. Throws pdiff::Error if the device does not take it.
template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), const LaunchShape& shape, const CudaQueue& queue,
            Args&&... args) {
  constexpr int64_t kDefaultSharedBytes = 48 * 1024;
  if (shape.shared_bytes > kDefaultSharedBytes) {
    const cudaError_t status = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shape.shared_bytes));
    if (status != cudaSuccess) {
      (void)cudaGetLastError();
      detail::throw_error(shape.name, ": needs ", shape.shared_bytes,
                          " bytes of shared memory, which the device does not have for a block");
    }
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(shape.num_blocks));
  config.blockDim = dim3(static_cast<unsigned>(shape.num_threads));
  config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
  config.stream = static_cast<cudaStream_t>(queue.stream);
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...), shape.name);
}

}  // namespace pdiff::cuda
