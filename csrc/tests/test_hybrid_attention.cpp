// Every instruction set on buffers of exact size, for the sanitizers, against plain loops.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <type_traits>
#include <vector>

#include "pdiff/hybrid_attention.h"
#include "pdiff/isa.h"
#include "tests/check.h"

namespace {

using pdiff::bfloat16;
using pdiff::float16;
using pdiff::SpanLayout;

float to_float(float x) { return x; }
float to_float(bfloat16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

float to_float(float16 x) {
  const float magnitude = std::ldexp(static_cast<float>(1024 + (x.bits & 1023)),
                                     static_cast<int>(x.bits >> 10 & 31) - 25);
  return x.bits >> 15 != 0 ? -magnitude : magnitude;
}

void set(float& x, float number) { x = number; }
void set(bfloat16& x, float number) {
  uint32_t bits;
  std::memcpy(&bits, &number, sizeof(bits));
  x.bits = static_cast<uint16_t>(bits >> 16);
}
void set(float16& x, float number) {  // of normal halves
  uint32_t bits;
  std::memcpy(&bits, &number, sizeof(bits));
  const uint32_t magnitude = std::max(bits & 0x7fffffffu, 0x38800000u) - 0x38000000u;
  x.bits = static_cast<uint16_t>((bits >> 16 & 0x8000u) | magnitude >> 13);
}

template <typename T>
std::vector<T> random_numbers(std::mt19937& random, size_t size) {
  std::normal_distribution<float> normal;
  std::vector<T> result(size);
  for (T& x : result) set(x, normal(random));
  return result;
}

// One sequence, one KV head, in double.
struct Expected {
  std::vector<double> out, lse, dq, dk, dv;

  template <typename T>
  Expected(const SpanLayout& layout, int heads, int dim, double scale, const std::vector<T>& q,
           const std::vector<T>& k, const std::vector<T>& v, const std::vector<T>& dout)
      : out(q.size()), lse(q.size() / dim), dq(q.size()), dk(k.size()), dv(v.size()) {
    std::vector<uint8_t> mask(static_cast<size_t>(layout.num_rows) * layout.num_keys);
    pdiff::write_dense_mask(layout, mask.data());
    const auto dot = [&](const auto& x, size_t i, const auto& y, size_t j) {
      double sum = 0.0;
      for (int e = 0; e < dim; ++e) {
        sum += static_cast<double>(to_float(x[i * dim + e])) * to_float(y[j * dim + e]);
      }
      return sum;
    };
    for (int row = 0; row < layout.num_rows; ++row) {
      for (int head = 0; head < heads; ++head) {
        const size_t i = static_cast<size_t>(row) * heads + head;
        std::vector<double> p(layout.num_keys);
        double sum = 0.0;
        for (int key = 0; key < layout.num_keys; ++key) {
          const bool seen = mask[static_cast<size_t>(row) * layout.num_keys + key] != 0;
          sum += p[key] = seen ? std::exp(scale * dot(q, i, k, key)) : 0.0;
        }
        lse[static_cast<size_t>(head) * layout.num_rows + row] = std::log(sum);
        double delta = 0.0;
        for (int key = 0; key < layout.num_keys; ++key) {
          p[key] = sum == 0.0 ? 0.0 : p[key] / sum;
          delta += p[key] * dot(dout, i, v, key);
        }
        for (int key = 0; key < layout.num_keys; ++key) {
          const double ds = scale * p[key] * (dot(dout, i, v, key) - delta);
          for (int e = 0; e < dim; ++e) {
            out[i * dim + e] += p[key] * to_float(v[key * dim + e]);
            dv[key * dim + e] += p[key] * to_float(dout[i * dim + e]);
            dk[key * dim + e] += ds * to_float(q[i * dim + e]);
            dq[i * dim + e] += ds * to_float(k[key * dim + e]);
          }
        }
      }
    }
  }
};

template <typename T>
void check_near(const std::vector<T>& actual, const std::vector<double>& expected,
                double tolerance) {
  CHECK_EQ(actual.size(), expected.size());
  for (size_t i = 0; i < expected.size(); ++i) {
    if (std::isinf(expected[i])) {
      CHECK_EQ(static_cast<double>(to_float(actual[i])), expected[i]);
    } else {
      CHECK_NEAR(to_float(actual[i]), expected[i], tolerance * (1.0 + std::fabs(expected[i])));
    }
  }
}

template <typename T>
void check_shape(const SpanLayout& layout, int heads, int dim, int page_size) {
  std::mt19937 random(dim);
  const size_t rows = layout.num_rows, keys = layout.num_keys;
  const auto q = random_numbers<T>(random, rows * heads * dim);
  const auto k = random_numbers<T>(random, keys * dim), v = random_numbers<T>(random, keys * dim);
  const auto dout = random_numbers<T>(random, q.size());
  const float scale = 1.0f / std::sqrt(static_cast<float>(dim));
  const Expected expected(layout, heads, dim, scale, q, k, v, dout);
  const bool is_float = std::is_same_v<T, float>;
  const bool is_float16 = std::is_same_v<T, float16>;
  const double tolerance = is_float ? 2e-5 : is_float16 ? 8e-3 : 6e-2;
  const pdiff::DType dtype = is_float     ? pdiff::DType::kFloat32
                             : is_float16 ? pdiff::DType::kFloat16
                                          : pdiff::DType::kBFloat16;

  // Pages in reverse order; the last slots of the last page hold no key.
  const size_t num_pages = page_size == 0 ? 0 : (keys + page_size - 1) / page_size;
  std::vector<int32_t> table(num_pages);
  for (size_t i = 0; i < num_pages; ++i) table[i] = static_cast<int32_t>(num_pages - 1 - i);
  std::vector<T> k_pages(num_pages * page_size * dim), v_pages(k_pages.size());
  for (size_t key = 0; page_size > 0 && key < keys; ++key) {
    const size_t slot = table[key / page_size] * page_size + key % page_size;
    std::memcpy(&k_pages[slot * dim], &k[key * dim], dim * sizeof(T));
    std::memcpy(&v_pages[slot * dim], &v[key * dim], dim * sizeof(T));
  }
  const pdiff::AttentionPlan plan({&layout}, {.num_heads_q = heads,
                                              .num_heads_kv = 1,
                                              .head_dim = dim,
                                              .page_size = page_size,
                                              .page_table = table.data(),
                                              .max_pages = static_cast<int64_t>(num_pages)});
  const pdiff::PlanView view = pdiff::view_plan(plan.words(), plan.num_words());
  std::vector<T> out(q.size());
  std::vector<float> lse(rows * heads);
  pdiff::hybrid_attention({.plan = view,
                           .dtype = dtype,
                           .q = q.data(),
                           .k = page_size > 0 ? k_pages.data() : k.data(),
                           .v = page_size > 0 ? v_pages.data() : v.data(),
                           .out = out.data(),
                           .lse = lse.data(),
                           .q_stride = heads * dim,
                           .k_stride = dim,
                           .v_stride = dim,
                           .k_page_stride = page_size * dim,
                           .v_page_stride = page_size * dim,
                           .softmax_scale = scale,
                           .num_threads = 1});
  check_near(out, expected.out, tolerance);
  check_near(lse, expected.lse, tolerance);
  if (page_size > 0) return;
  std::vector<T> dq(q.size()), dk(k.size()), dv(v.size());
  pdiff::hybrid_attention_backward({.plan = view,
                                    .dtype = dtype,
                                    .q = q.data(),
                                    .k = k.data(),
                                    .v = v.data(),
                                    .out = out.data(),
                                    .lse = lse.data(),
                                    .dout = dout.data(),
                                    .dlse = nullptr,
                                    .dq = dq.data(),
                                    .dk = dk.data(),
                                    .dv = dv.data(),
                                    .q_stride = heads * dim,
                                    .k_stride = dim,
                                    .v_stride = dim,
                                    .softmax_scale = scale,
                                    .num_threads = 2});
  const double sums = 4 * tolerance;  // dk and dv add up the rows of all heads
  check_near(dq, expected.dq, tolerance);
  check_near(dk, expected.dk, sums);
  check_near(dv, expected.dv, sums);
}

SpanLayout layout_of(const std::vector<int64_t>& num_rows, const std::vector<int32_t>& kinds,
                     const std::vector<int64_t>& interval_ptr,
                     const std::vector<int64_t>& intervals, int64_t num_keys) {
  return pdiff::layout_from_segments(num_keys, static_cast<int64_t>(num_rows.size()),
                                     num_rows.data(), kinds.data(), interval_ptr.data(),
                                     intervals.data());
}

TEST(agrees_with_plain_loops) {
  constexpr int32_t kCausal = pdiff::kCausal, kFull = pdiff::kFull;
  const SpanLayout layouts[] = {
      layout_of({40, 33, 21, 43}, {kCausal, kFull, kFull, kCausal}, {0, 1, 2, 4, 5},
                {0, 40, 0, 73, 0, 40, 73, 94, 0, 137}, 137),
      layout_of({1}, {kCausal}, {0, 1}, {0, 131}, 131),
      layout_of({3, 2}, {kFull, kFull}, {0, 0, 1}, {4, 7}, 7),
      layout_of({}, {}, {0}, {}, 5),
      layout_of({2}, {kFull}, {0, 0}, {}, 0),
  };
  for (int i = 0; i < pdiff::kNumIsas; ++i) {
    pdiff::select_isa(pdiff::isa_name(static_cast<pdiff::Isa>(i)));
    if (pdiff::selected_isa() != static_cast<pdiff::Isa>(i)) continue;
    for (const SpanLayout& layout : layouts) {
      for (const int dim : {1, 17, 64}) {
        for (const int page_size : {0, 7}) {
          check_shape<float>(layout, 3, dim, page_size);
          check_shape<bfloat16>(layout, 3, dim, page_size);
          check_shape<float16>(layout, 3, dim, page_size);
        }
      }
    }
    check_shape<float>(layouts[1], 150, 16, 0);  // one token's heads fill more than a tile
    check_shape<bfloat16>(layouts[1], 150, 16, 0);
    check_shape<float16>(layouts[1], 150, 16, 0);
  }
  pdiff::select_isa(nullptr);
}

TEST(missing_memory_is_named) {
  const SpanLayout layout = layout_of({2}, {pdiff::kFull}, {0, 1}, {0, 2}, 2);
  const pdiff::AttentionPlan plan({&layout}, {.num_heads_q = 1, .num_heads_kv = 1, .head_dim = 1});
  pdiff::HybridAttentionParams params;
  params.plan = pdiff::view_plan(plan.words(), plan.num_words());
  CHECK_THROWS((pdiff::hybrid_attention(params), 0), "q, out: expected memory");
}

}  // namespace

int main() { return pdiff::test::run_all(); }
