#pragma once

#include <cstdint>
#include <cstring>

#include "cuda/ptx/math.cuh"
#include "cuda/ptx/shared.cuh"

namespace pdiff::cuda {

struct MatrixLoad {
  const void* row;
  uint32_t (*x)[4];
};

inline void load_matrices_any(uint32_t (&x)[4], const void* shared_row, bool transposed,
                              const char* what) {
  MatrixLoad mine{shared_row, &x};
  emulation::together(0xffffffffu, what, &mine, [transposed](emulation::LaneData lanes) {
    const auto load = [&](int lane) { return static_cast<MatrixLoad*>(lanes[lane]); };
    const auto begin = reinterpret_cast<uintptr_t>(shared_memory());
    for (int i = 0; i < 4; ++i) {
      uint16_t matrix[8][8];
      uint32_t banks = 0;
      for (int row = 0; row < 8; ++row) {
        const void* from = load(i * 8 + row)->row;
        const auto at = reinterpret_cast<uintptr_t>(from);
        if (at % 16 != 0) emulation::fail("loads a matrix row that is not aligned to 16");
        if (at < begin || at + 16 > begin + emulation::shared_memory_bytes()) {
          emulation::fail("loads a matrix row from outside shared memory");
        }
        std::memcpy(matrix[row], from, 16);
        banks |= 1u << (at / 16 % 8);
      }
      emulation::count_matrix_load(banks != 0xff);
      for (int lane = 0; lane < 32; ++lane) {
        const int g = lane / 4, t = lane % 4;
        const uint32_t low = transposed ? matrix[2 * t][g] : matrix[g][2 * t];
        const uint32_t high = transposed ? matrix[2 * t + 1][g] : matrix[g][2 * t + 1];
        (*load(lane)->x)[i] = low | high << 16;
      }
    }
  });
}

inline void load_matrices(uint32_t (&x)[4], const void* shared_row) {
  load_matrices_any(x, shared_row, false, "ldmatrix");
}

inline void load_matrices_transposed(uint32_t (&x)[4], const void* shared_row) {
  load_matrices_any(x, shared_row, true, "ldmatrix.trans");
}

struct Product {
  float (*d)[4];
  const uint32_t* a;
  uint32_t b[2];
};

template <typename T>
void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Product mine{&d, a, {b0, b1}};
  emulation::together(0xffffffffu, "mma", &mine, [](emulation::LaneData lanes) {
    float a[16][16], b[16][8], d[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const Product& product = *static_cast<Product*>(lanes[lane]);
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 4; ++i) {
        const float2 pair = unpack2<T>(product.a[i]);
        const int row = g + i % 2 * 8, column = 2 * t + i / 2 * 8;
        a[row][column] = pair.x, a[row][column + 1] = pair.y;
      }
      for (int i = 0; i < 2; ++i) {
        const float2 pair = unpack2<T>(product.b[i]);
        b[2 * t + i * 8][g] = pair.x, b[2 * t + i * 8 + 1][g] = pair.y;
      }
    }
    for (int row = 0; row < 16; ++row) {
      for (int column = 0; column < 8; ++column) d[row][column] = 0.0f;
      for (int k = 0; k < 16; ++k) {
        for (int column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      const Product& product = *static_cast<Product*>(lanes[lane]);
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 4; ++i) (*product.d)[i] += d[g + i / 2 * 8][2 * t + i % 2];
    }
  });
}

}  // namespace pdiff::cuda
