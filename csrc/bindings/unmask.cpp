#include "pdiff/unmask.h"

#include <iterator>

#include "bindings/bindings.h"
#include "bindings/tensor.h"
#include "pdiff/error.h"

namespace py = pybind11;

namespace pdiff::bindings {
namespace {

constexpr const char* kSettings[] = {"temperature", "top_p",     "top_k",
                                     "alg_temp",    "threshold", "step_idx"};

// A setting: a tensor [num_spans], one value for all, or None for 0.
template <typename T>
PerSpan<T> per_span(const py::tuple& settings, int i, int64_t num_spans) {
  const py::handle setting = settings[i];
  if (setting.is_none()) return {};
  if (PyFloat_Check(setting.ptr()) || PyLong_Check(setting.ptr())) {
    return {.values = nullptr, .value = setting.cast<T>()};
  }
  return {.values = tensor_of(setting).as<const T>(kSettings[i], num_spans), .value = {}};
}

// The arguments of every backend, then `Extra` that only one of them has.
template <typename... Extra, typename Run>
auto unmask_with(const Run& run) {
  return [run](const Tensor& token_ids, const Tensor& logits, const Tensor& row_position,
               const Tensor& cu_rows_span, const Tensor& num_unmask, const Tensor& num_masked,
               const Tensor& banned_ids, const Tensor& seeds, const Tensor& positions,
               const Tensor& confidence, const Tensor& candidate, const Tensor& is_nan,
               const Tensor& is_written, int rule, const py::tuple& settings, Extra... extra) {
    PDIFF_CHECK(settings.size() == std::size(kSettings), "settings: expected ",
                std::size(kSettings), ", got ", settings.size());
    PDIFF_CHECK(logits.num_dims == 2, "logits: expected 2 dimensions, got ", logits.shape_text());
    const int64_t num_rows = logits.shape[0], num_spans = num_unmask.num_elements();
    UnmaskParams params = {
        .token_ids = token_ids.as<int64_t>("token_ids"),
        .logits = logits.data,
        .row_position = row_position.as<const int32_t>("row_position", num_rows),
        .cu_rows_span = cu_rows_span.as<const int32_t>("cu_rows_span", num_spans + 1),
        .num_unmask = num_unmask.as<const int32_t>("num_unmask"),
        .num_masked = num_masked.as<int32_t>("num_masked", num_spans),
        .banned_ids = banned_ids.as<const int64_t>("banned_ids"),
        .seeds = seeds.as<const int64_t>("seeds", num_rows),
        .random_position = positions.as<const int32_t>("positions", num_rows),
        .confidence = confidence.as<float>("confidence", num_rows),
        .candidate = candidate.as<int64_t>("candidate", num_rows),
        .is_nan = is_nan.as<uint8_t>("is_nan", num_rows),
        .is_written = is_written.as<uint8_t>("is_written", num_rows),
        .logits_dtype = logits.dtype("logits"),
        .logits_stride = logits.strides[0],
        .total_tokens = token_ids.num_elements(),
        .num_rows = num_rows,
        .num_spans = num_spans,
        .vocab_size = logits.shape[1],
        .num_banned = banned_ids.is_none ? 0 : banned_ids.num_elements(),
        .rule = static_cast<UnmaskRule>(rule),
        .temperature = per_span<float>(settings, 0, num_spans),
        .top_p = per_span<float>(settings, 1, num_spans),
        .top_k = per_span<int32_t>(settings, 2, num_spans),
        .alg_temp = per_span<float>(settings, 3, num_spans),
        .threshold = per_span<float>(settings, 4, num_spans),
        .step_idx = per_span<int32_t>(settings, 5, num_spans),
        .num_threads = 1,
    };
    const py::gil_scoped_release release;
    run(params, extra...);
  };
}

}  // namespace

void bind_unmask(py::module_& m) {
  m.def("unmask", unmask_with<int>([](UnmaskParams& params, int num_threads) {
          params.num_threads = num_threads;
          cpu::unmask(params);
        }));
#if PDIFF_WITH_CUDA
  m.def("unmask_workspace_bytes", &cuda::unmask_workspace_bytes);
  m.def("unmask_cuda", unmask_with<const Tensor&, int, int64_t>([](const UnmaskParams& params,
                                                                   const Tensor& workspace,
                                                                   int device_idx, int64_t stream) {
          cuda::unmask(params, workspace.data, workspace.num_elements(),
                       {device_idx, reinterpret_cast<void*>(stream)});
        }));
#endif
}

}  // namespace pdiff::bindings
