#pragma once

#include <cstdint>

#include "pdiff/device.h"
#include "pdiff/dtype.h"

namespace pdiff {

/// What a row trains: the plan (next token) or the inside of a span (masked token).
constexpr int kNumRowKinds = 2;

/// loss = sum_r weight[r] * ce[r] / normaliser, and its gradient, in one read and one write of the
/// logits: ce[r] = logsumexp(logits[r]) - logits[r, labels[r]].
/// Ignored     label -100: the row adds nothing and its gradient is 0.
/// Nothing     normaliser 0: loss and gradient are 0.
/// Numerics    float arithmetic, sums joined in double in row order; the result ignores the thread
///             count.
/// In place    dlogits may be logits.
/// On a GPU    a label or kind out of range can not be told: the row counts as ignored, and loss
///             is NaN. normaliser and num_threads are not read.
struct WeightedCrossEntropyParams {
  static constexpr int64_t kIgnored = -100;

  const void* logits;     // [num_rows, vocab_size] dtype, rows logits_stride apart
  const int64_t* labels;  // [num_rows] in [0, vocab_size), or kIgnored
  const float* weight;    // [num_rows]
  const uint8_t* kind;    // [num_rows] 0: plan, 1: span
  void* dlogits;  // [num_rows, vocab_size] dtype, rows dlogits_stride apart; null: no gradient

  float* loss;             // one value
  float* weighted_sums;    // [kNumRowKinds] sum of weight * ce
  float* unweighted_sums;  // [kNumRowKinds] sum of ce
  int64_t* counts;         // [kNumRowKinds] rows that are not ignored

  DType dtype;
  int64_t logits_stride, dlogits_stride, num_rows, vocab_size;
  double normaliser;
  int num_threads;
};

namespace cpu {
void weighted_cross_entropy(const WeightedCrossEntropyParams& params);  // throws before any write
}

namespace cuda {

int64_t weighted_cross_entropy_workspace_bytes(int64_t num_rows);

/// Nothing is read back: all pointers are of the device, `normaliser` (one value) included.
void weighted_cross_entropy(const WeightedCrossEntropyParams& params, const double* normaliser,
                            void* workspace, const CudaQueue& queue);

/// dlogits <- dlogits * factor, for what follows the loss; costs next to nothing where it is 1.
void scale_gradient(void* dlogits,  // [num_rows, vocab_size] dtype, rows dlogits_stride apart
                    DType dtype, int64_t dlogits_stride, int64_t num_rows, int64_t vocab_size,
                    const float* factor,  // one value
                    const CudaQueue& queue);

}  // namespace cuda

}  // namespace pdiff
