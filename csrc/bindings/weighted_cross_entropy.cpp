#include "pdiff/weighted_cross_entropy.h"

#include "bindings/address.h"
#include "bindings/bindings.h"
#include "pdiff/error.h"

namespace py = pybind11;

namespace pdiff::bindings {
namespace {

using Address = std::uintptr_t;

WeightedCrossEntropyParams cross_entropy_params(Address logits, Address labels, Address weight,
                                                Address kind, Address dlogits, Address loss,
                                                Address weighted_sums, Address unweighted_sums,
                                                Address counts, int dtype, int64_t logits_stride,
                                                int64_t dlogits_stride, int64_t num_rows,
                                                int64_t vocab_size) {
  PDIFF_CHECK(num_rows == 0 || logits != 0, "logits: expected data, got none");
  return {
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
      .normaliser = 0.0,
      .num_threads = 1,
  };
}

void weighted_cross_entropy(Address logits, Address labels, Address weight, Address kind,
                            Address dlogits, Address loss, Address weighted_sums,
                            Address unweighted_sums, Address counts, int dtype,
                            int64_t logits_stride, int64_t dlogits_stride, int64_t num_rows,
                            int64_t vocab_size, double normaliser, int num_threads) {
  WeightedCrossEntropyParams params = cross_entropy_params(
      logits, labels, weight, kind, dlogits, loss, weighted_sums, unweighted_sums, counts, dtype,
      logits_stride, dlogits_stride, num_rows, vocab_size);
  params.normaliser = normaliser;
  params.num_threads = num_threads;
  const py::gil_scoped_release release;
  cpu::weighted_cross_entropy(params);
}

#if PDIFF_WITH_CUDA
void weighted_cross_entropy_cuda(Address logits, Address labels, Address weight, Address kind,
                                 Address dlogits, Address loss, Address weighted_sums,
                                 Address unweighted_sums, Address counts, int dtype,
                                 int64_t logits_stride, int64_t dlogits_stride, int64_t num_rows,
                                 int64_t vocab_size, Address normaliser, Address workspace,
                                 int device_idx, Address stream) {
  const WeightedCrossEntropyParams params = cross_entropy_params(
      logits, labels, weight, kind, dlogits, loss, weighted_sums, unweighted_sums, counts, dtype,
      logits_stride, dlogits_stride, num_rows, vocab_size);
  const py::gil_scoped_release release;
  cuda::weighted_cross_entropy(params, address<const double>(normaliser), address<void>(workspace),
                               {device_idx, address<void>(stream)});
}

void scale_gradient_cuda(Address dlogits, int dtype, int64_t dlogits_stride, int64_t num_rows,
                         int64_t vocab_size, Address factor, int device_idx, Address stream) {
  const py::gil_scoped_release release;
  cuda::scale_gradient(address<void>(dlogits), static_cast<DType>(dtype), dlogits_stride, num_rows,
                       vocab_size, address<const float>(factor),
                       {device_idx, address<void>(stream)});
}
#endif

}  // namespace

void bind_weighted_cross_entropy(py::module_& m) {
  m.def("weighted_cross_entropy", &weighted_cross_entropy,
        "pdiff/weighted_cross_entropy.h; addresses as ints.");
#if PDIFF_WITH_CUDA
  m.def("weighted_cross_entropy_workspace_bytes", &cuda::weighted_cross_entropy_workspace_bytes);
  m.def("weighted_cross_entropy_cuda", &weighted_cross_entropy_cuda);
  m.def("scale_gradient_cuda", &scale_gradient_cuda);
#endif
}

}  // namespace pdiff::bindings
