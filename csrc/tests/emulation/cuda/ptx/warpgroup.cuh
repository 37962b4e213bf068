#pragma once

// Products happen when they are waited for, as late as they may; until then accumulators are NaN.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <memory>
#include <vector>

#include "cuda/ptx/math.cuh"
#include "cuda/ptx/shared.cuh"

namespace pdiff::cuda {

/// One thread's share of a product.
struct ProductShare {
  float* d;
  int num_columns;
  std::vector<float> before;
  bool has_fragment, is_bfloat16, continues;
  uint32_t fragment[4];
  uint64_t a, b;
};

using ProductGroup = std::vector<ProductShare>;

/// Groups of the thread that runs; the last one is open.
inline std::deque<ProductGroup>& product_groups() {
  auto& groups = emulation::thread_local_state<std::deque<ProductGroup>>();
  if (groups.empty()) groups.emplace_back();
  return groups;
}

template <int kSize>
void settle(float (&)[kSize]) {}

inline uint64_t describe_panels(const void* shared, int panel_bytes = 0) {
  const auto offset = static_cast<const unsigned char*>(shared) - shared_memory();
  if (offset < 0 || offset >= emulation::shared_memory_bytes()) {
    emulation::fail("describes panels outside shared memory");
  }
  return static_cast<uint64_t>(panel_bytes >> 4) << 16 | static_cast<uint64_t>(offset) >> 4;
}

/// Element (row, column) of panels that start at 16-byte unit `start` of shared memory. Pieces are
/// permuted by address, so a start within a row or at another row works as on a GPU.
inline uint16_t panel_element(uint64_t descriptor, int row, int column) {
  const int64_t start = static_cast<int64_t>(descriptor & 0x3fff) * 16;
  const int64_t panel_bytes = static_cast<int64_t>(descriptor >> 16 & 0x3fff) * 16;
  const int64_t at = start + column / 64 * panel_bytes + row * 128 + column % 64 * 2;
  const int64_t permuted = at ^ (at >> 7 & 7) << 4;
  if (permuted + 2 > emulation::shared_memory_bytes()) {
    emulation::fail("multiplies from outside shared memory");
  }
  uint16_t bits;
  std::memcpy(&bits, emulation::shared_memory_of_engines() + permuted, 2);
  return bits;
}

inline void multiply_shares(void* const (&threads)[128], size_t idx) {
  const auto share = [&](int thread) -> ProductShare& {
    return (*static_cast<ProductGroup*>(threads[thread]))[idx];
  };
  const ProductShare& first = share(0);
  const int n = first.num_columns;
  const auto value = [&](uint16_t bits) {
    return first.is_bfloat16 ? widen<bfloat16>(bits) : widen<float16>(bits);
  };
  std::vector<float> a(64 * 16), b(static_cast<size_t>(16) * n), d(static_cast<size_t>(64) * n);
  for (int thread = 0; thread < 128; ++thread) {
    const ProductShare& mine = share(thread);
    if (mine.b != first.b || mine.a != first.a || mine.num_columns != n) {
      emulation::fail("multiplies other matrices than its warpgroup");
    }
    const int row = thread / 32 * 16 + thread % 32 / 4, t = thread % 4;
    for (int i = 0; mine.has_fragment && i < 4; ++i) {
      for (int half = 0; half < 2; ++half) {
        const auto bits = static_cast<uint16_t>(mine.fragment[i] >> 16 * half);
        a[(row + i % 2 * 8) * 16 + 2 * t + i / 2 * 8 + half] = value(bits);
      }
    }
  }
  for (int row = 0; !first.has_fragment && row < 64; ++row) {
    for (int k = 0; k < 16; ++k) a[row * 16 + k] = value(panel_element(first.a, row, k));
  }
  for (int k = 0; k < 16; ++k) {
    for (int column = 0; column < n; ++column) {
      b[k * n + column] = value(first.has_fragment ? panel_element(first.b, k, column)
                                                   : panel_element(first.b, column, k));
    }
  }
  for (int row = 0; row < 64; ++row) {
    for (int k = 0; k < 16; ++k) {
      for (int column = 0; column < n; ++column) {
        d[row * n + column] += a[row * 16 + k] * b[k * n + column];
      }
    }
  }
  for (int thread = 0; thread < 128; ++thread) {
    ProductShare& mine = share(thread);
    const int row = thread / 32 * 16 + thread % 32 / 4, t = thread % 4;
    for (int i = 0; i < n / 2; ++i) {
      const int column = i / 4 * 8 + 2 * t + i % 2;
      const float before = mine.continues ? mine.d[i] : mine.before[i];
      mine.d[i] = before + d[(row + i % 4 / 2 * 8) * n + column];
    }
  }
}

/// Of the thread that runs: whether its registers were handed over since it last waited.
struct ProductsBegun {
  bool value = false;
};

inline void products_begin() { emulation::thread_local_state<ProductsBegun>().value = true; }

inline void products_commit() { product_groups().emplace_back(); }

template <int kGroups>
void products_wait() {
  emulation::thread_local_state<ProductsBegun>().value = false;
  auto& groups = product_groups();
  while (groups.size() > kGroups + 1) {
    ProductGroup mine = std::move(groups.front());
    groups.pop_front();
    emulation::together_in_warpgroup("products", &mine, [](emulation::GroupData threads) {
      const size_t num = static_cast<ProductGroup*>(threads[0])->size();
      for (void* thread : threads) {
        if (static_cast<ProductGroup*>(thread)->size() != num) {
          emulation::fail("has issued another number of products than its warpgroup");
        }
      }
      for (size_t i = 0; i < num; ++i) multiply_shares(threads, i);
    });
  }
}

inline void issue(float* d, int num_columns, bool accumulate, const uint32_t* fragment,
                  bool is_bfloat16, uint64_t a, uint64_t b) {
  if (!emulation::thread_local_state<ProductsBegun>().value) {
    emulation::fail("multiplies with registers that it has not handed over");
  }
  ProductShare share{d, num_columns, {}, fragment != nullptr, is_bfloat16, false, {}, a, b};
  if (fragment != nullptr) std::memcpy(share.fragment, fragment, sizeof(share.fragment));
  ProductGroup& open = product_groups().back();
  // A product onto the accumulator of an earlier one goes on from its result.
  const ProductShare* earlier = nullptr;
  for (const ProductGroup& group : product_groups()) {
    for (const ProductShare& other : group) {
      if (other.d == d) earlier = &other;
    }
  }
  share.before.assign(static_cast<size_t>(num_columns) / 2, 0.0f);
  if (accumulate && earlier == nullptr) share.before.assign(d, d + num_columns / 2);
  share.continues = accumulate && earlier != nullptr;
  for (int i = 0; i < num_columns / 2; ++i) d[i] = NAN;
  open.push_back(std::move(share));
}

template <typename T, int kColumns>
void multiply_panels(float (&d)[kColumns / 2], uint64_t a, uint64_t b, bool accumulate) {
  issue(d, kColumns, accumulate, nullptr, std::is_same_v<T, bfloat16>, a, b);
}

template <typename T, int kColumns>
void multiply_fragment(float (&d)[kColumns / 2], const uint32_t (&a)[4], uint64_t b,
                       bool accumulate) {
  issue(d, kColumns, accumulate, a, std::is_same_v<T, bfloat16>, 0, b);
}

}  // namespace pdiff::cuda
