#include <algorithm>
#include <cfloat>

#include "cuda/common/launch.h"
#include "cuda/unmask/finish.cuh"
#include "cuda/unmask/score.cuh"
#include "cuda/unmask/select.cuh"
#include "pdiff/error.h"

namespace pdiff::cuda {
namespace {

using namespace unmasking;

int64_t element_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

/// Of a setting that the host can see.
template <typename T, typename IsGood>
void check_value(const PerSpan<T>& setting, const char* name, const char* expected,
                 const IsGood& is_good) {
  PDIFF_CHECK(setting.values != nullptr || is_good(setting.value), name, ": expected ", expected,
              ", got ", setting.value);
}

bool may_filter(const UnmaskParams& p) {
  return p.top_p.values != nullptr || p.top_k.values != nullptr || p.top_p.value < 1.0f ||
         p.top_k.value > 0;
}

void check_params(const UnmaskParams& p) {
  PDIFF_CHECK(p.num_rows >= 0 && p.num_rows <= INT32_MAX, "num_rows: expected 0 to 2^31 - 1, got ",
              p.num_rows);
  PDIFF_CHECK(p.num_spans >= 0 && p.num_spans <= INT32_MAX,
              "num_spans: expected 0 to 2^31 - 1, got ", p.num_spans);
  PDIFF_CHECK(p.vocab_size > 0 && p.vocab_size <= INT32_MAX - kSegment,
              "logits: expected 1 to 2^31 columns, got ", p.vocab_size);
  PDIFF_CHECK(p.logits_dtype == DType::kFloat32 || p.logits_dtype == DType::kBFloat16 ||
                  p.logits_dtype == DType::kFloat16,
              "logits: expected float32, bfloat16 or float16");
  const int64_t bytes = element_bytes(p.logits_dtype);
  PDIFF_CHECK(reinterpret_cast<uintptr_t>(p.logits) % bytes == 0, "logits: expected elements of ",
              bytes, " bytes to be aligned");
  PDIFF_CHECK(
      p.logits_stride >= 0 && p.logits_stride <= INT64_MAX / 8 / std::max<int64_t>(p.num_rows, 1),
      "logits: expected rows that can be addressed, got stride ", p.logits_stride);
  if (p.num_spans == 0) return;
  check_value(p.temperature, "temperature", "a finite number >= 0",
              [](float x) { return x >= 0.0f && x <= FLT_MAX; });
  check_value(p.alg_temp, "alg_temp", ">= 0", [](float x) { return x >= 0.0f; });
  check_value(p.top_p, "top_p", ">= 0", [](float x) { return x >= 0.0f; });
  check_value(p.top_k, "top_k", ">= 0", [](int32_t x) { return x >= 0; });
  check_value(p.threshold, "threshold", ">= 0", [](float x) { return x >= 0.0f; });
}

/// Lays the workspace over memory; returns its size.
int64_t lay_out(Workspace& workspace, unsigned char* memory, int64_t num_rows, int64_t vocab_size,
                bool filters) {
  int64_t bytes = 0;
  const auto take = [&](auto*& pointer, int64_t num) {
    pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(memory + bytes);
    bytes += (num * static_cast<int64_t>(sizeof(*pointer)) + 15) / 16 * 16;
  };
  const int64_t segments = num_rows * num_segments(vocab_size);
  take(workspace.scores, segments);
  take(workspace.rank_keys, num_rows);
  take(workspace.sorted, num_rows);
  workspace.lane_max = nullptr;
  if (filters) take(workspace.lane_max, segments * kWarpSize);
  return bytes;
}

template <typename T>
void score_segments(const UnmaskParams& p, const Workspace& workspace, const CudaQueue& queue) {
  // Strips so long that a warp's start-up does not count, so short that the last ones end together.
  constexpr int kMaxStrip = 8, kWavesWanted = 4, kWarpsPerSm = 32;
  const int32_t segments = num_segments(p.vocab_size);
  const int64_t wanted = int64_t{kWavesWanted} * kWarpsPerSm * num_sms(queue.device_idx);
  const auto per_strip = static_cast<int32_t>(
      std::clamp<int64_t>(p.num_rows * segments / wanted, 1, std::min(kMaxStrip, segments)));
  const int32_t per_block = per_strip * kScoreWarps;
  const int32_t blocks_per_row = (segments + per_block - 1) / per_block;
  const LaunchShape shape{.name = "unmask: score_segments",
                          .num_blocks = p.num_rows * blocks_per_row,
                          .num_threads = kScoreWarps * kWarpSize,
                          .shared_bytes = int64_t{kScoreWarps} * RowReader<T>::kBanWords * 4};
  PDIFF_CHECK(shape.num_blocks <= INT32_MAX, "logits: expected fewer elements, got ", p.num_rows,
              " x ", p.vocab_size);
  const bool draws = p.temperature.values != nullptr || p.temperature.value > 0.0f;
  launch(draws ? score_segments_kernel<T, true> : score_segments_kernel<T, false>, shape, queue, p,
         workspace, per_strip, static_cast<uint32_t>(blocks_per_row));
}

template <typename T>
void finish_rows(const UnmaskParams& p, const Workspace& workspace, const CudaQueue& queue) {
  const bool filters = may_filter(p);
  const int64_t chunks = int64_t{num_segments(p.vocab_size)} * RowReader<T>::kChunks;
  const int num_warps =
      filters ? static_cast<int>(std::min<int64_t>(
                    kFilterWarps, (p.vocab_size + RowReader<T>::kChunk - 1) / RowReader<T>::kChunk))
              : std::min<int>(kFinishWarps, static_cast<int>(chunks));
  const LaunchShape shape{
      .name = "unmask: finish_rows",
      .num_blocks = p.num_rows,
      .num_threads = num_warps * kWarpSize,
      .shared_bytes = 16 + (filters ? static_cast<int64_t>(sizeof(FilterShared)) : 0) +
                      int64_t{num_warps} * RowReader<T>::kBanWords * 4};
  launch(filters ? finish_rows_kernel<T, true> : finish_rows_kernel<T, false>, shape, queue, p,
         workspace, confidence_of(p.rule));
}

template <typename T>
void score_rows(const UnmaskParams& p, const Workspace& workspace, const CudaQueue& queue) {
  score_segments<T>(p, workspace, queue);
  finish_rows<T>(p, workspace, queue);
}

void select_spans(const UnmaskParams& p, const Workspace& workspace, const CudaQueue& queue) {
  const bool prefix = writes_a_prefix(p.rule);
  const LaunchShape shape{
      .name = "unmask: select_spans",
      .num_blocks = p.num_spans,
      .num_threads = kSelectWarps * kWarpSize,
      .shared_bytes = static_cast<int64_t>(sizeof(SelectShared)) +
                      (prefix ? static_cast<int64_t>(sizeof(SurePrefixShared)) : 0)};
  launch(prefix ? select_spans_kernel<true> : select_spans_kernel<false>, shape, queue, p,
         workspace);
}

}  // namespace

int64_t unmask_workspace_bytes(int64_t num_rows, int64_t vocab_size, bool filters) {
  Workspace workspace;
  return lay_out(workspace, nullptr, num_rows, vocab_size, filters);
}

void unmask(const UnmaskParams& params, void* memory, int64_t workspace_bytes,
            const CudaQueue& queue) {
  check_params(params);
  if (params.num_rows == 0) return;
  Workspace workspace;
  const int64_t needed = lay_out(workspace, static_cast<unsigned char*>(memory), params.num_rows,
                                 params.vocab_size, may_filter(params));
  PDIFF_CHECK(workspace_bytes >= needed, "workspace: expected ", needed, " bytes, got ",
              workspace_bytes);
  PDIFF_CHECK(reinterpret_cast<uintptr_t>(memory) % 16 == 0, "workspace: expected alignment to 16");
  const DeviceGuard guard(queue.device_idx);
  switch (params.logits_dtype) {
    case DType::kFloat32:
      score_rows<float>(params, workspace, queue);
      break;
    case DType::kBFloat16:
      score_rows<bfloat16>(params, workspace, queue);
      break;
    case DType::kFloat16:
      score_rows<float16>(params, workspace, queue);
      break;
  }
  if (params.num_spans > 0) select_spans(params, workspace, queue);
}

}  // namespace pdiff::cuda
