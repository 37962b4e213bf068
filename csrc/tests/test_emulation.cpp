// The machine that runs CUDA kernels on the CPU: that it computes what a GPU would, and that it
// notices what a GPU would not forgive.

#include "tests/check.h"

#if PDIFF_EMULATE_CUDA
#include <cuda_runtime.h>

#include <vector>

#include "cuda/common/launch.h"
#include "cuda/common/warp.cuh"
#include "cuda/ptx/copy.cuh"
#include "cuda/ptx/math.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/tensor_copy.cuh"
#include "cuda/ptx/warpgroup.cuh"

namespace {

using namespace pdiff::cuda;
using pdiff::bfloat16;

// c[16 x 8] <- a[16 x 16] @ b[16 x 8] through shared memory, as attention does it.
__global__ void product_kernel(const uint16_t* a, const uint16_t* b, float* c) {
  auto* shared_a = reinterpret_cast<uint16_t*>(shared_memory());
  uint16_t* shared_b = shared_a + 256;
  const int lane = static_cast<int>(threadIdx.x);
  copy_async_16(shared_a + lane * 8, a + lane * 8);
  copy_async_16(shared_b + lane * 8, b + lane * 8, lane < 16);
  copy_async_commit();
  copy_async_wait<0>();
  __syncwarp();
  uint32_t a_fragment[4], b_fragment[4];
  load_matrices(a_fragment, shared_a + (lane % 16) * 16 + lane / 16 * 8);
  load_matrices_transposed(b_fragment, shared_b + lane * 8);
  float d[4] = {};
  multiply_add<bfloat16>(d, a_fragment, b_fragment[0], b_fragment[1]);
  for (int i = 0; i < 4; ++i) c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
}

TEST(fragments_make_a_product) {
  std::vector<uint16_t> a(256), b(128);
  for (int i = 0; i < 256; ++i) a[i] = round_to<bfloat16>(static_cast<float>(i * 37 % 23 - 11));
  for (int i = 0; i < 128; ++i) b[i] = round_to<bfloat16>(static_cast<float>(i * 29 % 19 - 9));
  std::vector<float> c(128, NAN);
  launch(product_kernel, {"product", 1, 32, 1024}, {}, a.data(), b.data(), c.data());
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      float expected = 0.0f;
      for (int k = 0; k < 16; ++k) {
        expected += widen<bfloat16>(a[row * 16 + k]) * widen<bfloat16>(b[k * 8 + column]);
      }
      CHECK_EQ(c[row * 8 + column], expected);
    }
  }
}

// With barriers everyone sees what the others wrote; without, a warp that runs ahead does not.
__global__ void rotate_kernel(int* out, bool has_barrier) {
  int* shared = reinterpret_cast<int*>(shared_memory());
  const int thread = static_cast<int>(threadIdx.x), n = static_cast<int>(blockDim.x);
  for (int round = 0; round < 8; ++round) {
    shared[thread] = thread + round;
    if (has_barrier) __syncthreads();
    out[thread] += shared[(thread + 33) % n];
    if (has_barrier) __syncthreads();
  }
}

TEST(a_missing_barrier_shows) {
  for (const bool has_barrier : {true, false}) {
    std::vector<int> out(128, 0);
    launch(rotate_kernel, {"rotate", 1, 128, 512}, {}, out.data(), has_barrier);
    bool is_right = true;
    for (int i = 0; i < 128; ++i) is_right = is_right && out[i] == 8 * ((i + 33) % 128) + 28;
    CHECK_EQ(is_right, has_barrier);
  }
}

__global__ void reduce_kernel(float* out) {
  out[blockIdx.x * blockDim.x + threadIdx.x] = warp_sum(static_cast<float>(threadIdx.x + 1));
}

TEST(warps_of_all_blocks_reduce) {
  std::vector<float> out(7 * 64, NAN);
  launch(reduce_kernel, {"reduce", 7, 64}, {}, out.data());
  for (int i = 0; i < 7 * 64; ++i) CHECK_EQ(out[i], i % 64 < 32 ? 528.0f : 1552.0f);
}

__global__ void unwaited_kernel(const int* from, int* out, bool waits) {
  int* shared = reinterpret_cast<int*>(shared_memory());
  copy_async_16(shared + 4 * threadIdx.x, from + 4 * threadIdx.x);
  copy_async_commit();
  if (waits) copy_async_wait<0>();
  out[threadIdx.x] = shared[4 * threadIdx.x];
  copy_async_wait<0>();
}

