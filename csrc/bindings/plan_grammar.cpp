#include "bindings/bindings.h"

namespace pdiff::bindings {

void bind_plan_grammar(pybind11::module_&) {}

}  // namespace pdiff::bindings
