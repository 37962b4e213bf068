#include "cpu/vec/generic.h"
#include "tests/vec_check.h"

int main() { return pdiff::test::run_all(); }
