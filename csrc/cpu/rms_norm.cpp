#include "cpu/rms_norm.h"

#include "cpu/dtype.h"
#include "pdiff/error.h"

namespace pdiff::cpu {

void rms_norm(const RmsNormParams& params) {
  check_dtype("dtype", params.dtype);
  PDIFF_CHECK(params.num_rows >= 0 && params.size > 0, "expected rows >= 0 and a size > 0, got ",
              params.num_rows, " and ", params.size);
  PDIFF_CHECK(params.num_rows == 0 ||
                  (params.x != nullptr && params.weight != nullptr && params.out != nullptr),
              "x, weight: expected data, got none");
  PDIFF_CALL_KERNEL(rms_norm_rows, params);
}

}  // namespace pdiff::cpu
