#include "bindings/bindings.h"

namespace pdiff::bindings {

void bind_attention_plan(pybind11::module_&) {}

}  // namespace pdiff::bindings
