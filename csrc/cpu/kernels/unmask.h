#pragma once

#include <cfloat>
#include <cmath>

#include "common/parallel.h"
#include "cpu/kernels/element.h"
#include "cpu/kernels/unmask_block.h"
#include "cpu/kernels/unmask_filter.h"
#include "cpu/kernels/unmask_sample.h"
#include "cpu/unmask_rows.h"

namespace pdiff::cpu::PDIFF_ISA {
namespace {

// -- a score: what the blocks of a row, or of its kept tokens, add up to --------------------------

constexpr UnmaskScore kNoScore = {-kInf, -kInf, -1, 0.0, 0.0, {-kInf, -kInf, -1}};

// Express a score's sums relative to a larger maximum.
PDIFF_INLINE void raise_max(UnmaskScore& score, float new_max, float scale) {
  if (score.sum == 0.0) return;
  const double delta = static_cast<double>(score.max - new_max) * scale;
  const double factor = ::exp2(delta);
  score.weighted = delta > -1000.0 ? factor * (score.weighted + delta * score.sum) : 0.0;
  score.sum *= factor;
}

// Adds a padded block to a score; returns the maximum of each lane.
PDIFF_INLINE Vec add_block(UnmaskScore& score, const float* x, int n, const int32_t* ids,
                           int first_idx, float scale, const char* next, const Sampler* sampler) {
  const BlockMax block = block_max(x, n);
  if (block.first > score.max) {
    raise_max(score, block.first, scale);
    score.second = fmaxf(score.max, block.second);
    score.max = block.first;
    score.argmax = first_idx + find(x, block.first);
  } else {
    score.second = fmaxf(score.second, block.first);
  }
  // Before the first finite logit any number will do for the maximum: every 2^d is 0, or NaN.
  const BlockSum sums = block_sum(x, n, score.max == -kInf ? 0.0f : score.max, scale, next);
  score.sum += sums.sum;
  score.weighted += sums.weighted;
  if (sampler != nullptr) sample_block(score.draw, x, n, ids, first_idx, *sampler);
  return block.lanes;
}

// b's logits come after a's.
PDIFF_INLINE UnmaskScore merge(UnmaskScore a, UnmaskScore b, float scale) {
  UnmaskScore joined = a;
  joined.max = fmaxf(a.max, b.max);
  joined.second = fmaxf(fmaxf(a.second, b.second), fminf(a.max, b.max));
  if (b.max > a.max) joined.argmax = b.argmax;
  raise_max(a, joined.max, scale);
  raise_max(b, joined.max, scale);
  joined.sum = a.sum + b.sum;
  joined.weighted = a.weighted + b.weighted;
  if (b.draw.key > a.draw.key) joined.draw = b.draw;
  return joined;
}

// -- a row ---------------------------------------------------------------------------------------

template <typename T>
struct Row {
  const UnmaskRows& rows;
  int64_t idx;
  const T* logits;
  const UnmaskSettings& settings;
  float scale;  // log2(e) / temperature
  float* lane_max;
  Sampler sampler;

