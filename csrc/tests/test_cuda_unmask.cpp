// unmask on CUDA, emulated: against the kernel of the CPU and a float64 oracle, over odd shapes,
// alignments and settings, in buffers that end where the data ends.

#include "tests/check.h"

#if PDIFF_EMULATE_CUDA
#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "common/gumbel.h"
#include "common/philox.h"
#include "common/select.h"
#include "cuda/ptx/math.cuh"
#include "pdiff/unmask.h"

namespace {

using pdiff::DType;
using pdiff::PerSpan;
using pdiff::UnmaskParams;
using pdiff::UnmaskRule;
using Random = std::mt19937_64;

constexpr float kInf = std::numeric_limits<float>::infinity();

/// Exactly `size` elements that begin `offset` elements after an alignment to 16 bytes.
template <typename T>
class Buffer {
 public:
  Buffer(size_t size, size_t offset) : offset_(offset), memory_(size + offset) {}
  T* data() { return memory_.data() + offset_; }

 private:
  size_t offset_;
  std::vector<T> memory_;
};

/// A call with everything that it reads.
struct Problem {
  int64_t num_rows, vocab_size, stride, total_tokens;
  DType dtype = DType::kFloat32;
  std::vector<float> logits;  // [num_rows, vocab_size], values that dtype has
  Buffer<uint16_t> narrow{0, 0};
  Buffer<float> wide{0, 0};
  std::vector<int32_t> row_position, cu_rows_span, num_unmask;
  std::vector<int64_t> banned, seeds;
  std::vector<float> temperature, top_p, alg_temp, threshold;
  std::vector<int32_t> top_k, step_idx;
  UnmaskRule rule = UnmaskRule::kEntropy;
  bool per_span = true;

  Problem(int64_t rows, int64_t vocab, const std::vector<int32_t>& lengths)
      : num_rows(rows), vocab_size(vocab), stride(vocab), total_tokens(2 * rows + 3) {
    logits.assign(static_cast<size_t>(rows * vocab), 0.0f);
    for (int64_t row = 0; row < rows; ++row) {
      row_position.push_back(static_cast<int32_t>(2 * row + 1));
      seeds.push_back(row * 977 + (int64_t{3} << 40));
    }
    cu_rows_span.push_back(0);
    for (const int32_t length : lengths) {
      cu_rows_span.push_back(cu_rows_span.back() + length);
      num_unmask.push_back(length);
    }
    const size_t spans = lengths.size();
    temperature.assign(spans, 0.0f), top_p.assign(spans, 1.0f), alg_temp.assign(spans, 0.0f);
    threshold.assign(spans, 0.2f), top_k.assign(spans, 0), step_idx.assign(spans, 4);
  }

  // Rounds the logits to the element type, and lays the rows out.
  void lay_out(DType type, int64_t gap, size_t offset) {
    using namespace pdiff::cuda;
    dtype = type;
    stride = vocab_size + gap;
    const size_t size = num_rows > 0 ? (num_rows - 1) * stride + vocab_size : 0;
    narrow = Buffer<uint16_t>(type == DType::kFloat32 ? 0 : size, offset);
    wide = Buffer<float>(type == DType::kFloat32 ? size : 0, offset);
    for (int64_t row = 0; row < num_rows; ++row) {
      for (int64_t id = 0; id < vocab_size; ++id) {
        float& x = logits[row * vocab_size + id];
        const int64_t at = row * stride + id;
        if (type == DType::kFloat32) {
          wide.data()[at] = x;
        } else if (type == DType::kBFloat16) {
          x = widen<pdiff::bfloat16>(narrow.data()[at] = round_to<pdiff::bfloat16>(x));
        } else {
          x = widen<pdiff::float16>(narrow.data()[at] = round_to<pdiff::float16>(x));
        }
      }
    }
  }

