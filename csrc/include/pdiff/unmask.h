#pragma once

#include <cstdint>

#include "pdiff/device.h"
#include "pdiff/dtype.h"

namespace pdiff {

/// How a span chooses the positions it writes: what ranks them, where higher is more certain, and
/// which of the num_unmask best are written, beside the first.
enum class UnmaskRule : int32_t {
  kEntropy = 0,        // sum p log p, minus the entropy in nats: all
  kProbability = 1,    // p of the candidate: all
  kMargin = 2,         // p of the likeliest token minus p of the second: all
  kThreshold = 3,      // p of the candidate: those with p >= threshold
  kFactor = 4,         // p of the candidate: ranks r = 2, 3, ... as long as
                       // (r + 1) (1 - p) < threshold (Wu et al. 2025, Fast-dLLM)
  kEntropyBudget = 5,  // minus the entropy: as long as the entropies of the ranks before add up to
                       // at most threshold (Ben-Hamu et al. 2025, entropy-bounded unmasking)
};

/// A setting of each span, or one for all of them.
template <typename T>
struct PerSpan {
  const T* values = nullptr;  // [num_spans], or null: `value` holds for every span
  T value{};
  constexpr T operator[](int64_t span) const { return values != nullptr ? values[span] : value; }
};

/// Unmask: reveal the most certain masked tokens of each span.
/// Row        logits -> bans -> temperature -> top-p -> top-k -> softmax -> confidence, candidate.
/// Kept set   in the order (logit descending, id ascending), top-p keeps the shortest prefix whose
///            probability reaches top_p, and top-k all of it that ties with or comes before the
///            top_k-th; at least one token.
/// Candidate  temperature 0: the likeliest token, lowest id first, confidence from unscaled logits;
///            else Gumbel-max over the kept set with the words of csrc/common/philox.h.
/// Span       positions rank by (confidence, then lower position); alg_temp > 0 draws the ranks
///            without replacement from softmax(confidence / alg_temp). Of the num_unmask best, the
///            rule says which are written.
/// Numerics   sums in blocks of float, joined in double in a fixed order: a row's result depends
///            neither on the thread count nor on the other rows. What a rule compares and
///            adds up are the float confidences, in double, in an order fixed by the span alone:
///            backends agree but for sums within rounding of the threshold.
/// Not a distribution  a row with a NaN or +inf logit, or with nothing but -inf: is_nan = 1,
///            candidate = -1, confidence = NaN, never written, has no rank.
struct UnmaskParams {
  int64_t* token_ids;           // [total_tokens], written
  const void* logits;           // [num_rows, vocab_size] logits_dtype, rows logits_stride apart
  const int32_t* row_position;  // [num_rows] into token_ids, ascending within a span
  const int32_t* cu_rows_span;  // [num_spans + 1] from 0 to num_rows
  const int32_t* num_unmask;    // [num_spans]; more than the span's rows: all; negative: none

  int32_t* num_masked = nullptr;  // [num_spans], or null; what a span writes is taken off

  const int64_t* banned_ids;  // [num_banned] in [0, vocab_size)
  const int64_t* seeds;       // [num_rows], or null: 0
  const int32_t*
      random_position;  // [num_rows] position in the random address, or null: row_position

  float* confidence;    // [num_rows]
  int64_t* candidate;   // [num_rows]
  uint8_t* is_nan;      // [num_rows]
  uint8_t* is_written;  // [num_rows]

  DType logits_dtype;
  int64_t logits_stride;
  int64_t total_tokens, num_rows, num_spans, vocab_size, num_banned;

  UnmaskRule rule;
  PerSpan<float> temperature;  // 0 or greater
  PerSpan<float> top_p;        // 1 or greater: off
  PerSpan<int32_t> top_k;      // 0: off
  PerSpan<float> alg_temp;     // 0: take the best
  PerSpan<float> threshold;    // 0 or greater; of kThreshold, kFactor and kEntropyBudget
  PerSpan<int32_t> step_idx;

  int num_threads;
};

namespace cpu {
void unmask(const UnmaskParams& params);  // throws pdiff::Error before anything is written
}

/// On the device nothing is read back, so what only it knows is not refused but harmless: a row
/// whose position lies out of range is scored and not written, an id out of range bans nothing, a
/// setting below its range counts as 0, and rows outside of cu_rows_span belong to no span.
namespace cuda {
/// `filters`: whether some span may have top_p or top_k.
int64_t unmask_workspace_bytes(int64_t num_rows, int64_t vocab_size, bool filters);
void unmask(const UnmaskParams& params, void* workspace, int64_t workspace_bytes,
            const CudaQueue& queue);
}  // namespace cuda

}  // namespace pdiff