TEST(a_copy_is_not_there_before_it_is_waited_for) {
  std::vector<int> from(128), out(32);
  for (int i = 0; i < 128; ++i) from[i] = i;
  launch(unwaited_kernel, {"copy", 1, 32, 512}, {}, from.data(), out.data(), true);
  CHECK_EQ(out[5], 20);
  launch(unwaited_kernel, {"copy", 1, 32, 512}, {}, from.data(), out.data(), false);
  CHECK_EQ(out[5], -1);
}

// out[64 x 128] <- (a[64 x 64] @ b[128 x 64]^T, rounded) @ c[128 x 128], by the copy engine and a
// warpgroup; the first product's columns 0 to 15, 16 to 31, ... are the second one's steps.
__global__ void warpgroup_kernel(const TensorMap map_a, const TensorMap map_b,
                                 const TensorMap map_c, float* out, bool waits) {
  unsigned char *a = shared_memory(), *b = a + 64 * 128, *c = b + 128 * 128;
  auto& barrier = *reinterpret_cast<CopyBarrier*>(c + 2 * 128 * 128);
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    barrier.init(1);
    fence_barriers();
  }
  __syncthreads();
  if (thread == 0) {
    barrier.arrive_and_expect((64 + 128 + 2 * 128) * 128);
    copy_box(a, map_a, barrier, 0, 0, 0);
    copy_box(b, map_b, barrier, 0, 0, 0);
    copy_box(c, map_c, barrier, 0, 0, 0);
    copy_box(c + 128 * 128, map_c, barrier, 64, 0, 0);
  }
  barrier.wait(0);
  float s[64], d[64];
  products_begin();
  for (int step = 0; step < 4; ++step) {
    multiply_panels<bfloat16, 128>(s, describe_panels(a) + 2 * step, describe_panels(b) + 2 * step,
                                   step > 0);
  }
  products_commit();
  if (waits) products_wait<0>();
  products_begin();
  for (int step = 0; step < 8; ++step) {
    uint32_t p[4];
    for (int i = 0; i < 4; ++i)
      p[i] = pack2<bfloat16>(s[8 * step + 2 * i], s[8 * step + 2 * i + 1]);
    multiply_fragment<bfloat16, 128>(d, p, describe_panels(c, 128 * 128) + 128 * step, step > 0);
  }
  products_commit();
  products_wait<0>();
  for (int i = 0; i < 64; ++i) {
    const int row = thread / 32 * 16 + thread % 32 / 4 + i % 4 / 2 * 8;
    out[row * 128 + i / 4 * 8 + thread % 4 * 2 + i % 2] = d[i];
  }
}

TEST(warpgroups_multiply_what_the_copy_engine_brings) {
  const auto random = [](int size, int step) {
    std::vector<uint16_t> x(size);
    for (int i = 0; i < size; ++i) {
      x[i] = round_to<bfloat16>(static_cast<float>(i * step % 23 - 11) / 4);
    }
    return x;
  };
  alignas(16) static uint16_t a[64 * 64], b[128 * 64], c[128 * 128];
  const auto fill = [](uint16_t* to, const std::vector<uint16_t>& from) {
    std::memcpy(to, from.data(), from.size() * 2);
  };
  fill(a, random(64 * 64, 37)), fill(b, random(128 * 64, 29)), fill(c, random(128 * 128, 31));
  const TensorMap map_a =
      make_tensor_map(a, pdiff::DType::kBFloat16, {64, 64, 1}, {64, 64}, {64, 1});
  const TensorMap map_b =
      make_tensor_map(b, pdiff::DType::kBFloat16, {64, 128, 1}, {64, 64}, {128, 1});
  const TensorMap map_c =
      make_tensor_map(c, pdiff::DType::kBFloat16, {128, 128, 1}, {128, 128}, {128, 1});
  const pdiff::cuda::LaunchShape shape{"warpgroup", 1, 128, (64 + 128 + 2 * 128) * 128 + 8};
  std::vector<float> out(64 * 128, NAN);
  launch(warpgroup_kernel, shape, {}, map_a, map_b, map_c, out.data(), true);
  double worst = 0.0;
  for (int row = 0; row < 64; ++row) {
    float s[128];
    for (int j = 0; j < 128; ++j) {
      float sum = 0.0f;
      for (int k = 0; k < 64; ++k) {
        sum += widen<bfloat16>(a[row * 64 + k]) * widen<bfloat16>(b[j * 64 + k]);
      }
      s[j] = widen<bfloat16>(round_to<bfloat16>(sum));
    }
    for (int column = 0; column < 128; ++column) {
      double sum = 0.0;
      for (int j = 0; j < 128; ++j) sum += double{s[j]} * widen<bfloat16>(c[j * 128 + column]);
      const double error = std::fabs(sum - out[row * 128 + column]);
      worst = error >= worst ? error : error != error ? 1e9 : worst;
    }
  }
  CHECK(worst < 0.1);
  launch(warpgroup_kernel, shape, {}, map_a, map_b, map_c, out.data(), false);
  CHECK(out[0] != out[0]);  // read before it was waited for
}

