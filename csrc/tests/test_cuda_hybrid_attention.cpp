// The attention kernels for GPUs on the emulated machine, against an oracle in float64. Every
// tensor has its own allocation of its exact size, so that a sanitizer sees what is read beside it.

#include "tests/check.h"

#if PDIFF_EMULATE_CUDA
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "cuda/ptx/math.cuh"
#include "pdiff/attention_plan.h"
#include "pdiff/device.h"
#include "pdiff/hybrid_attention.h"
#include "tests/random_layout.h"

namespace {

using namespace pdiff;

using test::random_document;
using test::random_int;
using test::random_layout;

// 16-bit elements, aligned as a device allocation, of which nothing more may be touched.
using Elements = std::unique_ptr<uint16_t, decltype(&std::free)>;

Elements allocate(int64_t num_elements) {
  void* memory = nullptr;
  const size_t bytes = static_cast<size_t>(std::max<int64_t>(1, num_elements)) * 2;
  if (posix_memalign(&memory, 128, bytes) != 0) std::abort();
  std::memset(memory, 0xff, bytes);  // NaN
  return {static_cast<uint16_t*>(memory), &std::free};
}

struct Problem {
  std::vector<SpanLayout> layouts;
  int num_heads_q = 1, num_heads_kv = 1, head_dim = 64, page_size = 0;
  bool split_keys = true;
  int tile_rows = 0;
  int padding = 0;  // elements between rows
  float scale = 0.125f;
};

template <typename T>
class Run {
 public:
  Run(const Problem& problem, std::mt19937& random) : p(problem) {
    std::vector<const SpanLayout*> pointers;
    for (const SpanLayout& layout : p.layouts) {
      pointers.push_back(&layout);
      total_q += layout.num_rows;
      total_kv += layout.num_keys;
    }
    AttentionPlanOptions options{.num_heads_q = p.num_heads_q,
                                 .num_heads_kv = p.num_heads_kv,
                                 .head_dim = p.head_dim,
                                 .schedule = Schedule::kGpu,
                                 .split_keys = p.split_keys,
                                 .tile_rows = p.tile_rows,
                                 .page_size = p.page_size};
    std::vector<int32_t> table;
    if (p.page_size > 0) deal_pages(random, table, options);
    plan = std::make_unique<AttentionPlan>(pointers, options);
    q_stride = int64_t{p.num_heads_q} * p.head_dim + p.padding;
    kv_stride = int64_t{p.num_heads_kv} * p.head_dim + p.padding;
    const int64_t num_slots = p.page_size > 0 ? int64_t{num_pages} * p.page_size : total_kv;
    q_size = total_q > 0 ? (total_q - 1) * q_stride + p.num_heads_q * p.head_dim : 0;
    kv_size = num_slots > 0 ? (num_slots - 1) * kv_stride + p.num_heads_kv * p.head_dim : 0;
    q = allocate(q_size), k = allocate(kv_size), v = allocate(kv_size);
    std::normal_distribution<float> normal;
    const auto fill = [&](uint16_t* row, int num_heads) {
      for (int i = 0; i < num_heads * p.head_dim; ++i) row[i] = cuda::round_to<T>(normal(random));
    };
    for (int64_t row = 0; row < total_q; ++row) fill(q.get() + row * q_stride, p.num_heads_q);
    for (size_t s = 0; s < p.layouts.size(); ++s) {
      for (int key = 0; key < p.layouts[s].num_keys; ++key) {
        fill(k.get() + slot(s, key) * kv_stride, p.num_heads_kv);
        fill(v.get() + slot(s, key) * kv_stride, p.num_heads_kv);
      }
    }
    out = allocate(total_q * p.num_heads_q * p.head_dim);
    lse.assign(total_q * p.num_heads_q, NAN);
  }

