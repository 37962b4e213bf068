#pragma once

// Where keys and values lie: one after another, or in pages.

#include <cstdint>

#include "cuda/common/shared_tile.cuh"
#include "cuda/hybrid_attention/config.h"

namespace pdiff::cuda::attention {

/// The keys of one sequence and one KV head. Addresses count bytes.
struct Keys {
  const unsigned char* k;  // the sequence's first key; of paged ones the pool's
  const unsigned char* v;
  const int32_t* pages;  // of the sequence
};

template <bool kPaged>
__device__ __forceinline__ Keys keys_of(const ForwardParams& params, const PlanView& plan,
                                        const PlanSequence& sequence, int64_t head_bytes) {
  const int64_t first = kPaged ? 0 : sequence.key_begin;
  return {static_cast<const unsigned char*>(params.k) + first * params.k_bytes + head_bytes,
          static_cast<const unsigned char*>(params.v) + first * params.v_bytes + head_bytes,
          kPaged ? plan.pages + sequence.page_begin : nullptr};
}

/// Consecutive keys, rows of a tile. Of packed keys row r is at k + r * k_bytes; so are those in
/// pages before row `boundary`, and from there on, in the next page, at k_next + r * k_bytes.
struct KeyRows {
  const unsigned char *k, *v, *k_next, *v_next;
  int32_t key, num_rows, boundary;
};

/// Where kRows keys from `key` on lie, of which num_rows are there. Looks page numbers up, so it
/// is better called a while before the copy.
template <bool kPaged, int kRows>
__device__ __forceinline__ KeyRows key_rows(const ForwardParams& params, const Keys& keys,
                                            int32_t key, int32_t num_rows) {
  KeyRows rows{};
  rows.key = key;
  rows.num_rows = num_rows;
  if constexpr (!kPaged) {
    rows.k = keys.k + static_cast<int64_t>(key) * params.k_bytes;
    rows.v = keys.v + static_cast<int64_t>(key) * params.v_bytes;
  } else if (params.page_size >= kRows) {  // two pages at most
    const int32_t page = params.by_page.divide(key);
    const int64_t slot = key - page * params.page_size;
    rows.boundary = params.page_size - static_cast<int32_t>(slot);
    const int64_t here = keys.pages[page];
    const int64_t next = rows.boundary < num_rows ? keys.pages[page + 1] : here;
    const int64_t before = rows.boundary;
    rows.k = keys.k + here * params.k_page_bytes + slot * params.k_bytes;
    rows.v = keys.v + here * params.v_page_bytes + slot * params.v_bytes;
    rows.k_next = keys.k + next * params.k_page_bytes - before * params.k_bytes;
    rows.v_next = keys.v + next * params.v_page_bytes - before * params.v_bytes;
  }
  return rows;
}

/// Starts to copy a tile of keys and one of values; zeros stand for rows that are not there, since
/// a weight of 0 does not undo a NaN.
template <bool kPaged, int kRows, int kHeadDim, int kThreads>
__device__ __forceinline__ void copy_keys_async(unsigned char* k_tile, unsigned char* v_tile,
                                                int thread, const ForwardParams& params,
                                                const Keys& keys, const KeyRows& rows) {
  if constexpr (!kPaged) {
    copy_strided_rows_async<kRows, kHeadDim, kThreads>(k_tile, thread, rows.k, params.k_bytes,
                                                       rows.num_rows);
    copy_strided_rows_async<kRows, kHeadDim, kThreads>(v_tile, thread, rows.v, params.v_bytes,
                                                       rows.num_rows);
  } else if (params.page_size >= kRows) {
    const auto piece_of = [&](const unsigned char* here, const unsigned char* next, int32_t bytes,
                              int row, int piece) {
      const unsigned char* base = (row < rows.boundary ? here : next) + piece * kPieceBytes;
      return SourcePiece{base + static_cast<int64_t>(row) * bytes, row < rows.num_rows};
    };
    copy_pieces_async<kRows, kHeadDim, kThreads>(k_tile, thread, [&](int row, int piece) {
      return piece_of(rows.k, rows.k_next, params.k_bytes, row, piece);
    });
    copy_pieces_async<kRows, kHeadDim, kThreads>(v_tile, thread, [&](int row, int piece) {
      return piece_of(rows.v, rows.v_next, params.v_bytes, row, piece);
    });
  } else {  // small pages: each row looks up its own
    const auto piece_of = [&](const unsigned char* pool, int64_t page_bytes, int32_t bytes, int row,
                              int piece) {
      const bool valid = row < rows.num_rows;
      const int32_t key = rows.key + (valid ? row : 0), page = params.by_page.divide(key);
      const int64_t slot = key - page * params.page_size;
      return SourcePiece{pool + keys.pages[page] * page_bytes + slot * bytes + piece * kPieceBytes,
                         valid};
    };
    copy_pieces_async<kRows, kHeadDim, kThreads>(k_tile, thread, [&](int row, int piece) {
      return piece_of(keys.k, params.k_page_bytes, params.k_bytes, row, piece);
    });
    copy_pieces_async<kRows, kHeadDim, kThreads>(v_tile, thread, [&](int row, int piece) {
      return piece_of(keys.v, params.v_page_bytes, params.v_bytes, row, piece);
    });
  }
}

}  // namespace pdiff::cuda::attention
