// The CUDA cross-entropy on allocations of exactly its size, for the sanitizers to watch.

#include "tests/check.h"

#if PDIFF_EMULATE_CUDA
#include <cuda_runtime.h>

#include <cmath>
#include <memory>
#include <random>
#include <vector>

#include "cuda/ptx/math.cuh"
#include "pdiff/weighted_cross_entropy.h"

namespace {

using namespace pdiff;

template <typename T>
T rounded(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else {
    return {cuda::round_to<T>(x)};
  }
}

template <typename T>
float widened(T x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else {
    return cuda::widen<T>(x.bits);
  }
}

template <typename T>
void check_rows(DType dtype, int num_rows, int vocab_size, int gap, bool in_place) {
  std::mt19937 random(num_rows + vocab_size + gap);
  std::normal_distribution<float> normal;
  const int stride = vocab_size + gap;
  const size_t size = num_rows == 0 ? 0 : static_cast<size_t>(num_rows - 1) * stride + vocab_size;
  std::unique_ptr<T[]> logits(new T[size]), fresh(in_place ? nullptr : new T[size]);
  for (size_t i = 0; i < size; ++i) logits[i] = rounded<T>(4.0f * normal(random));
  std::vector<T> before(logits.get(), logits.get() + size);
  std::vector<int64_t> labels(num_rows);
  std::vector<float> weight(num_rows);
  std::vector<uint8_t> kind(num_rows);
  for (int row = 0; row < num_rows; ++row) {
    labels[row] = row % 4 == 2 ? -100 : static_cast<int64_t>(random() % vocab_size);
    weight[row] = static_cast<float>(random() % 5);
    kind[row] = random() % 2;
  }
  float loss = NAN, weighted[2], unweighted[2];
  int64_t counts[2];
  const double normaliser = 3.0;
  const std::unique_ptr<char[]> workspace(
      new char[cuda::weighted_cross_entropy_workspace_bytes(num_rows)]);
  T* dlogits = in_place ? logits.get() : fresh.get();
  const WeightedCrossEntropyParams params{.logits = logits.get(),
                                          .labels = labels.data(),
                                          .weight = weight.data(),
                                          .kind = kind.data(),
                                          .dlogits = dlogits,
                                          .loss = &loss,
                                          .weighted_sums = weighted,
                                          .unweighted_sums = unweighted,
                                          .counts = counts,
                                          .dtype = dtype,
                                          .logits_stride = stride,
                                          .dlogits_stride = stride,
                                          .num_rows = num_rows,
                                          .vocab_size = vocab_size,
                                          .normaliser = NAN,
                                          .num_threads = 0};
  cuda::weighted_cross_entropy(params, &normaliser, workspace.get(), {});

  const double ulp = dtype == DType::kFloat32 ? 1e-5 : dtype == DType::kBFloat16 ? 0x1p-8 : 0x1p-11;
  double total = 0.0;
  int64_t num_counted = 0;
  for (int row = 0; row < num_rows; ++row) {
    const T* x = before.data() + static_cast<size_t>(row) * stride;
    const T* dx = dlogits + static_cast<size_t>(row) * stride;
    const bool counted = labels[row] >= 0;
    double sum = 0.0;
    for (int i = 0; i < vocab_size; ++i) sum += std::exp(double{widened(x[i])});
    if (counted) total += weight[row] * (std::log(sum) - widened(x[labels[row]]));
    num_counted += counted;
    bool is_right = true;
    for (int i = 0; i < vocab_size; ++i) {
      const double p = std::exp(double{widened(x[i])}) / sum - (i == labels[row]);
      const double expected = counted ? weight[row] / normaliser * p : 0.0;
      is_right &= std::fabs(widened(dx[i]) - expected) <= ulp * std::fabs(expected) + 1e-7;
    }
    CHECK(is_right);
  }
  CHECK_NEAR(loss, total / normaliser, 1e-5 * std::fabs(total) + 1e-12);
  CHECK_EQ(counts[0] + counts[1], num_counted);

  const float factor = 0.5f;
  const std::vector<T> unscaled(dlogits, dlogits + size);
  cuda::scale_gradient(dlogits, dtype, stride, num_rows, vocab_size, &factor, {});
  bool is_right = true;
  for (int row = 0; row < num_rows; ++row) {
    for (int i = 0; i < vocab_size; ++i) {
      const size_t at = static_cast<size_t>(row) * stride + i;
      is_right &= std::fabs(widened(dlogits[at]) - 0.5f * widened(unscaled[at])) <= 1e-7;
    }
  }
  CHECK(is_right);
}

TEST(rows_of_all_sizes_stay_in_their_memory) {
  for (const bool in_place : {true, false}) {
    for (const int gap : {0, 1, 5, 8}) {
      for (const int vocab_size : {1, 3, 8, 15, 129, 1000, 2051}) {
        check_rows<bfloat16>(DType::kBFloat16, 5, vocab_size, gap, in_place);
        check_rows<float16>(DType::kFloat16, 5, vocab_size, gap, in_place);
        check_rows<float>(DType::kFloat32, 5, vocab_size, gap, in_place);
      }
    }
  }
}

TEST(a_row_may_be_larger_than_shared_memory) {
  emulation::Device& device = emulation::device();
  const emulation::Device usual = device;
  device.max_shared_bytes = 99 * 1024;
  for (const int vocab_size : {55000, 60013}) {
    check_rows<bfloat16>(DType::kBFloat16, 7, vocab_size, 1, true);
  }
  check_rows<float>(DType::kFloat32, 5, 27001, 1, false);
  device = usual;
  for (const int vocab_size : {60013, 152064}) {
    check_rows<bfloat16>(DType::kBFloat16, 4, vocab_size, 0, true);
  }
}

TEST(no_rows_are_nothing) { check_rows<float>(DType::kFloat32, 0, 10, 0, true); }

}  // namespace

int main() { return pdiff::test::run_all(); }
#else
int main() { return 77; }  // skipped
#endif