  // Calls the kernel; a canary lies behind the workspace.
  void forward() {
    const PlanHeader& h = plan->header();
    const int64_t bytes =
        cuda::hybrid_attention_workspace_bytes(h.num_slots, p.num_heads_kv, p.head_dim);
    const Elements workspace = allocate((bytes + 1) / 2 + 8);
    auto* canary = reinterpret_cast<unsigned char*>(workspace.get()) + bytes;
    std::memset(canary, 0x5a, 16);
    const int64_t page_stride = p.page_size * kv_stride;
    cuda::hybrid_attention(
        {.plan = plan->words(),
         .num_slots = h.num_slots,
         .dtype = std::is_same_v<T, bfloat16> ? DType::kBFloat16 : DType::kFloat16,
         .total_q = static_cast<int32_t>(total_q),
         .num_keys = p.page_size > 0 ? num_pages : total_kv,
         .num_heads_q = p.num_heads_q,
         .num_heads_kv = p.num_heads_kv,
         .head_dim = p.head_dim,
         .page_size = p.page_size,
         .q = q.get(),
         .k = k.get(),
         .v = v.get(),
         .out = out.get(),
         .lse = lse.empty() ? nullptr : lse.data(),
         .q_stride = q_stride,
         .k_stride = kv_stride,
         .v_stride = kv_stride,
         .k_page_stride = page_stride,
         .v_page_stride = page_stride,
         .softmax_scale = p.scale,
         .workspace = workspace.get()},
        {});
    for (int i = 0; i < 16; ++i) CHECK_EQ(canary[i], 0x5a);
  }

  float q_at(int64_t row, int head, int d) const {
    return cuda::widen<T>(q.get()[row * q_stride + head * p.head_dim + d]);
  }
  float kv_at(const Elements& x, int64_t slot, int head, int d) const {
    return cuda::widen<T>(x.get()[slot * kv_stride + head * p.head_dim + d]);
  }

  // Checks out, relative to the values that a row mixes, and lse.
  void compare() const {
    const double eps = std::is_same_v<T, bfloat16> ? 0x1p-8 : 0x1p-11;
    int64_t first_row = 0;
    const int group_size = p.num_heads_q / p.num_heads_kv;
    for (size_t s = 0; s < p.layouts.size(); ++s) {
      const SpanLayout& layout = p.layouts[s];
      const std::vector<uint8_t> mask = test::dense_mask(layout);
      for (int row = 0; row < layout.num_rows; ++row) {
        for (int head = 0; head < p.num_heads_q; ++head) {
          compare_row(s, first_row + row, head, head / group_size,
                      mask.data() + static_cast<size_t>(row) * layout.num_keys, eps);
        }
      }
      first_row += layout.num_rows;
    }
  }

  Problem p;
  int64_t total_q = 0, total_kv = 0, q_stride = 0, kv_stride = 0, q_size = 0, kv_size = 0;
  int num_pages = 0;
  std::unique_ptr<AttentionPlan> plan;
  Elements q = allocate(0), k = allocate(0), v = allocate(0), out = allocate(0);
  std::vector<float> lse;

 private:
  // Where a key of a sequence lies.
  int64_t slot(size_t sequence, int key) const {
    if (p.page_size > 0) {
      return int64_t{pages[sequence][key / p.page_size]} * p.page_size + key % p.page_size;
    }
    int64_t first = 0;
    for (size_t s = 0; s < sequence; ++s) first += p.layouts[s].num_keys;
    return first + key;
  }

  void deal_pages(std::mt19937& random, std::vector<int32_t>& table,
                  AttentionPlanOptions& options) {
    size_t max_pages = 0;
    for (const SpanLayout& layout : p.layouts) {
      const int count = (layout.num_keys + p.page_size - 1) / p.page_size;
      pages.emplace_back(count);
      for (int32_t& page : pages.back()) page = num_pages++;
      max_pages = std::max(max_pages, pages.back().size());
    }
    std::vector<int32_t> ids(num_pages);
    for (int i = 0; i < num_pages; ++i) ids[i] = i;
    std::shuffle(ids.begin(), ids.end(), random);
    table.assign(p.layouts.size() * max_pages, -1);
    for (size_t s = 0; s < pages.size(); ++s) {
      for (size_t i = 0; i < pages[s].size(); ++i) {
        pages[s][i] = table[s * max_pages + i] = ids[pages[s][i]];
      }
    }
    options.page_table = table.data();
    options.max_pages = static_cast<int64_t>(max_pages);
  }