// One step of a product of ones, which threads have stored.
__global__ void stored_panel_kernel(float* out, bool fences, bool begins) {
  const int thread = static_cast<int>(threadIdx.x);
  auto* elements = reinterpret_cast<uint16_t*>(shared_memory());
  for (int i = thread; i < 64 * 64; i += 128) elements[i] = round_to<bfloat16>(1.0f);
  if (fences) fence_async_copies();
  __syncthreads();
  const uint64_t panel = describe_panels(shared_memory());
  float d[32];
  if (begins) products_begin();
  multiply_panels<bfloat16, 64>(d, panel, panel, false);
  products_commit();
  products_wait<0>();
  out[thread] = d[0];
}

TEST(products_see_no_stores_before_a_fence) {
  std::vector<float> out(128, 0.0f);
  launch(stored_panel_kernel, {"panel", 1, 128, 64 * 128}, {}, out.data(), true, true);
  for (const float x : out) CHECK_EQ(x, 16.0f);
  launch(stored_panel_kernel, {"panel", 1, 128, 64 * 128}, {}, out.data(), false, true);
  for (const float x : out) CHECK(x != x);
}

__global__ void expecting_kernel(const TensorMap map, int num_bytes) {
  auto& barrier = *reinterpret_cast<CopyBarrier*>(shared_memory() + 64 * 128);
  barrier.init(1);
  barrier.arrive_and_expect(num_bytes);
  copy_box(shared_memory(), map, barrier, 0, 0, 0);
  barrier.wait(0);
}

__global__ void miscounted_kernel(int num_others) {
  barrier_wait(1, threadIdx.x < 32 ? 64 : num_others);
}

__global__ void diverged_kernel(bool half) {
  if (half && threadIdx.x >= 16) return;
  (void)warp_sum(1.0f);
}

__global__ void forgotten_copy_kernel(const int* from) {
  copy_async_16(shared_memory(), from);
  copy_async_commit();
}

__global__ void misaligned_kernel(const int* from) { copy_async_16(shared_memory(), from + 1); }

TEST(mistakes_are_errors) {
  alignas(16) static const int from[8] = {};
  launch(diverged_kernel, {"diverged", 2, 64}, {}, false);
  CHECK_THROWS(launch(diverged_kernel, {"diverged", 2, 64}, {}, true), "deadlock: block");
  CHECK_THROWS(launch(forgotten_copy_kernel, {"forgotten", 1, 1, 64}, {}, &from[0]),
               "ends with copies that it never waited for");
  CHECK_THROWS(launch(misaligned_kernel, {"misaligned", 1, 1, 64}, {}, &from[0]),
               "copies a misaligned address");
  const LaunchShape panel{"panel", 1, 128, 64 * 128};
  std::vector<float> out(128);
  CHECK_THROWS(launch(stored_panel_kernel, panel, {}, out.data(), true, false),
               "registers that it has not handed over");
  alignas(16) static const uint16_t rows[64 * 64] = {};
  const TensorMap map =
      make_tensor_map(rows, pdiff::DType::kBFloat16, {64, 64, 1}, {64, 64}, {64, 1});
  const LaunchShape box{"box", 1, 1, 64 * 128 + 8};
  launch(expecting_kernel, box, {}, map, 64 * 128);
  CHECK_THROWS(launch(expecting_kernel, box, {}, map, 63 * 128), "waits for a copy barrier");
  launch(miscounted_kernel, {"barrier", 1, 64}, {}, 64);
  CHECK_THROWS(launch(miscounted_kernel, {"barrier", 1, 64}, {}, 96),
               "expects another number of threads");
}

}  // namespace

int main() { return pdiff::test::run_all(); }
#else
int main() { return 77; }  // skipped
#endif
