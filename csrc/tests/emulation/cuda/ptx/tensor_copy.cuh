#pragma once

#include <cstdint>
#include <cstring>

#include "cuda/ptx/barrier.cuh"
#include "pdiff/dtype.h"
#include "pdiff/error.h"

namespace pdiff::cuda {

struct TensorMap {
  const uint16_t* data;
  int64_t size[3], stride[2];
  int box[2];
};

inline TensorMap make_tensor_map(const void* data, DType, const int64_t (&size)[3],
                                 const int64_t (&stride)[2], const int (&box)[2]) {
  PDIFF_CHECK(reinterpret_cast<uintptr_t>(data) % 16 == 0, "tensor map: misaligned address");
  PDIFF_CHECK(stride[0] % 8 == 0 && stride[1] % 8 == 0, "tensor map: strides of no 16 bytes");
  PDIFF_CHECK(size[0] > 0 && size[1] > 0 && size[2] > 0, "tensor map: an empty tensor");
  PDIFF_CHECK(box[0] > 0 && box[0] <= 256 && box[1] > 0 && box[1] <= 256, "tensor map: box");
  return {static_cast<const uint16_t*>(data),
          {size[0], size[1], size[2]},
          {stride[0], stride[1]},
          {box[0], box[1]}};
}

inline void copy_box(void* shared, const TensorMap& map, CopyBarrier& barrier, int x0, int x1,
                     int x2) {
  const int num_rows = map.box[0] * map.box[1];
  auto* to = static_cast<unsigned char*>(shared);
  if (reinterpret_cast<uintptr_t>(shared) % 1024 != 0) emulation::fail("copies to a panel astray");
  const auto offset = to - shared_memory();
  if (offset < 0 || offset + num_rows * 128 > emulation::shared_memory_bytes()) {
    emulation::fail("copies out of shared memory");
  }
  auto* to_engines = emulation::shared_memory_of_engines() + offset;
  for (unsigned char* view : {to, to_engines}) {  // not there before it has come
    std::memset(view, 0xff, static_cast<size_t>(num_rows) * 128);
  }
  emulation::defer([to, to_engines, map, x0, x1, x2, num_rows, &barrier] {
    const auto is_in = [&](int64_t x, int dim) { return x >= 0 && x < map.size[dim]; };
    for (int row = 0; row < num_rows; ++row) {
      const int64_t i1 = x1 + row % map.box[0], i2 = x2 + row / map.box[0];
      for (int column = 0; column < 64; ++column) {
        uint16_t element = 0;
        if (is_in(x0 + column, 0) && is_in(i1, 1) && is_in(i2, 2)) {
          element = map.data[i2 * map.stride[1] + i1 * map.stride[0] + x0 + column];
        }
        const int piece = column / 8 ^ row % 8;
        const int at = row * 128 + piece * 16 + column % 8 * 2;
        for (unsigned char* view : {to, to_engines}) std::memcpy(view + at, &element, 2);
      }
    }
    barrier.complete(num_rows * 128);
  });
}

inline void prefetch_tensor_map(const TensorMap&) {}

}  // namespace pdiff::cuda
