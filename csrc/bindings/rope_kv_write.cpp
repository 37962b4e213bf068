#include "pdiff/rope_kv_write.h"

#include "bindings/bindings.h"
#include "bindings/tensor.h"
#include "pdiff/error.h"

namespace py = pybind11;

namespace pdiff::bindings {
namespace {

// The arguments of every backend, then `Extra` that only one of them has.
template <typename... Extra, typename Run>
auto rope_kv_write_with(const Run& run) {
  return [run](const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos,
               const Tensor& sin, const Tensor& positions, const Tensor& slots,
               const Tensor& k_cache, const Tensor& v_cache, Extra... extra) {
    PDIFF_CHECK(q.num_dims == 3 && k.num_dims == 3 && (v.is_none || v.num_dims == 3),
                "q, k, v: expected [rows, heads, head_dim]");
    PDIFF_CHECK(cos.num_dims == 2, "cos: expected 2 dimensions, got ", cos.shape_text());
    PDIFF_CHECK(k_cache.is_none || (k_cache.num_dims == 4 && !v.is_none && !slots.is_none),
                "k_cache: expected 4 dimensions, values and slots");
    const int64_t num_rows = q.shape[0];
    const bool positions_are_int64 = positions.bits == 64;
    const void* const row_positions =
        positions_are_int64
            ? static_cast<const void*>(positions.as<const int64_t>("positions", num_rows))
            : positions.as<const int32_t>("positions", num_rows);
    RopeKvWriteParams params = {
        .q = q.data,
        .k = k.data,
        .v = v.data,
        .cos = cos.as<const float>("cos"),
        .sin = sin.as<const float>("sin"),
        .positions = row_positions,
        .slots = slots.as<const int64_t>("slots", num_rows),
        .k_cache = k_cache.data,
        .v_cache = v_cache.data,
        .dtype = q.dtype("q"),
        .positions_are_int64 = positions_are_int64,
        .q_stride = q.strides[0],
        .k_stride = k.strides[0],
        .v_stride = v.is_none ? 0 : v.strides[0],
        .num_rows = num_rows,
        .num_heads_q = q.shape[1],
        .num_heads_kv = k.shape[1],
        .head_dim = q.shape[2],
        .max_position = cos.shape[0],
        .num_slots = k_cache.is_none ? 0 : k_cache.shape[0] * k_cache.shape[1],
        .num_threads = 1,
    };
    const py::gil_scoped_release release;
    run(params, extra...);
  };
}

}  // namespace

void bind_rope_kv_write(py::module_& m) {
  m.def("rope_kv_write", rope_kv_write_with<int>([](RopeKvWriteParams& params, int num_threads) {
          params.num_threads = num_threads;
          cpu::rope_kv_write(params);
        }));
#if PDIFF_WITH_CUDA
  m.def("rope_kv_write_cuda", rope_kv_write_with<int, int64_t>([](const RopeKvWriteParams& params,
                                                                  int device_idx, int64_t stream) {
          cuda::rope_kv_write(params, {device_idx, reinterpret_cast<void*>(stream)});
        }));
#endif
}

}  // namespace pdiff::bindings
