#include <string>

#include "pdiff/c_api.h"
#include "tests/check.h"

namespace {

TEST(version_is_the_one_of_the_build) {
  CHECK_EQ(std::string(pdiff_version()), std::string(PDIFF_VERSION));
}

TEST(an_error_becomes_a_status_and_a_message) {
  CHECK_EQ(pdiff_select_isa("vax"), PDIFF_INVALID_ARGUMENT);
  CHECK(std::string(pdiff_last_error()).find("got vax") != std::string::npos);
  CHECK_EQ(pdiff_isa_name(nullptr), PDIFF_INVALID_ARGUMENT);
  CHECK(std::string(pdiff_last_error()).find("name: expected a pointer") != std::string::npos);
}

TEST(isa_can_be_read_and_lowered) {
  const char* name = nullptr;
  CHECK_EQ(pdiff_select_isa("generic"), PDIFF_OK);
  CHECK_EQ(pdiff_isa_name(&name), PDIFF_OK);
  CHECK_EQ(std::string(name), std::string("generic"));
  CHECK_EQ(pdiff_select_isa(nullptr), PDIFF_OK);
}

TEST(cuda_is_safe_to_ask_for) {
  CHECK(pdiff_built_with_cuda() == 0 || pdiff_built_with_cuda() == 1);
  CHECK(pdiff_cuda_device_count() >= 0);
}

}  // namespace

int main() { return pdiff::test::run_all(); }
