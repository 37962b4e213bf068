#include <pybind11/pybind11.h>

#include "bindings/bindings.h"
#include "pdiff/error.h"

PYBIND11_MODULE(_C, m) {
  using namespace pdiff::bindings;
  m.doc() = "The compiled core of pdiff_runtime. Private: use pdiff_runtime.ops.";

  pybind11::register_local_exception<pdiff::Error>(m, "Error", PyExc_ValueError);

  bind_tensor(m);
  bind_environment(m);
  bind_span_layout(m);
  bind_plan_grammar(m);
  bind_page_allocator(m);
  bind_attention_plan(m);
  bind_hybrid_attention(m);
  bind_unmask(m);
  bind_rms_norm(m);
  bind_rope_kv_write(m);
  bind_swiglu(m);
  bind_weighted_cross_entropy(m);
}
