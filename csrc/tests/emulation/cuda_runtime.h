#pragma once

// What kernels and their launches use of CUDA's own header, for the machine of machine.h.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "machine.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) alignas(bytes)
#define __shared__ static_assert(false, "use shared_memory()")

// Of the thread that runs; an axis reads as an unsigned.
template <::pdiff::emulation::Dim (*kDim)()>
struct PdiffIndex {
  struct X {
    operator unsigned() const { return kDim().x; }
  } x;
};
inline constexpr PdiffIndex<::pdiff::emulation::thread_idx> threadIdx{};
inline constexpr PdiffIndex<::pdiff::emulation::block_idx> blockIdx{};
inline constexpr PdiffIndex<::pdiff::emulation::block_dim> blockDim{};
inline constexpr PdiffIndex<::pdiff::emulation::grid_dim> gridDim{};

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// Threads.

inline void __syncthreads() {
  ::pdiff::emulation::barrier(0, static_cast<int>(unsigned{blockDim.x}));
}

namespace pdiff::emulation {

template <typename T>
struct Exchange {
  T value, result;
  int from;
};

template <typename T, typename Source>
T exchange(uint32_t mask, const char* what, T value, const Source& source) {
  Exchange<T> mine{value, value, source(lane())};
  together(mask, what, &mine, [mask](LaneData lanes) {
    for (int l = 0; l < 32; ++l) {
      if ((mask >> l & 1) == 0) continue;
      auto* to = static_cast<Exchange<T>*>(lanes[l]);
      if (to->from >= 0 && to->from < 32 && lanes[to->from] != nullptr) {
        to->result = static_cast<Exchange<T>*>(lanes[to->from])->value;
      }
    }
  });
  return mine.result;
}

}  // namespace pdiff::emulation

template <typename T>
T __shfl_sync(uint32_t mask, T value, int from, int width = 32) {
  return ::pdiff::emulation::exchange(
      mask, "shfl", value, [&](int lane) { return lane / width * width + from % width; });
}

template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int bits, int width = 32) {
  return ::pdiff::emulation::exchange(mask, "shfl.xor", value, [&](int lane) {
    return (lane ^ bits) / width == lane / width ? lane ^ bits : lane;
  });
}

template <typename T>
T __shfl_up_sync(uint32_t mask, T value, int distance, int width = 32) {
  return ::pdiff::emulation::exchange(mask, "shfl.up", value, [&](int lane) {
    return lane % width >= distance ? lane - distance : lane;
  });
}

template <typename T>
T __shfl_down_sync(uint32_t mask, T value, int distance, int width = 32) {
  return ::pdiff::emulation::exchange(mask, "shfl.down", value, [&](int lane) {
    return lane % width + distance < width ? lane + distance : lane;
  });
}

inline unsigned __ballot_sync(uint32_t mask, int predicate) {
  ::pdiff::emulation::Exchange<unsigned> mine{predicate != 0, 0, 0};
  ::pdiff::emulation::together(mask, "vote", &mine, [](::pdiff::emulation::LaneData lanes) {
    using Lane = ::pdiff::emulation::Exchange<unsigned>;
    unsigned ballot = 0;
    for (int l = 0; l < 32; ++l) {
      if (lanes[l] != nullptr) ballot |= static_cast<Lane*>(lanes[l])->value << l;
    }
    for (void* lane : lanes) {
      if (lane != nullptr) static_cast<Lane*>(lane)->result = ballot;
    }
  });
  return mine.result;
}

