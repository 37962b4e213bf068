// The backward for GPUs, emulated, against sums over the dense mask in double.

#include "tests/check.h"

#if PDIFF_EMULATE_CUDA
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "cuda/ptx/math.cuh"
#include "pdiff/attention_plan.h"
#include "pdiff/hybrid_attention.h"
#include "tests/random_layout.h"

namespace {

using pdiff::AttentionPlan;
using pdiff::DType;
using pdiff::SpanLayout;
using pdiff::test::random_int;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Elements as 16 bits and as what they stand for. Memory ends where the tensor does.
struct Tensor {
  struct Free {
    void operator()(uint16_t* p) const { ::operator delete[](p, std::align_val_t{16}); }
  };
  int64_t size;
  std::unique_ptr<uint16_t[], Free> bits;
  bool is_bfloat16;

  Tensor(int64_t size, bool is_bfloat16)
      : size(size),
        bits(static_cast<uint16_t*>(
            ::operator new[](static_cast<size_t>(size) * 2, std::align_val_t{16}))),
        is_bfloat16(is_bfloat16) {
    std::fill_n(bits.get(), size, uint16_t{0xffff});  // NaN
  }

  double operator[](int64_t i) const {
    return is_bfloat16 ? pdiff::cuda::widen<pdiff::bfloat16>(bits[i])
                       : pdiff::cuda::widen<pdiff::float16>(bits[i]);
  }
  void set(int64_t i, double x) {
    const float f = static_cast<float>(x);
    bits[i] = is_bfloat16 ? pdiff::cuda::round_to<pdiff::bfloat16>(f)
                          : pdiff::cuda::round_to<pdiff::float16>(f);
  }
};

struct Batch {
  std::vector<SpanLayout> layouts;
  int num_heads_q, num_heads_kv, head_dim;
  DType dtype;
};

struct Gradients {
  Tensor dq, dk, dv;
};

// One batch with its inputs, the kernels' gradients and those in double.
struct Case {
  const Batch& batch;
  int64_t total_q = 0, total_kv = 0;
  int64_t q_stride, kv_stride;
  Tensor q, k, v, out, dout;
  std::vector<float> lse, dlse;
  std::vector<double> dq, dk, dv;
  double scale;

  static int64_t sum(const Batch& batch, int32_t SpanLayout::* count) {
    int64_t total = 0;
    for (const SpanLayout& layout : batch.layouts) total += layout.*count;
    return total;
  }

