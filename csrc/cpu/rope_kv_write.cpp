#include "cpu/rope_kv_write.h"

#include "common/positions.h"
#include "cpu/dtype.h"
#include "pdiff/error.h"

namespace pdiff::cpu {

void rope_kv_write(const RopeKvWriteParams& params) {
  const RopeKvWriteParams& p = params;
  check_dtype("dtype", p.dtype);
  PDIFF_CHECK(p.head_dim > 0 && p.head_dim % 2 == 0, "head_dim: expected an even number, got ",
              p.head_dim);
  for (int64_t row = 0; row < p.num_rows; ++row) {
    const int64_t position = position_of_row(p.positions, p.positions_are_int64, row);
    PDIFF_CHECK(position >= 0 && position < p.max_position, "positions[", row, "]: expected 0 to ",
                p.max_position - 1, ", got ", position);
    if (p.k_cache == nullptr) continue;
    PDIFF_CHECK(p.slots[row] >= -1 && p.slots[row] < p.num_slots, "slots[", row,
                "]: expected -1 to ", p.num_slots - 1, ", got ", p.slots[row]);
  }
  PDIFF_CALL_KERNEL(rope_kv_write_rows, params);
}

}  // namespace pdiff::cpu
