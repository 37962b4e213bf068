#include "tests/check.h"  // first: what it includes must not be compiled for AVX2

#if defined(__x86_64__)
#ifdef __clang__
#include <immintrin.h>
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#include "cpu/vec/avx2.h"
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
  return pdiff::detected_isa() >= pdiff::Isa::kAvx2 ? pdiff::test::run_all() : kSkipped;
}
