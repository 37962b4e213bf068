#pragma once

#include <cstdint>
#include <string>

/// What CUDA offers to this process. Every function is safe without a driver: the count is then 0.
namespace pdiff {

struct CudaDevice {
  std::string name;
  int compute_capability_major;
  int compute_capability_minor;
  int num_sms;
  int64_t memory_bytes;
};

/// Where a kernel is put. The call returns at once; what goes wrong on the device shows up later.
struct CudaQueue {
  int device_idx = 0;
  void* stream = nullptr;  // cudaStream_t
};

bool built_with_cuda();
int cuda_device_count();
const char* cuda_unavailable_reason();   // "" when a device can be used
int cuda_runtime_version();              // 13000 for 13.0; 0 when built without CUDA
CudaDevice cuda_device(int device_idx);  // throws pdiff::Error on an index past the count
bool cuda_can_launch(int device_idx);    // runs one tiny kernel and reads its result back

/// Kernels that exist twice: for every GPU, and for Hopper's own instructions. Default: portable,
/// or what PDIFF_CUDA_KERNELS names; a device of another architecture always gets the portable
/// ones.
enum class CudaKernels : int { kPortable = 0, kSm90a = 1 };

CudaKernels cuda_kernels(int device_idx);  // throws on an unknown name in PDIFF_CUDA_KERNELS
const char* cuda_kernels_name(CudaKernels kernels);  // "portable", "sm90a"
void select_cuda_kernels(const char* name);          // nullptr or "": the default again

}  // namespace pdiff