  void compare_row(size_t s, int64_t row, int head, int kv_head, const uint8_t* mask,
                   double eps) const {
    std::vector<double> weight(p.layouts[s].num_keys, 0.0);
    double max = -INFINITY, sum = 0.0;
    for (size_t key = 0; key < weight.size(); ++key) {
      if (mask[key] == 0) continue;
      double score = 0.0;
      for (int d = 0; d < p.head_dim; ++d) {
        score += double{q_at(row, head, d)} * kv_at(k, slot(s, static_cast<int>(key)), kv_head, d);
      }
      weight[key] = score * p.scale;
      max = std::max(max, weight[key]);
    }
    for (size_t key = 0; key < weight.size(); ++key) {
      weight[key] = mask[key] != 0 ? std::exp(weight[key] - max) : 0.0;
      sum += weight[key];
    }
    const float actual_lse = lse[head * total_q + row];
    if (sum == 0.0) {
      CHECK_EQ(actual_lse, -INFINITY);
    } else {
      CHECK_NEAR(actual_lse, max + std::log(sum), 1e-3);
    }
    double worst = 0.0;
    for (int d = 0; d < p.head_dim; ++d) {
      double expected = 0.0, magnitude = 0.0;
      for (size_t key = 0; key < weight.size(); ++key) {
        if (mask[key] == 0) continue;
        const double x = kv_at(v, slot(s, static_cast<int>(key)), kv_head, d);
        expected += weight[key] / sum * x;
        magnitude += weight[key] / sum * std::fabs(x);
      }
      const double actual =
          cuda::widen<T>(out.get()[(row * p.num_heads_q + head) * p.head_dim + d]);
      const double error = std::fabs(actual - expected);
      worst = std::max(worst, std::isnan(error) ? INFINITY : error / (magnitude + 1e-3));
    }
    CHECK_NEAR(worst, 0.0, 2.05 * eps);  // weights and out are each rounded once
  }

