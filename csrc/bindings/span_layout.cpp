#include "bindings/bindings.h"

namespace pdiff::bindings {

void bind_span_layout(pybind11::module_&) {}

}  // namespace pdiff::bindings
