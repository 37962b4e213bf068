#include "pdiff/rope_kv_write.h"

#include "bindings/address.h"
#include "bindings/bindings.h"
#include "pdiff/error.h"

namespace py = pybind11;

namespace pdiff::bindings {
namespace {

using Address = std::uintptr_t;

RopeKvWriteParams rope_params(Address q, Address k, Address v, Address cos, Address sin,
                              Address positions, Address slots, Address k_cache, Address v_cache,
                              int dtype, bool positions_are_int64, int64_t q_stride,
                              int64_t k_stride, int64_t v_stride, int64_t num_rows,
                              int64_t num_heads_q, int64_t num_heads_kv, int64_t head_dim,
                              int64_t max_position, int64_t num_slots) {
  PDIFF_CHECK(num_rows == 0 || (q != 0 && k != 0), "q, k: expected data, got none");
  return {
      .q = address<void>(q),
      .k = address<void>(k),
      .v = address<const void>(v),
      .cos = address<const float>(cos),
      .sin = address<const float>(sin),
      .positions = address<const void>(positions),
      .slots = address<const int64_t>(slots),
      .k_cache = address<void>(k_cache),
      .v_cache = address<void>(v_cache),
      .dtype = static_cast<DType>(dtype),
      .positions_are_int64 = positions_are_int64,
      .q_stride = q_stride,
      .k_stride = k_stride,
      .v_stride = v_stride,
      .num_rows = num_rows,
      .num_heads_q = num_heads_q,
      .num_heads_kv = num_heads_kv,
      .head_dim = head_dim,
      .max_position = max_position,
      .num_slots = num_slots,
      .num_threads = 1,
  };
}

void rope_kv_write(Address q, Address k, Address v, Address cos, Address sin, Address positions,
                   Address slots, Address k_cache, Address v_cache, int dtype,
                   bool positions_are_int64, int64_t q_stride, int64_t k_stride, int64_t v_stride,
                   int64_t num_rows, int64_t num_heads_q, int64_t num_heads_kv, int64_t head_dim,
                   int64_t max_position, int64_t num_slots, int num_threads) {
  RopeKvWriteParams params = rope_params(
      q, k, v, cos, sin, positions, slots, k_cache, v_cache, dtype, positions_are_int64, q_stride,
      k_stride, v_stride, num_rows, num_heads_q, num_heads_kv, head_dim, max_position, num_slots);
  params.num_threads = num_threads;
  const py::gil_scoped_release release;
  cpu::rope_kv_write(params);
}

#if PDIFF_WITH_CUDA
void rope_kv_write_cuda(Address q, Address k, Address v, Address cos, Address sin,
                        Address positions, Address slots, Address k_cache, Address v_cache,
                        int dtype, bool positions_are_int64, int64_t q_stride, int64_t k_stride,
                        int64_t v_stride, int64_t num_rows, int64_t num_heads_q,
                        int64_t num_heads_kv, int64_t head_dim, int64_t max_position,
                        int64_t num_slots, int device_idx, Address stream) {
  const RopeKvWriteParams params = rope_params(
      q, k, v, cos, sin, positions, slots, k_cache, v_cache, dtype, positions_are_int64, q_stride,
      k_stride, v_stride, num_rows, num_heads_q, num_heads_kv, head_dim, max_position, num_slots);
  const py::gil_scoped_release release;
  cuda::rope_kv_write(params, {device_idx, address<void>(stream)});
}
#endif

}  // namespace

void bind_rope_kv_write(py::module_& m) {
  m.def("rope_kv_write", &rope_kv_write, "pdiff/rope_kv_write.h; addresses as ints.");
#if PDIFF_WITH_CUDA
  m.def("rope_kv_write_cuda", &rope_kv_write_cuda);
#endif
}

}  // namespace pdiff::bindings