  PDIFF_INLINE Row(const UnmaskRows& all, int64_t row)
      : rows(all),
        idx(row),
        logits(static_cast<const T*>(all.params.logits) + row * all.params.logits_stride),
        settings(all.settings[all.row_span[row]]),
        scale(1.44269504f * settings.inverse_temperature),
        lane_max(all.lane_max + row * all.num_blocks * kUnmaskMaxLanes) {
    const UnmaskParams& p = all.params;
    const int32_t position =
        p.random_position != nullptr ? p.random_position[row] : p.row_position[row];
    const uint64_t seed = p.seeds != nullptr ? static_cast<uint64_t>(p.seeds[row]) : 0;
    sampler = {{seed, static_cast<uint32_t>(position), settings.step_idx, RandomUse::kToken},
               settings.inverse_temperature};
  }
};

PDIFF_INLINE int block_len(int64_t vocab_size, int64_t begin) {
  const int64_t left = vocab_size - begin;
  return static_cast<int>(left < kUnmaskBlock ? left : kUnmaskBlock);
}

template <typename T>
UnmaskScore score_segment(const Row<T>& row, int64_t segment) {
  const int64_t vocab_size = row.rows.params.vocab_size;
  const int64_t end = (segment + 1) * kUnmaskSegment;
  const bool samples = row.settings.draws && !row.settings.filters();
  alignas(64) float buffer[kUnmaskBlock];
  UnmaskScore score = kNoScore;
  for (int64_t begin = segment * kUnmaskSegment; begin < end && begin < vocab_size;
       begin += kUnmaskBlock) {
    const int n = block_len(vocab_size, begin);
    const float* x = load_block(row.rows, row.logits, static_cast<int>(begin), n, buffer);
    const char* next = reinterpret_cast<const char*>(row.logits + begin + n);
    const Vec lanes = add_block(score, x, padded(n), nullptr, static_cast<int>(begin), row.scale,
                                next, samples ? &row.sampler : nullptr);
    store(row.lane_max + begin / kUnmaskBlock * kUnmaskMaxLanes, max(lanes, broadcast(-FLT_MAX)));
  }
  return score;
}

// A logit below which no kept token lies: what keeps the list short.
template <typename T>
float kept_bound(const Row<T>& row, const UnmaskScore& score, const List& work) {
  float bound = -FLT_MAX;
  if (row.settings.top_p < 1.0f) {
    // Tokens with 2^d < (1 - top_p) sum / vocab_size weigh less than 1 - top_p together. One bit of
    // slack for rounding.
    const double tail = (1.0 - row.settings.top_p) * score.sum / row.rows.params.vocab_size;
    bound = fmaxf(bound, score.max + static_cast<float>((log2(tail) - 1.0) / row.scale));
  }
  const int num_lanes = static_cast<int>(row.rows.num_blocks) * kUnmaskMaxLanes;
  if (row.settings.top_k > 0 && row.settings.top_k <= num_lanes) {
    // Lane maxima are tokens too: the k-th largest of them is at most the k-th largest of all.
    const List maxima = {row.lane_max, nullptr, num_lanes};
    const Prefix goal = {kInf, row.settings.top_k};
    bound = fmaxf(bound, find_boundary(maxima, work, goal, score.max, row.scale).logit);
  }
  return bound;
}

// Every token with logit >= bound, in order of id. A block whose maximum lies below is not read.
template <typename T>
List collect(const Row<T>& row, float bound, const List& to) {
  alignas(64) float buffer[kUnmaskBlock];
  const int64_t vocab_size = row.rows.params.vocab_size;
  int num = 0;
  for (int64_t begin = 0; begin < vocab_size; begin += kUnmaskBlock) {
    const float* lanes = row.lane_max + begin / kUnmaskBlock * kUnmaskMaxLanes;
    if (reduce_max(load(lanes)) < bound) continue;
    const int n = block_len(vocab_size, begin);
    const float* x = load_block(row.rows, row.logits, static_cast<int>(begin), n, buffer);
    for (int i = 0; i < padded(n); i += kLanes) {
      const Vec v = load(x + i);
      const Mask chosen = v >= broadcast(bound);
      if (!any(chosen)) continue;
      store_compressed(to.ids + num, chosen, iota() + broadcast_int(static_cast<int>(begin) + i));
      num += store_compressed(to.logits + num, chosen, v);
    }
  }
  return {to.logits, to.ids, num};
}

// The score of the kept tokens alone; argmax and draw are vocabulary ids again.
template <typename T>
UnmaskScore score_kept(const Row<T>& row, const UnmaskScore& whole, int worker) {
  const int64_t stride = row.rows.params.vocab_size + kUnmaskPad;
  float* logits = row.rows.list_logits + worker * 2 * stride;
  int32_t* ids = row.rows.list_ids + worker * 2 * stride;
  const List first = {logits, ids, 0}, second = {logits + stride, ids + stride, 0};

  const List list = collect(row, kept_bound(row, whole, second), first);
  const Prefix goal = {row.settings.top_p < 1.0f ? row.settings.top_p * whole.sum : kInf,
                       row.settings.top_k > 0 ? row.settings.top_k : INT64_MAX};
  const Boundary boundary = find_boundary(list, second, goal, whole.max, row.scale);
  const List kept = take_prefix(list, second, boundary);

  UnmaskScore score = kNoScore;
  for (int begin = 0; begin < kept.n; begin += kUnmaskBlock) {
    const int n = padded(block_len(kept.n, begin));
    add_block(score, kept.logits + begin, n, kept.ids + begin, begin, row.scale,
              reinterpret_cast<const char*>(kept.logits + begin + n),
              row.settings.draws ? &row.sampler : nullptr);
  }
  score.argmax = kept.ids[score.argmax];
  if (score.draw.idx >= 0) score.draw.idx = kept.ids[score.draw.idx];
  return score;
}

float confidence(const UnmaskScore& score, UnmaskConfidence kind, float scale) {
  const auto probability = [&](float logit) {
    return ::exp2(static_cast<double>(logit - score.max) * scale) / score.sum;
  };
  switch (kind) {
    case UnmaskConfidence::kEntropy: {
      constexpr double kLn2 = 0.69314718055994530942;
      return static_cast<float>(kLn2 * (score.weighted / score.sum - log2(score.sum)));
    }
    case UnmaskConfidence::kMargin:
      return static_cast<float>(probability(score.max) - probability(score.second));
    default:
      return static_cast<float>(probability(score.draw.idx >= 0 ? score.draw.logit : score.max));
  }
}

template <typename T>
void finish_row(const Row<T>& row, int worker) {
  const UnmaskScore* segments = row.rows.scores + row.idx * row.rows.num_segments;
  UnmaskScore score = segments[0];
  for (int64_t i = 1; i < row.rows.num_segments; ++i) {
    score = merge(score, segments[i], row.scale);
  }
  const bool is_distribution = score.sum > 0.0;  // neither NaN nor nothing
  if (is_distribution && row.settings.filters()) score = score_kept(row, score, worker);

  const UnmaskParams& p = row.rows.params;
  p.is_nan[row.idx] = !is_distribution;
  const bool drew = score.draw.idx >= 0;  // not where every logit / temperature overflows
  p.candidate[row.idx] = !is_distribution ? -1 : drew ? score.draw.idx : score.argmax;
  p.confidence[row.idx] =
      is_distribution ? confidence(score, row.settings.confidence, row.scale) : __builtin_nanf("");
}

template <typename T>
void score_rows_of(const UnmaskRows& rows) {
  const UnmaskParams& p = rows.params;
  const auto score = [&](int64_t row, int64_t segment) {
    rows.scores[row * rows.num_segments + segment] = score_segment(Row<T>(rows, row), segment);
  };
  const auto finish = [&](int64_t row, int worker) { finish_row(Row<T>(rows, row), worker); };

  const bool splits_rows = p.num_rows < 4 * p.num_threads && rows.num_segments > 1;
  if (splits_rows) {
    parallel_for(p.num_rows * rows.num_segments, p.num_threads, 1,
                 [&](int64_t task) { score(task / rows.num_segments, task % rows.num_segments); });
    // To join segments is less work than to wake a thread.
    parallel_for(p.num_rows, rows.filters ? p.num_threads : 1, 1, finish);
    return;
  }
  const int64_t grain = 1 + kUnmaskSegment / p.vocab_size;
  parallel_for(p.num_rows, p.num_threads, grain, [&](int64_t row, int worker) {
    for (int64_t segment = 0; segment < rows.num_segments; ++segment) score(row, segment);
    finish(row, worker);
  });
}

}  // namespace

void score_rows(const UnmaskRows& rows) {
  with_element(rows.params.logits_dtype,
               [&](auto element) { score_rows_of<decltype(element)>(rows); });
}

}  // namespace pdiff::cpu::PDIFF_ISA
