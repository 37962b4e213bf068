#include "pdiff/plan_grammar.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "bindings/bindings.h"
#include "pdiff/error.h"

namespace py = pybind11;

namespace pdiff::bindings {
namespace {

struct Plan {
  PlanCaps caps;
  PlanState state;

  Plan(int32_t max_topic_tokens, int32_t max_topics, int32_t budget)
      : caps{max_topic_tokens, max_topics}, state(plan_start(caps, budget)) {}
};

// [kNumPlanMasks, kNumTokenClasses]: which classes each mask allows.
py::array_t<bool> mask_table() {
  py::array_t<bool> table({int{kNumPlanMasks}, int{kNumTokenClasses}});
  auto entries = table.mutable_unchecked<2>();
  for (int mask = 0; mask < kNumPlanMasks; ++mask) {
    for (int token_class = 0; token_class < kNumTokenClasses; ++token_class) {
      entries(mask, token_class) = legal_classes(static_cast<PlanMask>(mask)) >> token_class & 1;
    }
  }
  return table;
}

}  // namespace

void bind_plan_grammar(py::module_& m) {
  py::class_<Plan>(m, "PlanState")
      .def(py::init<int32_t, int32_t, int32_t>(), py::arg("max_topic_tokens"),
           py::arg("max_topics"), py::arg("budget"))
      .def(
          "advance",
          [](Plan& self, int token_class) {
            PDIFF_CHECK(token_class >= 0 && token_class < kNumTokenClasses,
                        "token_class: expected 0 to ", kNumTokenClasses - 1, ", got ", token_class);
            return plan_advance(self.state, self.caps, static_cast<TokenClass>(token_class));
          },
          py::arg("token_class"), "False, and no change, where the class is not legal.")
      .def("__copy__", [](const Plan& self) { return self; })
      .def_property_readonly("mask_idx",
                             [](const Plan& self) { return int{plan_mask(self.state, self.caps)}; })
      .def_property_readonly("budget", [](const Plan& self) { return self.state.budget; })
      .def_property_readonly("number", [](const Plan& self) { return self.state.number; })
      .def_property_readonly("num_topic_tokens",
                             [](const Plan& self) { return self.state.num_topic_tokens; })
      .def_property_readonly("finish", [](const Plan& self) { return self.state.finish; });
  m.def("plan_mask_table", &mask_table);
}

}  // namespace pdiff::bindings
