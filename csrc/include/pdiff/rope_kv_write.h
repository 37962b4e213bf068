#pragma once

#include <cstdint>

#include "pdiff/device.h"
#include "pdiff/dtype.h"

namespace pdiff {

/// Rotary embedding of q and k in place, and the write of k and v into their cache slots, in one
/// pass. Half-split: element i of a head is rotated with element i + head_dim / 2.
/// Numerics  float arithmetic, one rounding to the tensors' dtype; the cache holds rotated keys.
/// Slots     two rows with the same slot are a race; the caller hands out each slot once.
/// On a GPU  what is out of range can not be told: a row whose position is is left as it came and
///           written nowhere, a row whose slot is is rotated and not written. num_threads is not
///           read.
struct RopeKvWriteParams {
  void* q;                // [num_rows, num_heads_q, head_dim], rows q_stride apart, written
  void* k;                // [num_rows, num_heads_kv, head_dim], rows k_stride apart, written
  const void* v;          // [num_rows, num_heads_kv, head_dim], rows v_stride apart
  const float* cos;       // [max_position, head_dim / 2]
  const float* sin;       // [max_position, head_dim / 2]
  const void* positions;  // [num_rows], int64 or int32
  const int64_t* slots;   // [num_rows] page * page_size + offset; -1: not written
  void* k_cache;          // [num_slots, num_heads_kv, head_dim]; null: rotate only, and v and slots
  void* v_cache;          // are not read

  DType dtype;  // of q, k, v and the caches
  bool positions_are_int64;
  int64_t q_stride, k_stride, v_stride;
  int64_t num_rows, num_heads_q, num_heads_kv, head_dim, max_position, num_slots;
  int num_threads;
};

namespace cpu {
void rope_kv_write(const RopeKvWriteParams& params);  // throws pdiff::Error before any write
}

namespace cuda {
void rope_kv_write(const RopeKvWriteParams& params, const CudaQueue& queue);
}

}  // namespace pdiff