  Case(const Batch& batch, std::mt19937& random, int q_gap = 0, int kv_gap = 0)
      : batch(batch),
        total_q(sum(batch, &SpanLayout::num_rows)),
        total_kv(sum(batch, &SpanLayout::num_keys)),
        q_stride(batch.num_heads_q * batch.head_dim + q_gap),
        kv_stride(batch.num_heads_kv * batch.head_dim + kv_gap),
        q(total_q * q_stride, is_bfloat16()),
        k(total_kv * kv_stride, is_bfloat16()),
        v(total_kv * kv_stride, is_bfloat16()),
        out(total_q * batch.num_heads_q * batch.head_dim, is_bfloat16()),
        dout(out.size, is_bfloat16()),
        lse(static_cast<size_t>(total_q * batch.num_heads_q)),
        dlse(lse.size()),
        dq(static_cast<size_t>(out.size)),
        dk(static_cast<size_t>(total_kv * batch.num_heads_kv * batch.head_dim)),
        dv(dk.size()),
        scale(1.0 / std::sqrt(batch.head_dim)) {
    std::normal_distribution<double> normal;
    const auto fill = [&](Tensor& x, int64_t tokens, int64_t stride, int64_t width) {
      for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t i = 0; i < width; ++i) x.set(t * stride + i, normal(random));
      }
    };
    const int64_t q_width = batch.num_heads_q * batch.head_dim;
    const int64_t kv_width = batch.num_heads_kv * batch.head_dim;
    fill(q, total_q, q_stride, q_width);
    fill(k, total_kv, kv_stride, kv_width);
    fill(v, total_kv, kv_stride, kv_width);
    fill(dout, total_q, q_width, q_width);
    for (float& x : dlse) x = static_cast<float>(normal(random));
    differentiate();
  }

  bool is_bfloat16() const { return batch.dtype == DType::kBFloat16; }

  void differentiate() {
    const int d = batch.head_dim, group = batch.num_heads_q / batch.num_heads_kv;
    int64_t row_begin = 0, key_begin = 0;
    for (const SpanLayout& layout : batch.layouts) {
      const std::vector<uint8_t> mask = pdiff::test::dense_mask(layout);
      for (int64_t row = 0; row < layout.num_rows; ++row) {
        for (int head = 0; head < batch.num_heads_q; ++head) {
          const auto sees = [&](int64_t key) {
            return mask[static_cast<size_t>(row * layout.num_keys + key)] != 0;
          };
          const int64_t q_at = (row_begin + row) * q_stride + head * d;
          const int64_t out_at = ((row_begin + row) * batch.num_heads_q + head) * d;
          const auto kv_at = [&](int64_t key) {
            return (key_begin + key) * kv_stride + head / group * d;
          };
          std::vector<double> p(static_cast<size_t>(layout.num_keys));
          double max = -kInfinity, total = 0.0;
          for (int64_t key = 0; key < layout.num_keys; ++key) {
            if (!sees(key)) continue;
            double s = 0.0;
            for (int i = 0; i < d; ++i) s += q[q_at + i] * k[kv_at(key) + i];
            p[key] = scale * s;
            max = std::max(max, p[key]);
          }
          for (int64_t key = 0; key < layout.num_keys; ++key) {
            p[key] = sees(key) ? std::exp(p[key] - max) : 0.0;
            total += p[key];
          }
          const size_t stat = static_cast<size_t>(head * total_q + row_begin + row);
          lse[stat] = total > 0.0 ? static_cast<float>(max + std::log(total)) : -INFINITY;
          double delta = -dlse[stat];
          for (int i = 0; i < d; ++i) {
            double sum = 0.0;
            for (int64_t key = 0; key < layout.num_keys; ++key) {
              if (sees(key)) sum += p[key] / total * v[kv_at(key) + i];
            }
            out.set(out_at + i, sum);
            delta += sum * dout[out_at + i];
          }
          for (int64_t key = 0; key < layout.num_keys; ++key) {
            if (!sees(key)) continue;
            double dp = 0.0;
            for (int i = 0; i < d; ++i) dp += dout[out_at + i] * v[kv_at(key) + i];
            const double weight = p[key] / total, ds = weight * (dp - delta) * scale;
            const int64_t dk_at = ((key_begin + key) * batch.num_heads_kv + head / group) * d;
            for (int i = 0; i < d; ++i) {
              dv[dk_at + i] += weight * dout[out_at + i];
              dk[dk_at + i] += ds * q[q_at + i];
              dq[out_at + i] += ds * k[kv_at(key) + i];
            }
          }
        }
      }
      row_begin += layout.num_rows;
      key_begin += layout.num_keys;
    }
  }

  Gradients run() const {
    std::vector<const SpanLayout*> layouts;
    for (const SpanLayout& layout : batch.layouts) layouts.push_back(&layout);
    const AttentionPlan plan(layouts, {.num_heads_q = batch.num_heads_q,
                                       .num_heads_kv = batch.num_heads_kv,
                                       .head_dim = batch.head_dim,
                                       .schedule = pdiff::Schedule::kGpu});
    Gradients gradients{Tensor(out.size, is_bfloat16()),
                        Tensor(static_cast<int64_t>(dk.size()), is_bfloat16()),
                        Tensor(static_cast<int64_t>(dk.size()), is_bfloat16())};
    std::vector<float> workspace(
        static_cast<size_t>(
            pdiff::cuda::hybrid_attention_backward_workspace_bytes(total_q, batch.num_heads_q) / 4),
        NAN);
    pdiff::cuda::HybridAttentionBackwardParams params;
    params.plan = plan.words();
    params.dtype = batch.dtype;
    params.q = q.bits.get(), params.k = k.bits.get(), params.v = v.bits.get();
    params.out = out.bits.get(), params.dout = dout.bits.get();
    params.lse = lse.data(), params.dlse = dlse.data();
    params.dq = gradients.dq.bits.get();
    params.dk = gradients.dk.bits.get(), params.dv = gradients.dv.bits.get();
    params.q_stride = q_stride, params.k_stride = params.v_stride = kv_stride;
    params.total_q = static_cast<int32_t>(total_q);
    params.total_kv = static_cast<int32_t>(total_kv);
    params.num_heads_q = batch.num_heads_q, params.num_heads_kv = batch.num_heads_kv;
    params.head_dim = batch.head_dim;
    params.softmax_scale = static_cast<float>(scale);
    params.workspace = workspace.data();
    pdiff::cuda::hybrid_attention_backward(params, {});
    return gradients;
  }

  void check(const Gradients& actual) const {
    const auto compare = [&](const char* name, const Tensor& x, const std::vector<double>& y) {
      double largest = 0.0, error = 0.0;
      bool is_written = true;
      for (size_t i = 0; i < y.size(); ++i) {
        const double value = x[static_cast<int64_t>(i)];
        is_written = is_written && !std::isnan(value);
        largest = std::max(largest, std::fabs(y[i]));
        error = std::max(error, std::fabs(value - y[i]));
      }
      const double eps = is_bfloat16() ? 0x1p-8 : 0x1p-11;
      CHECK(is_written);
      if (!(error <= 4 * eps * std::max(largest, 0.3))) {
        pdiff::test::report(__FILE__, __LINE__,
                            std::string(name) + ": error " + std::to_string(error) + " of " +
                                std::to_string(largest));
      }
    };
    compare("dq", actual.dq, dq);
    compare("dk", actual.dk, dk);
    compare("dv", actual.dv, dv);
  }
};

