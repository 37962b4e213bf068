#pragma once

// What the attention kernels of every instruction set do alike: where rows and keys lie, and which
// keys a tile of query rows walks.
//
// A query tile holds the rows of some tokens, all heads of a KV head's group: row = token * heads +
// head. Rows fall into panels of kPanelRows, a run of keys (common/tile_walk.h) into tiles of
// kTileKeys. Which keys of a run a row sees is one number, since it sees a prefix; over a panel the
// smallest and the largest of them tell whether a key tile is empty, full or partial.

#include <cstdint>

#include "common/macros.h"
#include "common/tile_walk.h"
#include "cpu/hybrid_attention.h"

namespace pdiff::cpu::PDIFF_ISA {
namespace {

constexpr int kPanelRows = 32;
constexpr int kTileKeys = 128;

constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.693147181f;
constexpr float kNoScore = -1e30f;  // below every score; finite, so that differences are no NaN

PDIFF_INLINE int min(int a, int b) { return a < b ? a : b; }
PDIFF_INLINE int max(int a, int b) { return a > b ? a : b; }
PDIFF_INLINE int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

// Hands out pieces of a workspace, each starting on a cache line. With a null base it only counts.
struct Arena {
  float* base;
  int64_t used = 0;

  template <typename T = float>
  T* take(int64_t count) {
    float* piece = base == nullptr ? nullptr : base + used;
    used += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 16;
    return reinterpret_cast<T*>(piece);
  }
};

// Keys or values of one KV head of one sequence.
template <typename T>
struct KeyRows {
  const T* base;
  int64_t stride;
  const int32_t* pages;
  int64_t page_stride;
  int page_size;  // 0: packed
};

template <typename T>
PDIFF_INLINE KeyRows<T> key_rows(const PlanView& plan, const PlanSequence& sequence, int kv_head,
                                 const void* data, int64_t stride, int64_t page_stride) {
  const T* base = static_cast<const T*>(data) + int64_t{kv_head} * plan.header.head_dim;
  if (plan.header.page_size == 0) base += sequence.key_begin * stride;
  return {base, stride, plan.pages + sequence.page_begin, page_stride, plan.header.page_size};
}

// body(j, row key_lo + j) for j in [0, num_keys)
template <typename T, typename Body>
PDIFF_INLINE void for_each_key(const KeyRows<T>& keys, int key_lo, int num_keys, const Body& body) {
  if (keys.page_size == 0) {
    for (int j = 0; j < num_keys; ++j) body(j, keys.base + (key_lo + j) * keys.stride);
    return;
  }
  const int32_t* page = keys.pages + key_lo / keys.page_size;
  int slot = key_lo % keys.page_size;
  for (int j = 0; j < num_keys; ++j) {
    body(j, keys.base + *page * keys.page_stride + slot * keys.stride);
    if (++slot == keys.page_size) slot = 0, ++page;
  }
}

// Tokens [token_lo, token_hi) of a sequence, query heads [head_lo, head_lo + num_heads).
struct TileRows {
  int token_lo, token_hi, head_lo, num_heads;

  int num_tokens() const { return token_hi - token_lo; }
  int num_rows() const { return num_tokens() * num_heads; }
  int padded_rows() const { return round_up(num_rows(), kPanelRows); }
};

// body(row, token, head) for all rows of a tile
template <typename Body>
PDIFF_INLINE void for_each_row(const TileRows& rows, const Body& body) {
  int row = 0;
  for (int token = rows.token_lo; token < rows.token_hi; ++token) {
    for (int i = 0; i < rows.num_heads; ++i) body(row++, token, rows.head_lo + i);
  }
}

// to[row] <- where the row's elements start; null for rows past the last
template <typename T>
PDIFF_INLINE void row_pointers(T* base, int64_t token_stride, int head_dim, const TileRows& rows,
                               T** to) {
  for_each_row(rows, [&](int row, int token, int head) {
    to[row] = base + token * token_stride + int64_t{head} * head_dim;
  });
  for (int row = rows.num_rows(); row < rows.padded_rows(); ++row) to[row] = nullptr;
}

// How many keys of the run in hand each row sees. Rows past the last repeat it.
struct VisibleKeys {
  int32_t* by_token;   // [tokens of a tile]
  float* by_row;       // [padded rows], as numbers to compare key indices with
  int32_t* panel_min;  // [panels]
  int32_t* panel_max;  // [panels]

  VisibleKeys(Arena& arena, int max_tokens, int max_rows)
      : by_token(arena.take<int32_t>(max_tokens)),
        by_row(arena.take(max_rows)),
        panel_min(arena.take<int32_t>(max_rows / kPanelRows)),
        panel_max(arena.take<int32_t>(max_rows / kPanelRows)) {}

  void count(const SegmentsView& segments, int segment, const TileRows& rows, const KeyRun& run) {
    visible_in_run(segments, segment, rows.token_lo, rows.token_hi, run, by_token);
    int row = 0;
    const auto push = [&](int32_t keys) {
      const int panel = row / kPanelRows, column = row % kPanelRows;
      by_row[row++] = static_cast<float>(keys);
      panel_min[panel] = column == 0 ? keys : min(panel_min[panel], keys);
      panel_max[panel] = column == 0 ? keys : max(panel_max[panel], keys);
    };
    for (int token = 0; token < rows.num_tokens(); ++token) {
      for (int head = 0; head < rows.num_heads; ++head) push(by_token[token]);
    }
    const int padded_rows = rows.padded_rows();
    while (row < padded_rows) push(by_token[rows.num_tokens() - 1]);
  }
};

// A key tile: keys [key_lo, key_lo + num_keys), the first of them key `offset` of its run.
struct KeyTile {
  int key_lo, num_keys, offset;
};

// Keys of a tile that a panel reaches; `partial` if some of its rows see fewer.
struct PanelKeys {
  int num_keys;
  bool partial;
};

PDIFF_INLINE PanelKeys panel_keys(const VisibleKeys& visible, const KeyTile& tile, int panel) {
  const int most = min(visible.panel_max[panel] - tile.offset, tile.num_keys);
  const int least = min(visible.panel_min[panel] - tile.offset, tile.num_keys);
  return {max(most, 0), least < most};
}

// Walks the keys of a tile's rows: body(tile) for every key tile of every run.
template <typename Body>
PDIFF_INLINE void for_each_key_tile(const SegmentsView& segments, int segment, const TileRows& rows,
                                    VisibleKeys& visible, const Body& body) {
  KeyRun run{0, 0};
  for (int next = 0; next_run(segments, segment, rows.token_hi, next, &run);
       next = run.key_lo + 1) {
    visible.count(segments, segment, rows, run);
    for (int key_lo = run.key_lo; key_lo < run.key_hi; key_lo += kTileKeys) {
      body(KeyTile{key_lo, min(run.key_hi - key_lo, kTileKeys), key_lo - run.key_lo});
    }
  }
}

}  // namespace
}  // namespace pdiff::cpu::PDIFF_ISA
