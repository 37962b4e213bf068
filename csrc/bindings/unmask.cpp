#include "bindings/bindings.h"

namespace pdiff::bindings {

void bind_unmask(pybind11::module_&) {}

}  // namespace pdiff::bindings
