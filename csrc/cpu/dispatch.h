#pragma once

#include "pdiff/isa.h"

// A kernel body is compiled once per instruction set, in a namespace of that name. In the host file
// of the same stem:
//
//   PDIFF_DECLARE_KERNEL(void score_rows(const UnmaskParams& params));   // inside pdiff::cpu
//   PDIFF_CALL_KERNEL(score_rows, params);                               // the best one selected

#define PDIFF_DECLARE_KERNEL(...) \
  namespace generic {             \
  __VA_ARGS__;                    \
  }                               \
  namespace avx2 {                \
  __VA_ARGS__;                    \
  }                               \
  namespace avx512 {              \
  __VA_ARGS__;                    \
  }

#if PDIFF_HAVE_AVX512
#define PDIFF_CALL_KERNEL(name, ...)                          \
  (selected_isa() >= Isa::kAvx512 ? avx512::name(__VA_ARGS__) \
   : selected_isa() >= Isa::kAvx2 ? avx2::name(__VA_ARGS__)   \
                                  : generic::name(__VA_ARGS__))
#elif PDIFF_HAVE_AVX2
#define PDIFF_CALL_KERNEL(name, ...) \
  (selected_isa() >= Isa::kAvx2 ? avx2::name(__VA_ARGS__) : generic::name(__VA_ARGS__))
#else
#define PDIFF_CALL_KERNEL(name, ...) generic::name(__VA_ARGS__)
#endif
