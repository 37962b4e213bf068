#include <cfloat>
#include <cmath>
#include <cstring>

#include "common/gumbel.h"
#include "common/parallel.h"
#include "common/philox.h"
#include "cpu/unmask_rows.h"

namespace pdiff::cpu::PDIFF_ISA {
namespace {

constexpr int kLanes = Vec::kLanes;
constexpr int kUnroll = 4;  // independent chains, enough to cover the latency of an addition
constexpr int kStride = kUnroll * kLanes;
constexpr float kInf = __builtin_inff();
static_assert(kUnmaskPad % kStride == 0 && kUnmaskBlock % kUnmaskPad == 0);

constexpr UnmaskScore kNoScore = {-kInf, -kInf, -1, 0.0, 0.0, {-kInf, -kInf, -1}};

PDIFF_INLINE int padded(int n) { return (n + kUnmaskPad - 1) / kUnmaskPad * kUnmaskPad; }

// -- one block -----------------------------------------------------------------------------------

// Logits [begin, begin + n) as floats with bans applied, padded: the row itself where that is what
// it holds, else a copy in `buffer`.
template <typename T>
const float* load_block(const UnmaskRows& rows, const T* row, int begin, int n, float* buffer) {
  int ban = 0, end = rows.num_banned;  // the first banned id >= begin
  while (ban < end) {
    const int middle = (ban + end) / 2;
    if (rows.banned[middle] < begin) {
      ban = middle + 1;
    } else {
      end = middle;
    }
  }
  const bool has_bans = ban < rows.num_banned && rows.banned[ban] < begin + n;
  if constexpr (sizeof(T) == sizeof(float)) {
    if (!has_bans && n % kUnmaskPad == 0) return row + begin;
  }
  for (int i = 0; i < padded(n); i += kLanes) {
    store(buffer + i, load_first(row + begin + i, n - i, -kInf));
  }
  for (; ban < rows.num_banned && rows.banned[ban] < begin + n; ++ban) {
    buffer[rows.banned[ban] - begin] = -kInf;
  }
  return buffer;
}

struct BlockMax {
  float first, second;
  Vec lanes;
};

// The two largest values, NaN ignored.
PDIFF_INLINE BlockMax block_max(const float* x, int n) {
  Vec first[kUnroll], second[kUnroll];
  for (int u = 0; u < kUnroll; ++u) first[u] = second[u] = broadcast(-kInf);
  for (int i = 0; i < n; i += kStride) {
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) {
      const Vec v = load(x + i + u * kLanes);
      second[u] = max(min(v, first[u]), second[u]);
      first[u] = max(v, first[u]);
    }
  }
  for (int u = 1; u < kUnroll; ++u) {
    second[0] = max(max(second[0], second[u]), min(first[0], first[u]));
    first[0] = max(first[0], first[u]);
  }
  const float largest = reduce_max(first[0]);
  const Mask at_largest = first[0] == broadcast(largest);
  const Vec others = select(at_largest, broadcast(-kInf), first[0]);
  const float below = fmaxf(reduce_max(others), reduce_max(second[0]));
  return {largest, count(at_largest) > 1 ? largest : below, first[0]};
}

PDIFF_INLINE int find(const float* x, float value) {
  for (int i = 0;; i += kLanes) {
    const Mask found = load(x + i) == broadcast(value);
    if (any(found)) return i + first_set(found);
  }
}

struct BlockSum {
  float sum, weighted;
};

// sum 2^d, sum d 2^d. d ends at -127, where 2^d counts as 0, so that -inf adds 0 and not -inf * 0.
// The second operand of max keeps a NaN, which so reaches the sum.
PDIFF_INLINE BlockSum block_sum(const float* x, int n, float max_logit, float scale,
                                const char* next) {
  Vec sum[kUnroll], weighted[kUnroll];
  for (int u = 0; u < kUnroll; ++u) sum[u] = weighted[u] = zero();
  const Vec m = broadcast(max_logit), s = broadcast(scale), floor = broadcast(-127.0f);
  for (int i = 0; i < n; i += kStride) {
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) {
      prefetch(next + (i + u * kLanes) * sizeof(float));
      const Vec d = max(floor, (load(x + i + u * kLanes) - m) * s);
      const Vec e = exp2_bounded(d);
      sum[u] = sum[u] + e;
      weighted[u] = fma(d, e, weighted[u]);
    }
  }
  return {reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3])),
          reduce_add((weighted[0] + weighted[1]) + (weighted[2] + weighted[3]))};
}

