#include "tests/check.h"  // first: what it includes must not be compiled for AVX-512

#if defined(__x86_64__)
#ifdef __clang__
#include <immintrin.h>
#pragma clang attribute push(                                                    \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#endif
#include "cpu/vec/avx512.h"
#include "tests/vec_check.h"
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

#include "pdiff/isa.h"

int main() {
  constexpr int kSkipped = 77;
  return pdiff::detected_isa() >= pdiff::Isa::kAvx512 ? pdiff::test::run_all() : kSkipped;
}
