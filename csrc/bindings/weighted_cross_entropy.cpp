#include "pdiff/weighted_cross_entropy.h"

#include "bindings/address.h"
#include "bindings/bindings.h"
#include "pdiff/error.h"

namespace py = pybind11;

namespace pdiff::bindings {
namespace {

using Address = std::uintptr_t;

void weighted_cross_entropy(Address logits, Address labels, Address weight, Address kind,
                            Address dlogits, Address loss, Address weighted_sums,
                            Address unweighted_sums, Address counts, int dtype,
                            int64_t logits_stride, int64_t dlogits_stride, int64_t num_rows,
                            int64_t vocab_size, double normaliser, int num_threads) {
  PDIFF_CHECK(num_rows == 0 || logits != 0, "logits: expected data, got none");
  const WeightedCrossEntropyParams params = {
      .logits = address<const void>(logits),
      .labels = address<const int64_t>(labels),
      .weight = address<const float>(weight),
      .kind = address<const uint8_t>(kind),
      .dlogits = address<void>(dlogits),
      .loss = address<float>(loss),
      .weighted_sums = address<float>(weighted_sums),
      .unweighted_sums = address<float>(unweighted_sums),
      .counts = address<int64_t>(counts),
      .dtype = static_cast<DType>(dtype),
      .logits_stride = logits_stride,
      .dlogits_stride = dlogits_stride,
      .num_rows = num_rows,
      .vocab_size = vocab_size,
      .normaliser = normaliser,
      .num_threads = num_threads,
  };
  const py::gil_scoped_release release;
  cpu::weighted_cross_entropy(params);
}

}  // namespace

void bind_weighted_cross_entropy(py::module_& m) {
  m.def("weighted_cross_entropy", &weighted_cross_entropy,
        "pdiff/weighted_cross_entropy.h; addresses as ints.");
}

}  // namespace pdiff::bindings