// Express a score's sums relative to a larger maximum.
PDIFF_INLINE void raise_max(UnmaskScore& score, float new_max, float scale) {
  if (score.sum == 0.0) return;
  const double delta = static_cast<double>(score.max - new_max) * scale;
  const double factor = ::exp2(delta);
  score.weighted = delta > -1000.0 ? factor * (score.weighted + delta * score.sum) : 0.0;
  score.sum *= factor;
}

// -- Gumbel-max ----------------------------------------------------------------------------------

struct Sampler {
  RandomStream stream;
  float inverse_temperature;
};

// An upper bound of each word's Gumbel number, from exponent and mantissa of the word as a float.
// With v = (word + 1/2) / 2^32: -log(-log(1 - v)) <= -log(v), and log2(1 + m) >= m for a mantissa
// m. The last constant covers rounding.
PDIFF_INLINE Vec gumbel_bound(VecInt words) {
  constexpr float kLn2 = 0.693147181f;
  const Vec log2_word = to_float(bits(to_float_unsigned(words)));  // times 2^23, plus 127
  return fma(log2_word, broadcast(-kLn2 * 0x1p-23f), broadcast(kLn2 * (127 + 32) + 1e-4f));
}

// Offer kLanes logits with their words. Few can beat the best one so far, so the Gumbel numbers
// themselves are rarely computed. Rounding is monotonic, so a bound stays one.
PDIFF_INLINE void offer(UnmaskDraw& best, VecInt words, const float* x, int first_idx,
                        float inverse_temperature) {
  const Vec logits = load(x), scale = broadcast(inverse_temperature);
  const Mask candidates = fma(logits, scale, gumbel_bound(words)) >= broadcast(best.key);
  if (!any(candidates)) return;
  uint32_t word[kLanes];
  float keys[kLanes] = {};
  int32_t lanes[kLanes];
  store(word, words);
  const int num = store_compressed(lanes, candidates, iota());
  for (int i = 0; i < num; ++i) keys[lanes[i]] = gumbel(word[lanes[i]]);
  store(keys, fma(logits, scale, load(keys)));
  for (int i = 0; i < num; ++i) {
    const int j = lanes[i];
    if (keys[j] > best.key) best = {keys[j], x[j], first_idx + j};
  }
}

// The word of each lane's id.
PDIFF_INLINE VecInt random_words_of(RandomStream stream, VecInt ids) {
  const Philox4x32<VecInt> words = random_words(stream, ids >> 2);
  const Mask odd = any_bit(ids, 1);
  const VecInt low = select(odd, words.word[1], words.word[0]);
  const VecInt high = select(odd, words.word[3], words.word[2]);
  return select(any_bit(ids, 2), high, low);
}

// ids[i] is the vocabulary id of x[i]; null: first_idx + i.
void sample_block(UnmaskDraw& best, const float* x, int n, const int32_t* ids, int first_idx,
                  const Sampler& sampler) {
  if (ids != nullptr) {
    for (int i = 0; i < n; i += kLanes) {
      const VecInt words = random_words_of(sampler.stream, load(ids + i));
      offer(best, words, x + i, first_idx + i, sampler.inverse_temperature);
    }
    return;
  }
  for (int i = 0; i < n; i += 4 * kLanes) {
    const VecInt group = iota() + broadcast_int((first_idx + i) / 4);
    Philox4x32<VecInt> words = random_words(sampler.stream, group);
    interleave(words.word);
    for (int k = 0; k < 4; ++k) {
      const int j = i + k * kLanes;
      offer(best, words.word[k], x + j, first_idx + j, sampler.inverse_temperature);
    }
  }
}

// -- a list of logits ----------------------------------------------------------------------------

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

// -- the kept set --------------------------------------------------------------------------------

struct List {
  float* logits;
  int32_t* ids;  // ascending; null: not wanted
  int n;
};

// The last entry of a prefix in the order (logit descending, id ascending).
struct Boundary {
  float logit;
  int32_t id;
};

struct Range {
  float lo, hi;
};

Range range_of(const List& list) {
  Vec lo = broadcast(kInf), hi = broadcast(-kInf);
  for (int i = 0; i < list.n; i += kLanes) {
    const Mask valid = first_lanes(list.n - i);
    const Vec x = load(list.logits + i);
    lo = select(valid, min(x, lo), lo);
    hi = select(valid, max(x, hi), hi);
  }
  return {reduce_min(lo), reduce_max(hi)};
}

