#pragma once

// PDIFF_HD  a small function that host and device code share. Forced inline on the host, so that a
//           translation unit built for one instruction set exports no copy the linker could hand to
//           another one.
#if defined(__CUDACC__)
#define PDIFF_HD __host__ __device__ __forceinline__
#else
#define PDIFF_HD inline __attribute__((always_inline))
#endif

#define PDIFF_INLINE inline __attribute__((always_inline))
