#include "tests/check.h"  // first: what it includes must not be compiled for AVX-512

#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#include "cpu/vec/avx512.h"
#include "tests/vec_check.h"
#pragma GCC reset_options
#endif

#include "pdiff/isa.h"

int main() {
  constexpr int kSkipped = 77;
  return pdiff::detected_isa() >= pdiff::Isa::kAvx512 ? pdiff::test::run_all() : kSkipped;
}
