#pragma once

#include <pybind11/pybind11.h>

// One function per stem, each in its own file, adds that kernel's entry points to the module `_C`.
// pdiff::Error arrives in Python as ValueError; nothing in a binding needs to catch it.
namespace pdiff::bindings {

void bind_tensor(pybind11::module_& m);
void bind_environment(pybind11::module_& m);
void bind_span_layout(pybind11::module_& m);
void bind_plan_grammar(pybind11::module_& m);
void bind_page_allocator(pybind11::module_& m);
void bind_attention_plan(pybind11::module_& m);
void bind_hybrid_attention(pybind11::module_& m);
void bind_unmask(pybind11::module_& m);
void bind_rms_norm(pybind11::module_& m);
void bind_rope_kv_write(pybind11::module_& m);
void bind_swiglu(pybind11::module_& m);
void bind_weighted_cross_entropy(pybind11::module_& m);

}  // namespace pdiff::bindings
