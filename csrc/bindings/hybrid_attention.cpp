#include "bindings/bindings.h"

namespace pdiff::bindings {

void bind_hybrid_attention(pybind11::module_&) {}

}  // namespace pdiff::bindings