// Entries of `from` with logit >= pivot, or those below it, in their order. `to` may be `from`.
List take_side(const List& from, const List& to, float pivot, bool upper) {
  int n = 0;
  for (int i = 0; i < from.n; i += kLanes) {
    const Vec x = load(from.logits + i);
    const Mask above = x >= broadcast(pivot);
    const Mask chosen = (upper ? above : ~above) & first_lanes(from.n - i);
    if (!any(chosen)) continue;
    if (from.ids != nullptr) store_compressed(to.ids + n, chosen, load(from.ids + i));
    n += store_compressed(to.logits + n, chosen, x);
  }
  return {to.logits, from.ids != nullptr ? to.ids : nullptr, n};
}

struct Prefix {
  double mass;
  int64_t num;
};

// How much of the list is >= pivot; its mass only where asked for.
Prefix measure_above(const List& list, float pivot, bool wants_mass, float max_logit, float scale) {
  Prefix above = {0.0, 0};
  for (int begin = 0; begin < list.n; begin += kUnmaskBlock) {
    const int end = begin + kUnmaskBlock < list.n ? begin + kUnmaskBlock : list.n;
    Vec mass = zero();
    for (int i = begin; i < end; i += kLanes) {
      const Vec x = load(list.logits + i);
      const Mask chosen = (x >= broadcast(pivot)) & first_lanes(end - i);
      above.num += count(chosen);
      if (!wants_mass || !any(chosen)) continue;
      const Vec d = (x - broadcast(max_logit)) * broadcast(scale);
      mass = mass + select(chosen, exp2_bounded(d), zero());
    }
    above.mass += reduce_add(mass);
  }
  return above;
}

// Where the shortest prefix that reaches either goal ends, found by halving the range of logits:
// only the half that holds the boundary is looked at again, so the work is a small multiple of the
// list.
Boundary find_boundary(List list, const List& work, Prefix goal, float max_logit, float scale) {
  const bool wants_mass = goal.mass < DBL_MAX;
  Prefix kept = {0.0, 0};
  Range range = range_of(list);
  while (range.lo < range.hi) {
    float pivot = 0.5f * range.lo + 0.5f * range.hi;
    if (!(pivot > range.lo)) pivot = range.hi;  // neighbours
    const Prefix above = measure_above(list, pivot, wants_mass, max_logit, scale);
    const bool upper = kept.mass + above.mass >= goal.mass || kept.num + above.num >= goal.num;
    if (!upper) kept = {kept.mass + above.mass, kept.num + above.num};
    list = take_side(list, work, pivot, upper);
    range = range_of(list);
  }
  // Equal logits are left. Top-k keeps all of them, top-p those of lowest id that it needs.
  const double weight = ::exp2(static_cast<double>(range.lo - max_logit) * scale);
  const double num = fmin(list.n, ceil((goal.mass - kept.mass) / weight));
  const int last = num > 1.0 ? static_cast<int>(num) - 1 : 0;
  return {range.lo, list.ids != nullptr ? list.ids[last] : -1};
}

// The part of a prefix of `list` up to its boundary, padded.
List take_prefix(const List& list, const List& to, Boundary boundary) {
  int n = 0;
  for (int i = 0; i < list.n; i += kLanes) {
    const Vec x = load(list.logits + i), edge = broadcast(boundary.logit);
    const VecInt id = load(list.ids + i);
    const Mask tied = (x == edge) & (id <= broadcast_int(boundary.id));
    const Mask kept = ((edge < x) | tied) & first_lanes(list.n - i);
    if (!any(kept)) continue;
    store_compressed(to.ids + n, kept, id);
    n += store_compressed(to.logits + n, kept, x);
  }
  for (int i = n; i < padded(n); ++i) {
    to.logits[i] = -kInf;
    to.ids[i] = 0;
  }
  return {to.logits, to.ids, n};
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

float confidence(const UnmaskScore& score, UnmaskRule rule, float scale) {
  const auto probability = [&](float logit) {
    return ::exp2(static_cast<double>(logit - score.max) * scale) / score.sum;
  };
  switch (rule) {
    case UnmaskRule::kEntropy: {
      constexpr double kLn2 = 0.69314718055994530942;
      return static_cast<float>(kLn2 * (score.weighted / score.sum - log2(score.sum)));
    }
    case UnmaskRule::kMargin:
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
      is_distribution ? confidence(score, row.settings.rule, row.scale) : __builtin_nanf("");
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
    parallel_for(p.num_rows, p.num_threads, 1, finish);
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
  if (rows.params.logits_dtype == DType::kBFloat16) return score_rows_of<bfloat16>(rows);
  score_rows_of<float>(rows);
}

}  // namespace pdiff::cpu::PDIFF_ISA