inline int __any_sync(uint32_t mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(uint32_t mask, int predicate) {
  return __ballot_sync(mask, predicate) == mask;
}
inline void __syncwarp(uint32_t mask = 0xffffffffu) { ::pdiff::emulation::sync_lanes(mask); }

template <typename T, typename Combine>
T pdiff_reduce_sync(uint32_t mask, T value, const Combine& combine) {
  T all{};
  bool first = true;
  for (int l = 0; l < 32; ++l) {
    if ((mask >> l & 1) == 0) continue;
    const T other = __shfl_sync(mask, value, l);
    all = first ? other : combine(all, other);
    first = false;
  }
  return all;
}

inline unsigned __reduce_add_sync(uint32_t mask, unsigned value) {
  return pdiff_reduce_sync(mask, value, [](unsigned a, unsigned b) { return a + b; });
}
inline unsigned __reduce_max_sync(uint32_t mask, unsigned value) {
  return pdiff_reduce_sync(mask, value, [](unsigned a, unsigned b) { return std::max(a, b); });
}
inline unsigned __reduce_min_sync(uint32_t mask, unsigned value) {
  return pdiff_reduce_sync(mask, value, [](unsigned a, unsigned b) { return std::min(a, b); });
}

inline void __threadfence() { ::pdiff::emulation::fence(); }
inline void __threadfence_block() {}
inline void __nanosleep(unsigned) { ::pdiff::emulation::wait("sleep"); }

template <typename T>
T atomicAdd(T* at, std::type_identity_t<T> value) {
  const ::pdiff::emulation::Atomic atomic(at);
  const T old = *at;
  *at = static_cast<T>(old + value);
  return old;
}
template <typename T>
T atomicMax(T* at, std::type_identity_t<T> value) {
  const ::pdiff::emulation::Atomic atomic(at);
  const T old = *at;
  *at = std::max(old, value);
  return old;
}
template <typename T>
T atomicMin(T* at, std::type_identity_t<T> value) {
  const ::pdiff::emulation::Atomic atomic(at);
  const T old = *at;
  *at = std::min(old, value);
  return old;
}
template <typename T>
T atomicOr(T* at, std::type_identity_t<T> value) {
  const ::pdiff::emulation::Atomic atomic(at);
  const T old = *at;
  *at = old | value;
  return old;
}
template <typename T>
T atomicExch(T* at, std::type_identity_t<T> value) {
  const ::pdiff::emulation::Atomic atomic(at);
  const T old = *at;
  *at = value;
  return old;
}
template <typename T>
T atomicCAS(T* at, std::type_identity_t<T> compare, std::type_identity_t<T> value) {
  const ::pdiff::emulation::Atomic atomic(at);
  const T old = *at;
  if (old == compare) *at = value;
  return old;
}

// Arithmetic.

template <typename To, typename From>
To pdiff_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

inline unsigned __float_as_uint(float x) { return pdiff_bits<unsigned>(x); }
inline int __float_as_int(float x) { return pdiff_bits<int>(x); }
inline float __uint_as_float(unsigned x) { return pdiff_bits<float>(x); }
inline float __int_as_float(int x) { return pdiff_bits<float>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned long long __brevll(unsigned long long x) {
  unsigned long long y = 0;
  for (int i = 0; i < 64; ++i) y |= (x >> i & 1) << (63 - i);
  return y;
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
template <typename T>
T __ldg(const T* at) {
  const ::pdiff::emulation::Constant constant;
  return *at;
}
using std::max;
using std::min;

// The runtime: one device, whose memory is the host's.

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorUnknown = 999 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaMemcpyKind { cudaMemcpyDeviceToHost, cudaMemcpyHostToDevice };

struct cudaDeviceProp {
  char name[256];
  int major, minor, multiProcessorCount;
  size_t totalGlobalMem;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

#define CUDART_VERSION 0

inline const char* cudaGetErrorString(cudaError_t) { return "emulated error"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device_idx) { return *device_idx = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const ::pdiff::emulation::Device& device = ::pdiff::emulation::device();
  *value = attribute == cudaDevAttrMultiProcessorCount            ? device.num_sms
           : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? device.max_shared_bytes
           : attribute == cudaDevAttrComputeCapabilityMajor       ? 9
                                                                  : 0;
  return cudaSuccess;
}
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* prop, int) {
  *prop = {"emulated on the CPU", 9, 0, ::pdiff::emulation::device().num_sms, size_t{1} << 30};
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t num_bytes, cudaStream_t) {
  return std::memset(memory, value, num_bytes), cudaSuccess;
}
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t num_bytes, cudaMemcpyKind) {
  return std::memcpy(to, from, num_bytes), cudaSuccess;
}
template <typename T>
cudaError_t cudaMalloc(T** memory, size_t num_bytes) {
  *memory = static_cast<T*>(std::malloc(num_bytes));
  return cudaSuccess;
}
inline cudaError_t cudaFree(void* memory) { return std::free(memory), cudaSuccess; }
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int bytes) {
  return bytes <= ::pdiff::emulation::device().max_shared_bytes ? cudaSuccess
                                                                : cudaErrorInvalidValue;
}
template <typename... Params>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                               std::type_identity_t<Params>... args) {
  ::pdiff::emulation::run({config->gridDim.x}, {config->blockDim.x},
                          static_cast<int64_t>(config->dynamicSmemBytes), [&] { kernel(args...); });
  return cudaSuccess;
}
