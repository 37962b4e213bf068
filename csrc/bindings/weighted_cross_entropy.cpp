#include "pdiff/weighted_cross_entropy.h"

#include "bindings/bindings.h"
#include "bindings/tensor.h"
#include "pdiff/error.h"

namespace py = pybind11;

namespace pdiff::bindings {
namespace {

// The arguments of every backend, then `Extra` that only one of them has.
template <typename... Extra, typename Run>
auto cross_entropy_with(const Run& run) {
  return [run](const Tensor& logits, const Tensor& labels, const Tensor& weight, const Tensor& kind,
               const Tensor& dlogits, const Tensor& loss, const Tensor& weighted_sums,
               const Tensor& unweighted_sums, const Tensor& counts, Extra... extra) {
    PDIFF_CHECK(logits.num_dims == 2, "logits: expected 2 dimensions, got ", logits.shape_text());
    const int64_t num_rows = logits.shape[0];
    WeightedCrossEntropyParams params = {
        .logits = logits.data,
        .labels = labels.as<const int64_t>("labels", num_rows),
        .weight = weight.as<const float>("weight", num_rows),
        .kind = kind.as<const uint8_t>("kind", num_rows),
        .dlogits = dlogits.data,
        .loss = loss.as<float>("loss", 1),
        .weighted_sums = weighted_sums.as<float>("weighted_sums", 2),
        .unweighted_sums = unweighted_sums.as<float>("unweighted_sums", 2),
        .counts = counts.as<int64_t>("counts", 2),
        .dtype = logits.dtype("logits"),
        .logits_stride = logits.strides[0],
        .dlogits_stride = dlogits.is_none ? 0 : dlogits.strides[0],
        .num_rows = num_rows,
        .vocab_size = logits.shape[1],
        .normaliser = 0.0,
        .num_threads = 1,
    };
    const py::gil_scoped_release release;
    run(params, extra...);
  };
}

#if PDIFF_WITH_CUDA
void scale_gradient_cuda(const Tensor& dlogits, const Tensor& factor, int device_idx,
                         int64_t stream) {
  PDIFF_CHECK(dlogits.num_dims == 2, "dlogits: expected 2 dimensions, got ", dlogits.shape_text());
  const DType dtype = dlogits.dtype("dlogits");
  const auto* by = factor.as<const float>("grad_loss", 1);
  const int64_t stride = dlogits.strides[0], rows = dlogits.shape[0], size = dlogits.shape[1];
  const py::gil_scoped_release release;
  cuda::scale_gradient(dlogits.data, dtype, stride, rows, size, by,
                       {device_idx, reinterpret_cast<void*>(stream)});
}
#endif

}  // namespace

void bind_weighted_cross_entropy(py::module_& m) {
  m.def("weighted_cross_entropy",
        cross_entropy_with<double, int>(
            [](WeightedCrossEntropyParams& params, double normaliser, int num_threads) {
              params.normaliser = normaliser;
              params.num_threads = num_threads;
              cpu::weighted_cross_entropy(params);
            }));
#if PDIFF_WITH_CUDA
  m.def("weighted_cross_entropy_workspace_bytes", &cuda::weighted_cross_entropy_workspace_bytes);
  m.def("weighted_cross_entropy_cuda",
        cross_entropy_with<const Tensor&, const Tensor&, int, int64_t>(
            [](const WeightedCrossEntropyParams& params, const Tensor& normaliser,
               const Tensor& workspace, int device_idx, int64_t stream) {
              cuda::weighted_cross_entropy(params, normaliser.as<const double>("normaliser", 1),
                                           workspace.data,
                                           {device_idx, reinterpret_cast<void*>(stream)});
            }));
  m.def("scale_gradient_cuda", &scale_gradient_cuda);
#endif
}

}  // namespace pdiff::bindings