  UnmaskParams params() {
    const auto setting = [&](const auto& values) {
      using T = std::decay_t<decltype(values[0])>;
      return PerSpan<T>{per_span ? values.data() : nullptr, values.empty() ? T{} : values[0]};
    };
    UnmaskParams p{};
    p.logits = dtype == DType::kFloat32 ? static_cast<const void*>(wide.data()) : narrow.data();
    p.logits_dtype = dtype;
    p.logits_stride = stride;
    p.row_position = row_position.data();
    p.cu_rows_span = cu_rows_span.data();
    p.num_unmask = num_unmask.data();
    p.banned_ids = banned.data();
    p.num_banned = static_cast<int64_t>(banned.size());
    p.seeds = seeds.data();
    p.total_tokens = total_tokens;
    p.num_rows = num_rows;
    p.num_spans = static_cast<int64_t>(num_unmask.size());
    p.vocab_size = vocab_size;
    p.rule = rule;
    p.temperature = setting(temperature);
    p.top_p = setting(top_p);
    p.top_k = setting(top_k);
    p.alg_temp = setting(alg_temp);
    p.threshold = setting(threshold);
    p.step_idx = setting(step_idx);
    p.num_threads = 1;
    return p;
  }
};

struct Result {
  std::vector<int64_t> token_ids, candidate;
  std::vector<float> confidence;
  std::vector<uint8_t> is_nan, is_written;

  explicit Result(const Problem& problem)
      : token_ids(problem.total_tokens, -5),
        candidate(problem.num_rows, -7),
        confidence(problem.num_rows, 7.0f),
        is_nan(problem.num_rows, 7),
        is_written(problem.num_rows, 7) {}

