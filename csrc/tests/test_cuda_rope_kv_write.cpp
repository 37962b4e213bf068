// The CUDA rope_kv_write on allocations of exactly its size, against the formula.

#include "tests/check.h"

#if PDIFF_EMULATE_CUDA
#include <cmath>
#include <random>
#include <vector>

#include "pdiff/rope_kv_write.h"

namespace {

using namespace pdiff;

struct Shape {
  int num_rows, num_heads_q, num_heads_kv, head_dim;
};

void check_shape(const Shape& shape, bool has_caches) {
  const auto& [num_rows, num_heads_q, num_heads_kv, head_dim] = shape;
  const int half = head_dim / 2, max_position = 7, num_slots = num_rows + 1;
  std::mt19937 random(num_rows + num_heads_q + head_dim);
  const auto normal = [&](int size) {
    std::normal_distribution<float> draw;
    std::vector<float> x(size);
    for (float& value : x) value = draw(random);
    return x;
  };
  std::vector<float> q = normal(num_rows * num_heads_q * head_dim);
  std::vector<float> k = normal(num_rows * num_heads_kv * head_dim);
  const std::vector<float> v = normal(num_rows * num_heads_kv * head_dim), q_in = q, k_in = k;
  const std::vector<float> cos = normal(max_position * half), sin = normal(max_position * half);
  std::vector<float> k_cache(num_slots * num_heads_kv * head_dim, 9.0f), v_cache = k_cache;
  std::vector<int32_t> positions(num_rows);
  std::vector<int64_t> slots(num_rows);
  for (int row = 0; row < num_rows; ++row) {
    positions[row] = row % 5 == 4 ? max_position : row % max_position;  // row 4 is out of range
    slots[row] = row == 1 ? -1 : row == 2 ? num_slots : num_rows - row;
  }
  const RopeKvWriteParams params{.q = q.data(),
                                 .k = k.data(),
                                 .v = has_caches ? v.data() : nullptr,
                                 .cos = cos.data(),
                                 .sin = sin.data(),
                                 .positions = positions.data(),
                                 .slots = has_caches ? slots.data() : nullptr,
                                 .k_cache = has_caches ? k_cache.data() : nullptr,
                                 .v_cache = has_caches ? v_cache.data() : nullptr,
                                 .dtype = DType::kFloat32,
                                 .positions_are_int64 = false,
                                 .q_stride = num_heads_q * head_dim,
                                 .k_stride = num_heads_kv * head_dim,
                                 .v_stride = num_heads_kv * head_dim,
                                 .num_rows = num_rows,
                                 .num_heads_q = num_heads_q,
                                 .num_heads_kv = num_heads_kv,
                                 .head_dim = head_dim,
                                 .max_position = max_position,
                                 .num_slots = num_slots,
                                 .num_threads = 0};
  cuda::rope_kv_write(params, {});

  std::vector<float> k_expected(k_cache.size(), 9.0f), v_expected = k_expected;
  const auto rotated = [&](const std::vector<float>& x, int row, int num_heads, int i) {
    const int at = row * num_heads * head_dim + i, in_head = i % head_dim;
    if (positions[row] >= max_position) return double{x[at]};
    const double c = cos[positions[row] * half + in_head % half];
    const double s = sin[positions[row] * half + in_head % half];
    return in_head < half ? x[at] * c - x[at + half] * s : x[at] * c + x[at - half] * s;
  };
  for (int row = 0; row < num_rows; ++row) {
    for (int i = 0; i < num_heads_q * head_dim; ++i) {
      CHECK_NEAR(q[row * num_heads_q * head_dim + i], rotated(q_in, row, num_heads_q, i), 1e-5);
    }
    const bool writes =
        has_caches && slots[row] >= 0 && slots[row] < num_slots && positions[row] < max_position;
    for (int i = 0; i < num_heads_kv * head_dim; ++i) {
      const int at = row * num_heads_kv * head_dim + i;
      CHECK_NEAR(k[at], rotated(k_in, row, num_heads_kv, i), 1e-5);
      if (!writes) continue;
      k_expected[slots[row] * num_heads_kv * head_dim + i] = k[at];
      v_expected[slots[row] * num_heads_kv * head_dim + i] = v[at];
    }
  }
  CHECK(k_cache == k_expected);
  CHECK(v_cache == v_expected);
}

TEST(every_shape_stays_in_its_memory) {
  for (const bool has_caches : {true, false}) {
    for (const Shape& shape : {Shape{9, 4, 2, 64}, Shape{5, 7, 1, 66}, Shape{6, 1, 1, 2},
                               Shape{3, 28, 4, 128}, Shape{3, 3, 3, 1022}, Shape{0, 2, 1, 8}}) {
      check_shape(shape, has_caches);
    }
  }
}

TEST(head_sizes_that_do_not_fit_are_refused) {
  RopeKvWriteParams params{};
  for (const int head_dim : {0, 15, 1026}) {
    params.head_dim = head_dim;
    CHECK_THROWS(cuda::rope_kv_write(params, {}), "head_dim: expected an even number up to 1024");
  }
}

}  // namespace

int main() { return pdiff::test::run_all(); }
#else
int main() { return 77; }  // skipped
#endif
