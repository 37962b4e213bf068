#pragma once

// What the functions of the C interface share.

#include <cmath>
#include <exception>
#include <memory>
#include <new>
#include <string>
#include <utility>

#include "pdiff/attention_plan.h"
#include "pdiff/c_api.h"
#include "pdiff/dtype.h"
#include "pdiff/error.h"
#include "pdiff/span_layout.h"
#include "pdiff/unmask.h"

struct pdiff_span_layout {
  pdiff::SpanLayout layout;
};

struct pdiff_attention_plan {
  pdiff::AttentionPlan plan;
};

namespace pdiff::capi {

inline std::string& last_error() {
  thread_local std::string message;
  return message;
}

inline pdiff_status fail(pdiff_status status, const char* message) noexcept {
  try {
    last_error() = message;
  } catch (...) {  // no memory even for the message: the status still says it
  }
  return status;
}

// Run `body` and turn what it throws into a status.
template <typename Body>
pdiff_status guarded(Body&& body) noexcept {
  try {
    body();
    return PDIFF_OK;
  } catch (const pdiff::Error& error) {
    return fail(PDIFF_INVALID_ARGUMENT, error.what());
  } catch (const std::bad_alloc&) {
    return fail(PDIFF_OUT_OF_MEMORY, "out of memory");
  } catch (const std::exception& error) {
    return fail(PDIFF_INTERNAL_ERROR, error.what());
  } catch (...) {
    return fail(PDIFF_INTERNAL_ERROR, "unknown exception");
  }
}

inline void check_pointer(const void* pointer, const char* name, int64_t num_elements = 1) {
  PDIFF_CHECK(pointer != nullptr || num_elements == 0, name, ": expected a pointer, got NULL");
}

// Enums arrive as int32_t: C lets any number through.
inline DType dtype_of(int32_t dtype, const char* name) {
  PDIFF_CHECK(dtype >= PDIFF_FLOAT32 && dtype <= PDIFF_FLOAT16, name,
              ": expected PDIFF_FLOAT32, PDIFF_BFLOAT16 or PDIFF_FLOAT16, got ", dtype);
  return static_cast<DType>(dtype);
}

inline void check_count(int64_t count, const char* name) {
  PDIFF_CHECK(count >= 0, name, ": expected >= 0, got ", count);
}

// Make a handle and hand it over only when nothing threw.
template <typename Handle, typename Value>
void hand_over(Value&& value, Handle** handle) {
  *handle = std::make_unique<Handle>(Handle{std::forward<Value>(value)}).release();
}

// A stride of 0 means contiguous; a smaller one than that would let tokens overlap.
inline int64_t stride_or(int64_t stride, int64_t contiguous, const char* name) {
  PDIFF_CHECK(stride == 0 || stride >= contiguous, name, ": expected 0 or at least ", contiguous,
              ", got ", stride);
  return stride == 0 ? contiguous : stride;
}

inline float scale_or_default(float softmax_scale, int32_t head_dim) {
  return softmax_scale == 0.0f ? 1.0f / std::sqrt(static_cast<float>(head_dim)) : softmax_scale;
}

struct AttentionStrides {
  int64_t q, k, v, k_page, v_page;
};

inline AttentionStrides checked_strides(const pdiff_hybrid_attention_args& args,
                                        const PlanHeader& h) {
  const int64_t row_q = int64_t{h.num_heads_q} * h.head_dim;
  const int64_t row_kv = int64_t{h.num_heads_kv} * h.head_dim;
  check_pointer(args.q, "q", h.total_q);
  check_pointer(args.out, "out", h.total_q);
  check_pointer(args.k, "k", h.total_kv);
  check_pointer(args.v, "v", h.total_kv);
  const int64_t k = stride_or(args.k_stride, row_kv, "k_stride");
  const int64_t v = stride_or(args.v_stride, row_kv, "v_stride");
  return {stride_or(args.q_stride, row_q, "q_stride"), k, v,
          stride_or(args.k_page_stride, h.page_size * k, "k_page_stride"),
          stride_or(args.v_page_stride, h.page_size * v, "v_page_stride")};
}

UnmaskParams unmask_params(const pdiff_unmask_args& args);  // throws on a bad argument

}  // namespace pdiff::capi