bool same_bits(const Tensor& a, int64_t a_begin, const Tensor& b) {
  return std::equal(b.bits.get(), b.bits.get() + b.size, a.bits.get() + a_begin);
}

TEST(gradients_of_random_layouts) {
  std::mt19937 random(0);
  const int heads[][2] = {{1, 1}, {4, 2}, {7, 1}, {6, 2}, {3, 3}, {65, 1}};
  for (int trial = 0; trial < 12; ++trial) {
    const auto& [heads_q, heads_kv] = heads[trial % 6];
    Batch batch{{},
                heads_q,
                heads_kv,
                trial % 3 == 2 ? 128 : 64,
                trial % 4 == 3 ? DType::kFloat16 : DType::kBFloat16};
    if (heads_q < 10) batch.layouts.push_back(pdiff::test::random_layout(random));
    batch.layouts.push_back(pdiff::test::random_document(random, heads_q < 10 ? 30 : 3));
    const Case problem(batch, random, trial % 2 * 8, trial % 3 * 64);
    for (const char* kernels : {"portable", "sm90a"}) {
      pdiff::select_cuda_kernels(kernels);
      const Gradients gradients = problem.run();
      problem.check(gradients);
      const Gradients again = problem.run();
      CHECK(same_bits(gradients.dq, 0, again.dq));
      CHECK(same_bits(gradients.dk, 0, again.dk));
      CHECK(same_bits(gradients.dv, 0, again.dv));
    }
  }
  pdiff::select_cuda_kernels(nullptr);
}

TEST(large_scores_and_empty_batches) {
  std::mt19937 random(2);
  Batch batch{{pdiff::test::random_document(random, 20)}, 2, 1, 64, DType::kBFloat16};
  Case problem(batch, random);
  problem.scale = 8.0;
  std::fill(problem.dq.begin(), problem.dq.end(), 0.0);
  std::fill(problem.dk.begin(), problem.dk.end(), 0.0);
  std::fill(problem.dv.begin(), problem.dv.end(), 0.0);
  problem.differentiate();
  problem.check(problem.run());

  batch.layouts = {SpanLayout{}};
  const Case empty(batch, random);
  empty.check(empty.run());
  batch.layouts[0].num_keys = 70;  // that nobody sees
  const Case unseen(batch, random);
  unseen.check(unseen.run());
}

TEST(matrix_loads_do_not_collide) {
  CHECK(pdiff::emulation::statistics().matrix_loads > 0);
  CHECK_EQ(pdiff::emulation::statistics().matrix_load_conflicts, 0);
}

TEST(a_device_of_99_kilobytes_takes_the_smaller_heads) {
  pdiff::emulation::Device& device = pdiff::emulation::device();
  const pdiff::emulation::Device usual = device;
  device.max_shared_bytes = 99 * 1024;
  std::mt19937 random(4);
  const Batch small{{pdiff::test::random_document(random, 4)}, 1, 1, 64, DType::kBFloat16};
  const Case problem(small, random);
  problem.check(problem.run());
  const Batch large{{pdiff::test::random_document(random, 4)}, 1, 1, 128, DType::kBFloat16};
  CHECK_THROWS(Case(large, random).run(), "hybrid_attention_backward: queries: needs 10");
  device = usual;
}

TEST(wrong_arguments_are_named) {
  std::mt19937 random(3);
  const Batch batch{{pdiff::test::random_document(random, 4)}, 1, 1, 96, DType::kBFloat16};
  CHECK_THROWS(Case(batch, random).run(), "head_dim: expected 64 or 128, got 96");
  const Batch many_heads{{pdiff::test::random_document(random, 4)}, 129, 1, 64, DType::kBFloat16};
  CHECK_THROWS(Case(many_heads, random).run(), "num_heads_q: expected at most 128 query heads");
  const Batch strided{{pdiff::test::random_document(random, 4)}, 1, 1, 64, DType::kBFloat16};
  CHECK_THROWS(Case(strided, random, 4).run(), "q: expected rows aligned to 16 bytes, a stride");
}

}  // namespace

int main() { return pdiff::test::run_all(); }
#else
int main() { return 77; }  // skipped
#endif
