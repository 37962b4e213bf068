#include "cpu/swiglu.h"

#include "cpu/dtype.h"
#include "pdiff/error.h"

namespace pdiff::cpu {

void swiglu(const SwigluParams& params) {
  check_dtype("dtype", params.dtype);
  PDIFF_CHECK(params.num_rows >= 0 && params.size > 0, "expected rows >= 0 and a size > 0, got ",
              params.num_rows, " and ", params.size);
  PDIFF_CHECK(params.num_rows == 0 ||
                  (params.gate != nullptr && params.up != nullptr && params.out != nullptr),
              "gate, up: expected data, got none");
  PDIFF_CALL_KERNEL(swiglu_rows, params);
}

}  // namespace pdiff::cpu