  std::vector<std::vector<int32_t>> pages;  // of each sequence
};

template <typename T>
void check(const Problem& problem, std::mt19937& random) {
  for (const char* kernels : {"portable", "sm90a"}) {
    select_cuda_kernels(kernels);
    // The Python tests have the other pairs.
    if (std::is_same_v<T, float16> && cuda_kernels(0) == CudaKernels::kSm90a) continue;
    Run<T> run(problem, random);
    emulation::statistics() = {};
    run.forward();
    CHECK_EQ(emulation::statistics().matrix_load_conflicts, 0);
    run.compare();
  }
  select_cuda_kernels(nullptr);
}

void check_both(const Problem& problem, std::mt19937& random) {
  check<bfloat16>(problem, random);
  check<float16>(problem, random);
}

SpanLayout causal(int rows, int keys) {
  const int64_t num_rows = rows, ptr[] = {0, 1}, interval[] = {0, keys};
  const int32_t kind = kCausal;
  return layout_from_segments(keys, 1, &num_rows, &kind, ptr, interval);
}

TEST(causal_text) {
  std::mt19937 random(1);
  check_both({.layouts = {causal(150, 150)}}, random);
  check_both(
      {.layouts = {causal(40, 200), causal(1, 1)}, .num_heads_q = 7, .head_dim = 128, .padding = 8},
      random);
}

TEST(tiles_may_have_fewer_rows_than_fit) {
  std::mt19937 random(6);
  check<bfloat16>({.layouts = {causal(50, 90), causal(3, 3)}, .num_heads_q = 3, .tile_rows = 11},
                  random);
}

TEST(random_layouts) {
  std::mt19937 random(2);
  for (int trial = 0; trial < 24; ++trial) {
    Problem problem;
    for (int i = random_int(random, 1, 3); i > 0; --i) {
      problem.layouts.push_back(random_int(random, 0, 1) == 0 ? random_document(random, 60)
                                                              : random_layout(random, 250, 40, 7));
    }
    const int ratios[] = {1, 2, 3, 7, 16, 128};
    problem.num_heads_kv = random_int(random, 1, 2);
    problem.num_heads_q =
        problem.num_heads_kv * ratios[random_int(random, 0, trial % 5 + trial / 23)];
    problem.head_dim = random_int(random, 0, 1) == 0 ? 64 : 128;
    const int page_sizes[] = {0, 1, 16, 48, 64, 128};
    problem.page_size = page_sizes[random_int(random, 0, 5)];
    problem.split_keys = random_int(random, 0, 1) == 0;
    problem.padding = random_int(random, 0, 2) * 8;
    problem.scale = trial % 5 == 0 ? 0.0f : trial % 5 == 1 ? 1.0f : 0.125f;
    if (trial % 2 == 0) {
      check<bfloat16>(problem, random);
    } else {
      check<float16>(problem, random);
    }
  }
}

TEST(few_rows_of_many_keys) {
  std::mt19937 random(4);
  int64_t num_slots = 0;
  for (int trial = 0; trial < 12; ++trial) {
    Problem problem;
    for (int i = random_int(random, 2, 5); i > 0; --i) {
      problem.layouts.push_back(random_layout(random, 1800, 2, 2));
    }
    problem.layouts.push_back(causal(2, random_int(random, 500, 1500)));
    problem.num_heads_kv = random_int(random, 1, 2);
    problem.num_heads_q = problem.num_heads_kv * (trial % 2 == 0 ? 4 : 7);
    problem.head_dim = trial % 3 == 0 ? 128 : 64;
    const int page_sizes[] = {0, 16, 24, 128};
    problem.page_size = page_sizes[random_int(random, 0, 3)];
    problem.split_keys = trial % 4 > 0;
    check<bfloat16>(problem, random);
    num_slots += Run<bfloat16>(problem, random).plan->header().num_slots;
  }
  CHECK(num_slots > 10);
}

// A plan of its own for each row gives the bits that one plan for all of them gives.
TEST(bits_ignore_the_rows_beside) {
  std::mt19937 random(5);
  const int num_keys = 333;
  Run<bfloat16> whole({.layouts = {causal(40, num_keys)}, .num_heads_q = 5, .split_keys = false},
                      random);
  whole.forward();
  for (const int rows : {1, 3, 17}) {
    Run<bfloat16> part({.layouts = {causal(rows, num_keys)}, .num_heads_q = 5, .split_keys = false},
                       random);
    const int64_t row_elements = 5 * 64, first = (40 - rows) * row_elements;
    std::memcpy(part.q.get(), whole.q.get() + first, rows * row_elements * 2);
    std::memcpy(part.k.get(), whole.k.get(), whole.kv_size * 2);
    std::memcpy(part.v.get(), whole.v.get(), whole.kv_size * 2);
    part.forward();
    CHECK_EQ(std::memcmp(part.out.get(), whole.out.get() + first, rows * row_elements * 2), 0);
  }
}

TEST(wrong_arguments_are_named) {
  std::mt19937 random(3);
  Run<bfloat16> run({.layouts = {causal(3, 3)}, .padding = 4}, random);
  CHECK_THROWS(run.forward(), "q: expected rows aligned to 16 bytes");
  run.p.head_dim = 80;
  CHECK_THROWS(run.forward(), "head_dim: expected 64 or 128, got 80");
}

}  // namespace

int main() { return pdiff::test::run_all(); }
#else
int main() { return 77; }  // skipped
#endif
