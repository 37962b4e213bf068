#pragma once

#include "common/macros.h"
#include "pdiff/dtype.h"

namespace pdiff::cpu::PDIFF_ISA {
namespace {

// f(T{}) with the type of a tensor's elements.
template <typename F>
PDIFF_INLINE void with_element(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(float{});
    case DType::kBFloat16:
      return f(bfloat16{});
    case DType::kFloat16:
      return f(float16{});
  }
}

}  // namespace
}  // namespace pdiff::cpu::PDIFF_ISA
