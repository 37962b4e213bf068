#include <cstdlib>
#include <string>

#include "pdiff/error.h"
#include "pdiff/isa.h"
#include "tests/check.h"

namespace {

using pdiff::Isa;

TEST(environment_with_an_unknown_name_is_an_error_and_can_be_mended) {
  // First in the file: the variable is read by the first question.
  setenv("PDIFF_CPU_ISA", "avx1024", 1);
  CHECK_THROWS(pdiff::selected_isa(), "PDIFF_CPU_ISA: expected generic");
  CHECK_THROWS(pdiff::selected_isa(), "got avx1024");
  setenv("PDIFF_CPU_ISA", "generic", 1);
  CHECK(pdiff::selected_isa() == Isa::kGeneric);
  unsetenv("PDIFF_CPU_ISA");
  CHECK(pdiff::selected_isa() == Isa::kGeneric);  // read once
}

TEST(names_go_both_ways) {
  for (int i = 0; i < pdiff::kNumIsas; ++i) {
    const Isa isa = static_cast<Isa>(i);
    CHECK(pdiff::isa_from_name(pdiff::isa_name(isa)) == isa);
  }
  CHECK_THROWS(pdiff::isa_from_name("sse2"), "isa: expected generic");
}

TEST(selection_is_clamped_to_what_is_built_and_detected) {
  CHECK(pdiff::isa_built(Isa::kGeneric));
  for (int i = 0; i < pdiff::kNumIsas; ++i) {
    const Isa wanted = static_cast<Isa>(i);
    pdiff::select_isa(pdiff::isa_name(wanted));
    CHECK(pdiff::selected_isa() <= wanted);
    CHECK(pdiff::selected_isa() <= pdiff::detected_isa());
    CHECK(pdiff::isa_built(pdiff::selected_isa()));
    if (pdiff::isa_built(wanted) && wanted <= pdiff::detected_isa()) {
      CHECK(pdiff::selected_isa() == wanted);
    }
  }
}

TEST(null_and_empty_go_back_to_the_default) {
  pdiff::select_isa("amx");
  const Isa highest = pdiff::selected_isa();
  for (const char* name : {static_cast<const char*>(nullptr), ""}) {
    pdiff::select_isa("generic");
    CHECK(pdiff::selected_isa() == Isa::kGeneric);
    pdiff::select_isa(name);
    CHECK(pdiff::selected_isa() == highest);
  }
}

TEST(an_unknown_name_leaves_the_selection_alone) {
  pdiff::select_isa("generic");
  CHECK_THROWS(pdiff::select_isa("neon"), "got neon");
  CHECK(pdiff::selected_isa() == Isa::kGeneric);
}

}  // namespace

int main() { return pdiff::test::run_all(); }
