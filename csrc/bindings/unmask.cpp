#include "pdiff/unmask.h"

#include "bindings/address.h"
#include "bindings/bindings.h"
#include "pdiff/error.h"

namespace py = pybind11;

namespace pdiff::bindings {
namespace {

using Address = std::uintptr_t;

// A setting of every span: (address, value), where the address of [num_spans] values counts before
// the one value for all.
template <typename T>
PerSpan<T> per_span(const py::tuple& settings, int i) {
  const auto setting = settings[i].cast<py::tuple>();
  PDIFF_CHECK(setting.size() == 2, "settings: expected pairs of address and value");
  return {address<const T>(setting[0].cast<Address>()), setting[1].cast<T>()};
}

// The arguments of every backend, then `Extra` that only one of them has.
template <typename... Extra, typename Run>
auto unmask_with(const Run& run) {
  return [run](Address token_ids, Address logits, Address row_position, Address cu_rows_span,
               Address num_unmask, Address num_masked, Address banned_ids, Address seeds,
               Address random_position, Address confidence, Address candidate, Address is_nan,
               Address is_written, int logits_dtype, int64_t logits_stride, int64_t total_tokens,
               int64_t num_rows, int64_t num_spans, int64_t vocab_size, int64_t num_banned,
               int rule, const py::tuple& settings, Extra... extra) {
    PDIFF_CHECK(settings.size() == 6, "settings: expected 6, got ", settings.size());
    PDIFF_CHECK(num_rows == 0 || (token_ids != 0 && logits != 0),
                "logits: expected data, got none");
    UnmaskParams params = {
        .token_ids = address<int64_t>(token_ids),
        .logits = address<const void>(logits),
        .row_position = address<const int32_t>(row_position),
        .cu_rows_span = address<const int32_t>(cu_rows_span),
        .num_unmask = address<const int32_t>(num_unmask),
        .num_masked = address<int32_t>(num_masked),
        .banned_ids = address<const int64_t>(banned_ids),
        .seeds = address<const int64_t>(seeds),
        .random_position = address<const int32_t>(random_position),
        .confidence = address<float>(confidence),
        .candidate = address<int64_t>(candidate),
        .is_nan = address<uint8_t>(is_nan),
        .is_written = address<uint8_t>(is_written),
        .logits_dtype = static_cast<DType>(logits_dtype),
        .logits_stride = logits_stride,
        .total_tokens = total_tokens,
        .num_rows = num_rows,
        .num_spans = num_spans,
        .vocab_size = vocab_size,
        .num_banned = num_banned,
        .rule = static_cast<UnmaskRule>(rule),
        .temperature = per_span<float>(settings, 0),
        .top_p = per_span<float>(settings, 1),
        .top_k = per_span<int32_t>(settings, 2),
        .alg_temp = per_span<float>(settings, 3),
        .threshold = per_span<float>(settings, 4),
        .step_idx = per_span<int32_t>(settings, 5),
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
        }),
        "pdiff/unmask.h; addresses as ints.");
#if PDIFF_WITH_CUDA
  m.def("unmask_workspace_bytes", &cuda::unmask_workspace_bytes);
  m.def("unmask_cuda", unmask_with<Address, int64_t, int, Address>(
                           [](const UnmaskParams& params, Address workspace, int64_t bytes,
                              int device_idx, Address stream) {
                             cuda::unmask(params, address<void>(workspace), bytes,
                                          {device_idx, address<void>(stream)});
                           }));
#endif
}

}  // namespace pdiff::bindings
