#include "pdiff/unmask.h"

#include <algorithm>
#include <cfloat>
#include <memory>
#include <vector>

#include "common/gumbel.h"
#include "common/select.h"
#include "cpu/dtype.h"
#include "cpu/unmask_rows.h"
#include "pdiff/error.h"

namespace pdiff::cpu {
namespace {

void check(const UnmaskParams& p) {
  check_dtype("logits_dtype", p.logits_dtype);
  PDIFF_CHECK(p.num_rows >= 0, "num_rows: expected >= 0, got ", p.num_rows);
  PDIFF_CHECK(p.vocab_size > 0 && p.vocab_size < INT32_MAX - kUnmaskPad,
              "logits: expected 1 to 2^31 columns, got ", p.vocab_size);
  PDIFF_CHECK(p.cu_rows_span[0] == 0, "cu_rows_span: expected to start at 0, got ",
              p.cu_rows_span[0]);
  PDIFF_CHECK(p.cu_rows_span[p.num_spans] == p.num_rows,
              "cu_rows_span: expected to end at num_rows = ", p.num_rows, ", got ",
              p.cu_rows_span[p.num_spans]);
  for (int64_t span = 0; span < p.num_spans; ++span) {
    const int32_t begin = p.cu_rows_span[span], end = p.cu_rows_span[span + 1];
    PDIFF_CHECK(begin <= end && end <= p.num_rows, "cu_rows_span: expected ascending values, got ",
                begin, " before ", end);
    for (int32_t row = begin; row < end; ++row) {
      const int32_t position = p.row_position[row];
      PDIFF_CHECK(position >= 0 && position < p.total_tokens, "row_position[", row,
                  "]: expected 0 to ", p.total_tokens - 1, ", got ", position);
      PDIFF_CHECK(row == begin || p.row_position[row - 1] < position, "row_position[", row,
                  "]: expected ascending positions within a span, got ", position, " after ",
                  p.row_position[row - 1]);
    }
    const float temperature = p.temperature[span], alg_temp = p.alg_temp[span];
    PDIFF_CHECK(temperature >= 0.0f && temperature <= FLT_MAX,
                "temperature: expected a finite number >= 0, got ", temperature);
    PDIFF_CHECK(alg_temp >= 0.0f, "alg_temp: expected >= 0, got ", alg_temp);
    PDIFF_CHECK(p.top_p[span] >= 0.0f, "top_p: expected >= 0, got ", p.top_p[span]);
    PDIFF_CHECK(p.top_k[span] >= 0, "top_k: expected >= 0, got ", p.top_k[span]);
    PDIFF_CHECK(p.threshold[span] >= 0.0f, "threshold: expected >= 0, got ", p.threshold[span]);
  }
  for (int64_t i = 0; i < p.num_banned; ++i) {
    PDIFF_CHECK(p.banned_ids[i] >= 0 && p.banned_ids[i] < p.vocab_size, "banned_ids[", i,
                "]: expected 0 to ", p.vocab_size - 1, ", got ", p.banned_ids[i]);
  }
}

UnmaskSettings resolve(const UnmaskParams& p, int64_t span) {
  constexpr float kMinTemperature = 1e-20f;  // its inverse, times any usual logit, is finite
  const float temperature = p.temperature[span];
  return {
      .confidence = confidence_of(p.rule),
      .draws = temperature > 0.0f,
      .inverse_temperature =
          temperature > 0.0f ? 1.0f / std::max(temperature, kMinTemperature) : 1.0f,
      .top_p = p.top_p[span],
      .top_k = p.top_k[span] < p.vocab_size ? p.top_k[span] : 0,
      .step_idx = static_cast<uint32_t>(p.step_idx[span]),
  };
}

// Confidence, or with alg_temp the Gumbel key whose k best are k draws without replacement.
float rank_key(const UnmaskParams& p, int64_t span, int32_t row) {
  const float alg_temp = p.alg_temp[span];
  if (alg_temp == 0.0f) return p.confidence[row];
  const int32_t* position = p.random_position != nullptr ? p.random_position : p.row_position;
  const RandomStream stream = {p.seeds != nullptr ? static_cast<uint64_t>(p.seeds[row]) : 0,
                               static_cast<uint32_t>(position[row]),
                               static_cast<uint32_t>(p.step_idx[span]), RandomUse::kPosition};
  return p.confidence[row] / alg_temp + gumbel(random_word(stream, 0));
}

void write_span(const UnmaskParams& p, int64_t span, std::vector<int32_t>& rows,
                std::vector<float>& keys) {
  const int32_t begin = p.cu_rows_span[span], end = p.cu_rows_span[span + 1];
  rows.clear();
  keys.resize(end - begin);
  for (int32_t row = begin; row < end; ++row) {
    if (p.is_nan[row]) continue;
    keys[row - begin] = rank_key(p, span, row);
    rows.push_back(row);
  }
  const size_t num = std::min<size_t>(std::max(p.num_unmask[span], 0), rows.size());
  std::partial_sort(rows.begin(), rows.begin() + num, rows.end(), [&](int32_t a, int32_t b) {
    return ranks_before(keys[a - begin], a, keys[b - begin], b);
  });
  double entropy_before = 0.0;
  for (size_t i = 0; i < num; ++i) {
    const int32_t row = rows[i];
    const float confidence = p.confidence[row];
    const auto rank = static_cast<int64_t>(i + 1);
    if (i > 0 && !is_sure(p.rule, p.threshold[span], confidence, rank, entropy_before)) {
      if (writes_a_prefix(p.rule)) break;
      continue;
    }
    entropy_before -= confidence;
    p.token_ids[p.row_position[row]] = p.candidate[row];
    p.is_written[row] = 1;
    if (p.num_masked != nullptr) --p.num_masked[span];
  }
}

}  // namespace

void unmask(const UnmaskParams& params) {
  check(params);
  const auto num_rows = static_cast<size_t>(params.num_rows);
  std::fill_n(params.is_written, num_rows, uint8_t{0});
  if (num_rows == 0) return;

  std::vector<int32_t> row_span(num_rows);
  std::vector<UnmaskSettings> settings(params.num_spans);
  bool filters = false;
  for (int64_t span = 0; span < params.num_spans; ++span) {
    const int32_t begin = params.cu_rows_span[span], end = params.cu_rows_span[span + 1];
    std::fill(row_span.begin() + begin, row_span.begin() + end, static_cast<int32_t>(span));
    settings[span] = resolve(params, span);
    filters = filters || settings[span].filters();
  }
  std::vector<int32_t> banned(params.banned_ids, params.banned_ids + params.num_banned);
  std::sort(banned.begin(), banned.end());

  const int64_t num_blocks = (params.vocab_size + kUnmaskBlock - 1) / kUnmaskBlock;
  const int64_t num_segments = (params.vocab_size + kUnmaskSegment - 1) / kUnmaskSegment;
  const int64_t list_size =
      filters ? int64_t{std::max(1, params.num_threads)} * 2 * (params.vocab_size + kUnmaskPad) : 0;
  const auto scores = std::make_unique_for_overwrite<UnmaskScore[]>(num_rows * num_segments);
  const auto lane_max =
      std::make_unique_for_overwrite<float[]>(num_rows * num_blocks * kUnmaskMaxLanes);
  std::fill_n(lane_max.get(), num_rows * num_blocks * kUnmaskMaxLanes, -FLT_MAX);
  const auto list_logits = std::make_unique_for_overwrite<float[]>(list_size);
  const auto list_ids = std::make_unique_for_overwrite<int32_t[]>(list_size);
  PDIFF_CALL_KERNEL(
      score_rows, UnmaskRows{params, row_span.data(), settings.data(), banned.data(),
                             static_cast<int32_t>(banned.size()), filters, num_blocks, num_segments,
                             scores.get(), lane_max.get(), list_logits.get(), list_ids.get()});

  std::vector<int32_t> rows;
  std::vector<float> keys;
  for (int64_t span = 0; span < params.num_spans; ++span) write_span(params, span, rows, keys);
}

}  // namespace pdiff::cpu
