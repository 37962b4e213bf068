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
}

}  // namespace

int main() { return pdiff::test::run_all(); }
#else
int main() { return 77; }  // skipped
#endif