  void to(UnmaskParams& p) {
    p.token_ids = token_ids.data();
    p.candidate = candidate.data();
    p.confidence = confidence.data();
    p.is_nan = is_nan.data();
    p.is_written = is_written.data();
  }
};

Result run_cuda(Problem& problem) {
  Result result(problem);
  UnmaskParams p = problem.params();
  result.to(p);
  bool filters = problem.per_span;
  if (!problem.per_span && !problem.top_p.empty()) {
    filters = problem.top_p[0] < 1.0f || problem.top_k[0] > 0;
  }
  const int64_t bytes = pdiff::cuda::unmask_workspace_bytes(p.num_rows, p.vocab_size, filters);
  void* workspace = nullptr;
  CHECK(posix_memalign(&workspace, 16, std::max<int64_t>(bytes, 1)) == 0);
  std::memset(workspace, 0xff, bytes);
  const std::unique_ptr<void, void (*)(void*)> owner(workspace, std::free);
  pdiff::cuda::unmask(p, workspace, bytes, {});
  return result;
}

Result run_cpu(Problem& problem) {
  Result result(problem);
  UnmaskParams p = problem.params();
  result.to(p);
  p.logits = problem.logits.data();
  p.logits_dtype = DType::kFloat32;
  p.logits_stride = problem.vocab_size;
  pdiff::cpu::unmask(p);
  return result;
}

/// What the confidences that a kernel gave say about who is written.
void check_selection(Problem& problem, const Result& result) {
  const UnmaskParams p = problem.params();
  for (int64_t span = 0; span < p.num_spans; ++span) {
    const int32_t begin = problem.cu_rows_span[span], end = problem.cu_rows_span[span + 1];
    std::vector<float> keys(end - begin);
    std::vector<int32_t> rows;
    for (int32_t row = begin; row < end; ++row) {
      if (result.is_nan[row]) continue;
      float& key = keys[row - begin] = result.confidence[row];
      if (p.alg_temp[span] > 0.0f) {
        const pdiff::RandomStream stream = {
            static_cast<uint64_t>(problem.seeds[row]), static_cast<uint32_t>(p.row_position[row]),
            static_cast<uint32_t>(p.step_idx[span]), pdiff::RandomUse::kPosition};
        key = key / p.alg_temp[span] + pdiff::gumbel(pdiff::random_word(stream, 0));
      }
      rows.push_back(row);
    }
    std::sort(rows.begin(), rows.end(), [&](int32_t a, int32_t b) {
      return pdiff::ranks_before(keys[a - begin], a, keys[b - begin], b);
    });
    std::vector<bool> is_written(end - begin, false);
    const size_t num = std::min<size_t>(rows.size(), std::max(problem.num_unmask[span], 0));
    double entropy = 0.0;
    bool goes_on = true;
    for (size_t i = 0; i < num; ++i) {
      const float confidence = result.confidence[rows[i]], threshold = p.threshold[span];
      const double rank = static_cast<double>(i) + 1.0;
      if (p.rule == UnmaskRule::kThreshold) goes_on = confidence >= threshold;
      if (p.rule == UnmaskRule::kFactor) goes_on &= (rank + 1.0) * (1.0 - confidence) < threshold;
      if (p.rule == UnmaskRule::kEntropyBudget) goes_on &= entropy <= threshold;
      if (i == 0) goes_on = true;
      is_written[rows[i] - begin] = goes_on;
      entropy -= confidence;
    }
    for (int32_t row = begin; row < end; ++row) {
      CHECK_EQ(result.is_written[row] != 0, is_written[row - begin]);
      CHECK_EQ(result.token_ids[problem.row_position[row]],
               is_written[row - begin] ? result.candidate[row] : -5);
    }
  }
}

void check_agrees(Problem& problem) {
  const Result actual = run_cuda(problem), expected = run_cpu(problem);
  for (int64_t row = 0; row < problem.num_rows; ++row) {
    CHECK_EQ(int{actual.is_nan[row]}, int{expected.is_nan[row]});
    CHECK_EQ(actual.candidate[row], expected.candidate[row]);
    if (expected.is_nan[row]) {
      CHECK(std::isnan(actual.confidence[row]));
    } else {
      CHECK_NEAR(actual.confidence[row], expected.confidence[row],
                 1e-4 * std::max(1.0f, std::fabs(expected.confidence[row])));
    }
  }
  check_selection(problem, actual);
}

template <typename T>
T one_of(Random& random, std::initializer_list<T> values) {
  return values.begin()[random() % values.size()];
}

void fill(Problem& problem, Random& random) {
  std::normal_distribution<float> normal(0.0f, one_of(random, {0.3f, 3.0f, 3.0f, 30.0f}));
  for (int64_t row = 0; row < problem.num_rows; ++row) {
    const auto kind = random() % 12;
    float* x = problem.logits.data() + row * problem.vocab_size;
    for (int64_t id = 0; id < problem.vocab_size; ++id) {
      x[id] = normal(random);
      if (kind == 0) x[id] = std::round(x[id]);  // many ties
      if (kind == 1) x[id] = -1.5f;
      if (kind == 2 && random() % 3 == 0) x[id] = -kInf;
      if (kind == 3) x[id] += 10000.0f;
    }
    const auto some = static_cast<int64_t>(random() % problem.vocab_size);
    if (kind == 4) x[some] = NAN;
    if (kind == 5) x[some] = kInf;
    if (kind == 6) std::fill_n(x, problem.vocab_size, -kInf);
    if (kind == 7) x[some] = 1000.0f;
  }
}

TEST(agrees_with_the_cpu_over_shapes_and_settings) {
  Random random(7);
  for (int i = 0; i < 160; ++i) {
    const auto vocab =
        one_of<int64_t>(random, {1, 3, 8, 31, 100, 257, 1000, 4095, 4096, 4097, 4111, 9001, 13000});
    std::vector<int32_t> lengths(1 + random() % 4);
    for (int32_t& length : lengths) length = static_cast<int32_t>(random() % 4);
    Problem problem(std::accumulate(lengths.begin(), lengths.end(), 0), vocab, lengths);
    problem.rule = static_cast<UnmaskRule>(random() % 6);
    problem.per_span = random() % 2 == 0;
    for (size_t span = 0; span < lengths.size(); ++span) {
      problem.num_unmask[span] = static_cast<int32_t>(random() % 5) - 1;
      problem.temperature[span] = one_of(random, {0.0f, 0.0f, 0.2f, 1.0f, 1.5f, 40.0f});
      problem.top_p[span] = one_of(random, {1.0f, 1.0f, 0.0f, 0.3f, 0.9f, 0.97f, 0.9999f});
      problem.top_k[span] = one_of(random, {0, 0, 1, 5, 50, 1000, 5000, 20000});
      problem.alg_temp[span] = one_of(random, {0.0f, 0.0f, 0.4f});
      problem.threshold[span] = one_of(random, {0.0f, 0.1f, 0.6f, 2.5f, kInf});
      problem.step_idx[span] = static_cast<int32_t>(random() % 9);
    }
    for (size_t ban = one_of<size_t>(random, {0, 0, 1, 7, 40, 700}); ban > 0; --ban) {
      problem.banned.push_back(static_cast<int64_t>(random() % vocab));
    }
    fill(problem, random);
    problem.lay_out(static_cast<DType>(random() % 3), one_of<int64_t>(random, {0, 0, 1, 8, 24}),
                    one_of<size_t>(random, {0, 0, 1, 2, 4, 7}));
    check_agrees(problem);
    if (pdiff::test::num_failures() > 0) {
      std::fprintf(stderr, "problem %d\n", i);
      return;
    }
  }
}

TEST(entropy_of_a_large_vocabulary_is_that_of_double) {
  Random random(3);
  std::normal_distribution<float> normal(0.0f, 2.0f);
  Problem problem(2, 152064, {2});
  for (float& x : problem.logits) x = normal(random);
  problem.logits[152063] = 14.0f;
  for (const int64_t id : {5, 5 + 32 * 4096})
    problem.logits[152064 + id] = 14.0f;  // the first wins
  problem.lay_out(DType::kBFloat16, 0, 0);
  const Result result = run_cuda(problem);
  for (int64_t row = 0; row < 2; ++row) {
    const float* x = problem.logits.data() + row * problem.vocab_size;
    const double max = *std::max_element(x, x + problem.vocab_size);
    double sum = 0.0, weighted = 0.0;
    for (int64_t id = 0; id < problem.vocab_size; ++id) {
      sum += std::exp(x[id] - max);
      weighted += (x[id] - max) * std::exp(x[id] - max);
    }
    const double expected = weighted / sum - std::log(sum);
    CHECK_NEAR(result.confidence[row], expected, 3e-6 * std::fabs(expected));
    CHECK_EQ(result.candidate[row], std::max_element(x, x + problem.vocab_size) - x);
  }
}

TEST(a_row_is_the_same_however_the_work_is_shared_out) {
  Random random(5);
  std::normal_distribution<float> normal(0.0f, 3.0f);
  // So many segments that a warp of the three emulated multiprocessors takes two of them.
  constexpr int32_t kRows = 80;
  Problem many(kRows, 40001, {kRows});
  for (float& x : many.logits) x = normal(random);
  many.temperature = {0.8f};
  many.per_span = false;
  many.lay_out(DType::kBFloat16, 0, 0);
  const Result all = run_cuda(many);
  for (const int32_t row : {0, 7, 41, 79}) {
    Problem one(1, many.vocab_size, {1});
    one.logits.assign(many.logits.begin() + row * many.vocab_size,
                      many.logits.begin() + (row + 1) * many.vocab_size);
    one.row_position = {2 * row + 1};
    one.total_tokens = many.total_tokens;
    one.seeds = {many.seeds[row]};
    one.temperature = {0.8f};
    one.per_span = false;
    one.lay_out(DType::kBFloat16, 0, 3);  // another alignment, too
    const Result alone = run_cuda(one);
    CHECK_EQ(alone.candidate[0], all.candidate[row]);
    CHECK(std::memcmp(&alone.confidence[0], &all.confidence[row], sizeof(float)) == 0);
  }
}

TEST(top_p_cuts_ties_by_id_where_the_list_is_too_short) {
  for (const int64_t vocab : {4097, 20000}) {
    for (const float top_p : {0.0f, 0.3f, 0.97f}) {
      Problem problem(2, vocab, {2});
      problem.top_p = {top_p};
      problem.rule = UnmaskRule::kProbability;
      problem.logits[vocab / 2] = 1.0f;  // of the first row; the second is all ties
      problem.lay_out(DType::kFloat16, 0, 0);
      check_agrees(problem);
    }
  }
}

TEST(a_prefix_ends_exactly_where_it_reaches_its_goal) {
  for (const int64_t vocab : {8, 8192}) {  // sums of powers of two: half is half
    Problem problem(1, vocab, {1});
    problem.top_p = {0.5f};
    problem.rule = UnmaskRule::kProbability;
    problem.lay_out(DType::kFloat32, 0, 0);
    const Result result = run_cuda(problem);
    CHECK_EQ(result.confidence[0], 2.0f / static_cast<float>(vocab));
  }
  for (int32_t top_k = 4996; top_k < 5004; ++top_k) {  // the last of a bin, too
    Problem problem(1, 8192, {1});
    std::iota(problem.logits.begin(), problem.logits.end(), 0.0f);
    problem.temperature = {8192.0f};
    problem.top_k = {top_k};
    problem.lay_out(DType::kFloat32, 0, 0);
    check_agrees(problem);
  }
}

TEST(mass_is_counted_exactly) {
  constexpr int64_t kVocab = 60001;
  constexpr float kTopP = 0.5f, kLogit = -0.9f;
  Problem problem(1, kVocab, {1});
  std::fill(problem.logits.begin(), problem.logits.end(), kLogit);
  problem.logits[777] = 0.0f;
  problem.top_p = {kTopP};
  problem.rule = UnmaskRule::kProbability;
  problem.lay_out(DType::kFloat32, 0, 0);
  const double weight = pdiff::cuda::exp2_fast(kLogit * 1.44269504f);
  const double num = std::ceil((kTopP * (1.0 + (kVocab - 1) * weight) - 1.0) / weight);
  const double actual = (1.0 / run_cuda(problem).confidence[0] - 1.0) / weight;
  CHECK_NEAR(actual, num, 1.01);
}

TEST(a_banned_token_is_never_drawn) {
  Problem problem(1, 5000, {1});
  problem.temperature = {1.0f};
  for (int64_t id = 0; id < 5000; id += 4) {
    problem.logits[id] = 30.0f;
    problem.banned.push_back(id);
  }
  problem.lay_out(DType::kBFloat16, 0, 0);
  check_agrees(problem);
}

TEST(bins_are_narrowed_until_the_end_of_the_prefix_is_found) {
  Random random(11);
  Problem problem(3, 9001, {1, 1, 1});
  for (int64_t id = 0; id < 9001; ++id) {
    problem.logits[id] = id == 17 ? 3e38f : -1e-3f * static_cast<float>(random() % 9001);
    problem.logits[9001 + id] = static_cast<float>(random() % 9001) * 1e-44f;  // denormal
    problem.logits[18002 + id] = id % 2 == 0 ? -3e38f : 1e-30f * static_cast<float>(random() % 999);
  }
  problem.top_k = {5000, 4500, 4400};
  problem.lay_out(DType::kFloat32, 0, 0);
  check_agrees(problem);
}

TEST(long_spans_choose_as_short_ones_do) {
  Random random(13);
  for (const bool ties : {false, true}) {
    constexpr int32_t kRows = 1500;
    Problem problem(kRows, 5, {700, 0, 300, 500});
    for (float& x : problem.logits) {
      x = static_cast<float>(ties ? random() % 3 : random() % 100000 / 3e4);
    }
    problem.num_unmask = {123, 5, 299, 256};
    problem.alg_temp = {0.0f, 0.0f, ties ? 0.0f : 0.3f, 0.0f};
    problem.rule = ties ? UnmaskRule::kThreshold : UnmaskRule::kMargin;
    problem.lay_out(DType::kFloat32, 0, 0);
    check_agrees(problem);
  }
}

// More than a block has threads, and more than it sorts in shared memory.
TEST(a_prefix_ends_where_it_should_in_spans_of_any_length) {
  Random random(17);
  for (const UnmaskRule rule : {UnmaskRule::kFactor, UnmaskRule::kEntropyBudget}) {
    for (const bool ties : {false, true}) {
      const std::vector<int32_t> lengths = {2300, 1, 255, 0, 256, 257, 600, 90};
      Problem problem(3759, 3, lengths);
      for (float& x : problem.logits) {
        x = static_cast<float>(ties ? random() % 3 : random() % 100000 / 2e4);
      }
      std::fill_n(problem.logits.begin() + 3669 * 3, 90 * 3, -kInf);  // no row has a rank
      for (const int64_t row : {0, 40, 2299, 2310}) problem.logits[3 * row + 1] = NAN;
      problem.num_unmask = {4000, 1, 255, 3, 100, 300, 600, 90};
      problem.threshold = {300.0f, 0.0f, 40.0f, 1.0f, kInf, 15.0f, 0.0f, 5.0f};
      problem.alg_temp = {ties ? 0.0f : 0.3f, 0.0f, 0.3f, 0.0f, 0.0f, 0.0f, 0.1f, 0.0f};
      problem.rule = rule;
      problem.lay_out(DType::kFloat32, 0, 0);
      check_agrees(problem);
    }
  }
}

TEST(what_is_out_of_range_is_skipped) {
  Problem problem(4, 9, {2, 2});
  for (size_t i = 0; i < problem.logits.size(); ++i) problem.logits[i] = static_cast<float>(i % 9);
  problem.lay_out(DType::kFloat32, 0, 0);
  problem.row_position = {-1, 3, static_cast<int32_t>(problem.total_tokens), INT32_MAX};
  problem.banned = {-3, 8, 9, int64_t{1} << 40};
  const Result result = run_cuda(problem);
  CHECK(result.is_written == std::vector<uint8_t>({0, 1, 0, 0}));
  CHECK_EQ(result.candidate[2], 7);
  CHECK_EQ(result.token_ids[3], 7);
  problem.cu_rows_span = {-5, 900, 2};
  (void)run_cuda(problem);
}

TEST(wrong_arguments_are_named) {
  Problem problem(2, 9, {2});
  problem.lay_out(DType::kFloat32, 0, 0);
  Result result(problem);
  UnmaskParams p = problem.params();
  result.to(p);
  const int64_t bytes = pdiff::cuda::unmask_workspace_bytes(2, 9, true);
  std::vector<double> workspace(bytes / 8 + 2);
  const auto run = [&](UnmaskParams changed, int64_t workspace_bytes) {
    pdiff::cuda::unmask(changed, workspace.data(), workspace_bytes, {});
  };
  CHECK_THROWS(run(p, bytes - 1), "workspace: expected");
  UnmaskParams changed = p;
  changed.logits = reinterpret_cast<const char*>(p.logits) + 2;
  CHECK_THROWS(run(changed, bytes), "logits: expected elements of 4 bytes");
  changed = p;
  changed.vocab_size = INT32_MAX;
  CHECK_THROWS(run(changed, bytes), "logits: expected 1 to 2^31 columns");
  changed = p;
  changed.logits_stride = INT64_MAX / 4;
  CHECK_THROWS(run(changed, bytes), "logits: expected rows that can be addressed");
  changed = p;
  changed.logits_dtype = static_cast<DType>(9);
  CHECK_THROWS(run(changed, bytes), "logits: expected float32, bfloat16 or float16");
  changed = p;
  changed.temperature = {nullptr, -1.0f};
  CHECK_THROWS(run(changed, bytes), "temperature: expected a finite number >= 0");
  changed = p;
  changed.threshold = {nullptr, NAN};
  CHECK_THROWS(run(changed, bytes), "threshold: expected >= 0");
  changed = p;
  changed.num_rows = 0;
  changed.num_spans = 0;
  pdiff::cuda::unmask(changed, nullptr, 0, {});
}

}  // namespace

int main() { return pdiff::test::run_all(); }
#else
int main() { return 77; }  // skipped
#endif
