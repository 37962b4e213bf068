#include "tests/check.h"  // first: what it includes must not be compiled for AVX2

#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")
#include "cpu/vec/avx2.h"
#include "tests/vec_check.h"
#pragma GCC reset_options
#endif

#include "pdiff/isa.h"

int main() {
  constexpr int kSkipped = 77;
  return pdiff::detected_isa() >= pdiff::Isa::kAvx2 ? pdiff::test::run_all() : kSkipped;
}
