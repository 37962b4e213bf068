#include "cpu/weighted_cross_entropy.h"

#include <vector>

#include "cpu/dtype.h"
#include "pdiff/error.h"

namespace pdiff::cpu {
namespace {

void check(const WeightedCrossEntropyParams& p) {
  check_dtype("dtype", p.dtype);
  PDIFF_CHECK(p.vocab_size > 0 && p.vocab_size < INT32_MAX,
              "logits: expected 1 to 2^31 columns, got ", p.vocab_size);
  for (int64_t row = 0; row < p.num_rows; ++row) {
    const int64_t label = p.labels[row];
    PDIFF_CHECK((label >= 0 && label < p.vocab_size) || label == p.kIgnored, "labels[", row,
                "]: expected 0 to ", p.vocab_size - 1, " or ", p.kIgnored, ", got ", label);
    PDIFF_CHECK(p.kind[row] < kNumRowKinds, "kind[", row, "]: expected 0 or 1, got ",
                int{p.kind[row]});
  }
}

}  // namespace

void weighted_cross_entropy(const WeightedCrossEntropyParams& params) {
  const WeightedCrossEntropyParams& p = params;
  check(p);
  std::vector<double> cross_entropy(p.num_rows);
  PDIFF_CALL_KERNEL(cross_entropy_rows, p, cross_entropy.data());

  double weighted[kNumRowKinds] = {}, unweighted[kNumRowKinds] = {};
  int64_t counts[kNumRowKinds] = {};
  for (int64_t row = 0; row < p.num_rows; ++row) {
    if (p.labels[row] == p.kIgnored) continue;
    const int kind = p.kind[row];
    weighted[kind] += p.weight[row] * cross_entropy[row];
    unweighted[kind] += cross_entropy[row];
    ++counts[kind];
  }
  double total = 0.0;
  for (int kind = 0; kind < kNumRowKinds; ++kind) {
    total += weighted[kind];
    p.weighted_sums[kind] = static_cast<float>(weighted[kind]);
    p.unweighted_sums[kind] = static_cast<float>(unweighted[kind]);
    p.counts[kind] = counts[kind];
  }
  *p.loss = p.normaliser != 0.0 ? static_cast<float>(total / p.normaliser) : 0.0f;
}

}  // namespace pdiff::cpu
