#include "bindings/bindings.h"

namespace pdiff::bindings {

void bind_weighted_cross_entropy(pybind11::module_&) {}

}  // namespace pdiff::bindings
