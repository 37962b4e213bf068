#include <algorithm>

#include "cuda/common/launch.h"
#include "cuda/weighted_cross_entropy/kernel.cuh"
#include "pdiff/error.h"

namespace pdiff::cuda {
namespace {

void check_vocab_size(int64_t vocab_size) {
  PDIFF_CHECK(vocab_size > 0 && vocab_size < INT32_MAX, "logits: expected 1 to 2^31 columns, got ",
              vocab_size);
}

template <typename F>
void with_element_type(DType dtype, const F& f) {
  if (dtype == DType::kBFloat16) return f(bfloat16{});
  if (dtype == DType::kFloat16) return f(float16{});
  f(float{});
}

// Some slots per thread are enough to hide the latency of a group of copies; beyond that, more
// threads. A row that still does not fit takes all the shared memory there is.
template <typename T>
void launch_rows(const WeightedCrossEntropyParams& p, const double* normaliser,
                 float* cross_entropy, const CudaQueue& queue) {
  constexpr int kSlotsWanted = kMaxSlots / 2;
  const int64_t num_vectors = p.vocab_size / kPerVector<T>;
  int num_threads = 128;
  while (num_threads < kMaxThreads && num_threads * kSlotsWanted < num_vectors) num_threads *= 2;

  const int64_t max_bytes = max_shared_bytes(queue.device_idx);
  const int64_t slot_bytes = int64_t{16} * num_threads;
  const int64_t fit = (max_bytes - sizeof(CrossEntropyShared)) / slot_bytes;
  const int64_t needed = (num_vectors + num_threads - 1) / num_threads;
  const int64_t num_slots = std::min({needed, fit, int64_t{kMaxSlots}});
  const int64_t bytes = sizeof(CrossEntropyShared) + num_slots * slot_bytes;
  const int64_t per_sm =
      std::clamp<int64_t>(max_bytes / (bytes + 1024), 1, kMaxThreads / num_threads);
  const LaunchShape shape{.name = "weighted_cross_entropy",
                          .num_blocks = std::min(p.num_rows, per_sm * num_sms(queue.device_idx)),
                          .num_threads = num_threads,
                          .shared_bytes = bytes};
  const auto kernel = p.dlogits != nullptr ? cross_entropy_rows_kernel<T, true>
                                           : cross_entropy_rows_kernel<T, false>;
  launch(kernel, shape, queue, p, normaliser, cross_entropy, static_cast<int>(num_slots));
}

}  // namespace

int64_t weighted_cross_entropy_workspace_bytes(int64_t num_rows) {
  return num_rows * static_cast<int64_t>(sizeof(float));
}

void weighted_cross_entropy(const WeightedCrossEntropyParams& params, const double* normaliser,
                            void* workspace, const CudaQueue& queue) {
  check_vocab_size(params.vocab_size);
  const DeviceGuard guard(queue.device_idx);
  auto* cross_entropy = static_cast<float*>(workspace);  // [num_rows]
  if (params.num_rows > 0) {
    with_element_type(params.dtype, [&](auto element) {
      launch_rows<decltype(element)>(params, normaliser, cross_entropy, queue);
    });
  }
  const LaunchShape shape{.name = "weighted_cross_entropy: sums",
                          .num_blocks = 1,
                          .num_threads = kMaxThreads,
                          .shared_bytes = kWarpSize * sizeof(CrossEntropySums)};
  launch(join_cross_entropy_kernel, shape, queue, params, normaliser, cross_entropy);
}

void scale_gradient(void* dlogits, DType dtype, int64_t dlogits_stride, int64_t num_rows,
                    int64_t vocab_size, const float* factor, const CudaQueue& queue) {
  if (num_rows == 0) return;
  check_vocab_size(vocab_size);
  const DeviceGuard guard(queue.device_idx);
  const LaunchShape shape{
      .name = "scale_gradient",
      .num_blocks = std::min<int64_t>(num_rows, int64_t{4} * num_sms(queue.device_idx)),
      .num_threads = 512};
  with_element_type(dtype, [&](auto element) {
    using T = decltype(element);
    launch(scale_rows_kernel<T>, shape, queue, static_cast<T*>(dlogits), dlogits_stride, num_rows,
           vocab_size, factor);
  });
}

}  // namespace pdiff::cuda
