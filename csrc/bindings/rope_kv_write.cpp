#include "bindings/bindings.h"

namespace pdiff::bindings {

void bind_rope_kv_write(pybind11::module_&) {}

}  // namespace pdiff::bindings
