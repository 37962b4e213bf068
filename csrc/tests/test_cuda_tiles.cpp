// Tiles in shared memory: that fragments are what they say, and that no access collides in a bank.

#include "tests/check.h"

#if PDIFF_EMULATE_CUDA
#include <cuda_runtime.h>

#include <random>
#include <vector>

#include "cuda/common/divider.h"
#include "cuda/common/launch.h"
#include "cuda/common/shared_tile.cuh"

namespace {

using namespace pdiff::cuda;
using pdiff::bfloat16;

// The elements of every block of a tile, as its lanes get them, back in row-major order.
template <int kRows, int kColumns, BlockOrder kOrder>
__global__ void blocks_kernel(const bfloat16* x, int64_t stride, int num_rows, uint32_t* plain,
                              uint32_t* transposed) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpSize;
  unsigned char* tile = shared_memory();
  copy_rows_async<kRows, kColumns, 128>(tile, thread, [&](int row) {
    const bool valid = row < num_rows;
    return SourceRow<bfloat16>{x + (valid ? row : 0) * stride, valid};
  });
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();
  const BlockReader<kColumns, kOrder> reader(lane);
  if (thread >= kWarpSize) return;
  for (int row = 0; row < kRows; row += 16) {
    for (int column = 0; column < kColumns; column += 16) {
      uint32_t a[4], b[4];
      reader.load(a, tile, row, column);
      reader.load_transposed(b, tile, row, column);
      for (int i = 0; i < 4; ++i) {
        const bool is_down = kOrder == BlockOrder::kDown;
        const int down = (is_down ? i % 2 : i / 2) * 8, along = (is_down ? i / 2 : i % 2) * 8;
        const int r = row + lane / 4 + down, c = column + lane % 4 * 2 + along;
        plain[(r * kColumns + c) / 2] = a[i];
        // Matrix i lies at the same place; its column g is this lane's row.
        const int rt = row + lane % 4 * 2 + down, ct = column + lane / 4 + along;
        transposed[(ct * kRows + rt) / 2] = b[i];
      }
    }
  }
}

template <int kRows, int kColumns, BlockOrder kOrder>
void check_blocks() {
  const int num_rows = kRows - 5;
  const int64_t stride = kColumns + 24;
  std::vector<bfloat16> x(num_rows * stride);
  std::mt19937 random(kColumns);
  for (bfloat16& element : x) element.bits = static_cast<uint16_t>(random());
  std::vector<uint16_t> plain(kRows * kColumns, 1), transposed(kRows * kColumns, 1);
  pdiff::emulation::statistics() = {};
  launch(blocks_kernel<kRows, kColumns, kOrder>, {"blocks", 1, 128, kTileBytes<kRows, kColumns>},
         {}, x.data(), stride, num_rows, reinterpret_cast<uint32_t*>(plain.data()),
         reinterpret_cast<uint32_t*>(transposed.data()));
  bool is_right = true;
  for (int row = 0; row < kRows; ++row) {
    for (int column = 0; column < kColumns; ++column) {
      const uint16_t expected = row < num_rows ? x[row * stride + column].bits : 0;
      is_right = is_right && plain[row * kColumns + column] == expected &&
                 transposed[column * kRows + row] == expected;
    }
  }
  CHECK(is_right);
  CHECK(pdiff::emulation::statistics().matrix_loads > 0);
  CHECK_EQ(pdiff::emulation::statistics().matrix_load_conflicts, 0);
}

TEST(blocks_of_tiles_are_fragments) {
  check_blocks<64, 128, BlockOrder::kDown>();
  check_blocks<128, 64, BlockOrder::kDown>();
  check_blocks<64, 64, BlockOrder::kAlong>();
  check_blocks<16, 128, BlockOrder::kAlong>();
}

TEST(division_is_exact) {
  std::mt19937 random(0);
  for (int trial = 0; trial < 2000; ++trial) {
    const int32_t d = trial < 300 ? trial + 1 : static_cast<int32_t>(random() >> (1 + trial % 31));
    if (d == 0) continue;
    const Divider divider(d);
    for (int i = 0; i < 200; ++i) {
      const int32_t n = static_cast<int32_t>(random() >> (1 + i % 31));
      const int32_t multiple = n / d * d;
      for (const int32_t m : {n, multiple, multiple > 0 ? multiple - 1 : 0, INT32_MAX}) {
        CHECK_EQ(divider.divide(m), m / d);
      }
    }
  }
}

}  // namespace

int main() { return pdiff::test::run_all(); }
#else
int main() { return 77; }  // skipped
#endif
