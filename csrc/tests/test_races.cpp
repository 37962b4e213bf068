// The machine that runs CUDA kernels on the CPU notices accesses that nothing puts in an order,
// whatever order it runs them in.

#include "tests/check.h"

#if PDIFF_EMULATE_CUDA && defined(__SANITIZE_THREAD__)
#include <cuda_runtime.h>

#include <vector>

#include "cuda/common/launch.h"
#include "cuda/common/warp.cuh"
#include "cuda/ptx/copy.cuh"
#include "cuda/ptx/shared.cuh"

namespace {

using namespace pdiff::cuda;

enum class Between { kNothing, kShuffle, kWarp, kBlock };

__device__ void meet(Between between) {
  if (between == Between::kShuffle) (void)warp_sum(1);
  if (between == Between::kWarp) __syncwarp();
  if (between == Between::kBlock) __syncthreads();
}

// Each thread reads what another one wrote, then writes there.
__global__ void exchange_kernel(int* out, int distance, Between before_read, Between before_write) {
  int* shared = reinterpret_cast<int*>(shared_memory());
  const int thread = static_cast<int>(threadIdx.x);
  shared[thread] = thread;
  meet(before_read);
  out[thread] = shared[thread ^ distance];
  meet(before_write);
  shared[thread] = -1;
}

void exchange(int distance, Between before_read, Between before_write) {
  std::vector<int> out(64);
  launch(exchange_kernel, {"exchange", 1, 64, 256}, {}, out.data(), distance, before_read,
         before_write);
  for (int i = 0; i < 64; ++i) CHECK_EQ(out[i], i ^ distance);
}

TEST(barriers_order_a_block) {
  exchange(0, Between::kNothing, Between::kNothing);
  exchange(32, Between::kBlock, Between::kBlock);
  CHECK_THROWS(exchange(32, Between::kNothing, Between::kBlock), "a race of block 0");
  CHECK_THROWS(exchange(32, Between::kBlock, Between::kNothing), "a race of block 0");
  CHECK_THROWS(exchange(32, Between::kWarp, Between::kBlock), "a race of block 0");
}

TEST(a_shuffle_orders_no_memory) {
  exchange(1, Between::kWarp, Between::kWarp);
  CHECK_THROWS(exchange(1, Between::kShuffle, Between::kWarp), "a race of block 0");
  CHECK_THROWS(exchange(1, Between::kWarp, Between::kShuffle), "a race of block 0");
}

struct Fences {
  bool before, after;
};

// Blocks leave a number per thread; the one that comes last adds them up.
__global__ void last_block_kernel(int* parts, unsigned* arrivals, int* sum, Fences fences) {
  bool& is_last = *reinterpret_cast<bool*>(shared_memory());
  const unsigned thread = threadIdx.x, num_threads = blockDim.x;
  parts[blockIdx.x * num_threads + thread] = 1;
  __syncthreads();
  if (thread == 0) {
    if (fences.before) __threadfence();
    is_last = atomicAdd(arrivals, 1u) + 1 == gridDim.x;
    if (fences.after) __threadfence();
  }
  __syncthreads();
  if (!is_last) return;
  int mine = 0;
  for (unsigned block = 0; block < gridDim.x; ++block) mine += parts[block * num_threads + thread];
  atomicAdd(sum, mine);
}

int sum_of_blocks(Fences fences) {
  std::vector<int> parts(5 * 64);
  unsigned arrivals = 0;
  int sum = 0;
  launch(last_block_kernel, {"last block", 5, 64, 4}, {}, parts.data(), &arrivals, &sum, fences);
  return sum;
}

TEST(fences_and_an_atomic_order_blocks) {
  CHECK_EQ(sum_of_blocks({true, true}), 5 * 64);
  CHECK_THROWS(sum_of_blocks({false, true}), "a race of block");
  CHECK_THROWS(sum_of_blocks({true, false}), "a race of block");
}

__global__ void count_kernel(int* count, bool is_atomic) {
  if (is_atomic) {
    atomicAdd(count, 1);
  } else {
    ++*count;
  }
}

TEST(atomics_do_not_race) {
  int count = 0;
  launch(count_kernel, {"count", 3, 64}, {}, &count, true);
  CHECK_EQ(count, 3 * 64);
  CHECK_THROWS(launch(count_kernel, {"count", 3, 64}, {}, &count, false), "a race of block");
}

__global__ void refresh_kernel(int* x, bool is_constant) {
  const int before = is_constant ? __ldg(x + threadIdx.x) : x[threadIdx.x];
  __syncthreads();
  x[threadIdx.x] = before + 1;
}

TEST(what_is_written_is_no_constant) {
  std::vector<int> x(64);
  launch(refresh_kernel, {"refresh", 1, 64}, {}, x.data(), false);
  CHECK_EQ(x[63], 1);
  CHECK_THROWS(launch(refresh_kernel, {"refresh", 1, 64}, {}, x.data(), true),
               "a constant that is written: block 0");
}

__global__ void bytes_kernel(unsigned char* out) {
  out[blockIdx.x * blockDim.x + threadIdx.x] = static_cast<unsigned char>(threadIdx.x);
}

TEST(neighbours_in_a_word_do_not_race) {
  std::vector<unsigned char> out(3 * 33);
  launch(bytes_kernel, {"bytes", 3, 33}, {}, out.data());
  for (int i = 0; i < 3 * 33; ++i) CHECK_EQ(int{out[i]}, i % 33);
}

// Two rounds through one place that everyone reads.
__global__ void copy_kernel(const int* from, int* out, bool has_barrier) {
  int* shared = reinterpret_cast<int*>(shared_memory());
  const int thread = static_cast<int>(threadIdx.x);
  for (int round = 0; round < 2; ++round) {
    if (thread == 0) copy_async_16(shared, from + 4 * round);
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
    out[thread] += shared[thread % 4];
    if (has_barrier) __syncthreads();
  }
}

TEST(a_copy_writes_from_its_start_on) {
  alignas(16) static const int from[8] = {1, 2, 3, 4, 5, 6, 7, 8};
  std::vector<int> out(64);
  launch(copy_kernel, {"copy", 1, 64, 16}, {}, &from[0], out.data(), true);
  for (int i = 0; i < 64; ++i) CHECK_EQ(out[i], 6 + 2 * (i % 4));
  CHECK_THROWS(launch(copy_kernel, {"copy", 1, 64, 16}, {}, &from[0], out.data(), false),
               "a race of block 0");
}

}  // namespace

int main() { return pdiff::test::run_all(); }
#else
int main() { return 77; }  // skipped
#endif
