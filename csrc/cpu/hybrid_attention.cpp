#include "cpu/hybrid_attention.h"

#include <cstddef>
#include <memory>
#include <new>
#include <vector>

#include "common/parallel.h"
#include "cpu/dtype.h"
#include "pdiff/error.h"
#include "pdiff/isa.h"

namespace pdiff {
namespace {

constexpr std::align_val_t kCacheLine{64};

struct AlignedDelete {
  void operator()(float* p) const { ::operator delete[](p, kCacheLine); }
};
using AlignedFloats = std::unique_ptr<float[], AlignedDelete>;

AlignedFloats allocate_floats(int64_t count) {
  return AlignedFloats(static_cast<float*>(
      ::operator new[](static_cast<size_t>(count) * sizeof(float), kCacheLine)));
}

// One workspace per thread that outlives the call: fresh pages would cost more than a small task.
float* thread_workspace(int64_t floats) {
  thread_local AlignedFloats workspace;
  thread_local int64_t capacity = 0;
  if (capacity < floats) {
    workspace = allocate_floats(floats);
    capacity = floats;
  }
  return workspace.get();
}

const cpu::HybridAttentionForward& forward_kernel([[maybe_unused]] DType dtype) {
  [[maybe_unused]] const Isa isa = selected_isa();
#if PDIFF_HAVE_AMX
  if (isa >= Isa::kAmx && dtype == DType::kBFloat16) return cpu::amx::hybrid_attention_forward;
#endif
#if PDIFF_HAVE_AVX512
  if (isa >= Isa::kAvx512) return cpu::avx512::hybrid_attention_forward;
#endif
#if PDIFF_HAVE_AVX2
  if (isa >= Isa::kAvx2) return cpu::avx2::hybrid_attention_forward;
#endif
  return cpu::generic::hybrid_attention_forward;
}

const cpu::HybridAttentionBackward& backward_kernel([[maybe_unused]] DType dtype) {
  [[maybe_unused]] const Isa isa = selected_isa();
#if PDIFF_HAVE_AMX
  if (isa >= Isa::kAmx && dtype == DType::kBFloat16) return cpu::amx::hybrid_attention_backward;
#endif
#if PDIFF_HAVE_AVX512
  if (isa >= Isa::kAvx512) return cpu::avx512::hybrid_attention_backward;
#endif
#if PDIFF_HAVE_AVX2
  if (isa >= Isa::kAvx2) return cpu::avx2::hybrid_attention_backward;
#endif
  return cpu::generic::hybrid_attention_backward;
}

void check_plan(const PlanHeader& plan, DType dtype) {
  PDIFF_CHECK(plan.schedule == static_cast<int32_t>(Schedule::kCpu),
              "plan: expected one packed for the CPU, got one for a GPU");
  cpu::check_dtype("dtype", dtype);
}

void check_tensors(const PlanHeader& plan, const void* q, const void* k, const void* v,
                   const void* out) {
  PDIFF_CHECK(plan.total_q == 0 || (q != nullptr && out != nullptr),
              "q, out: expected memory, got a null pointer");
  PDIFF_CHECK(plan.total_kv == 0 || (k != nullptr && v != nullptr),
              "k, v: expected memory, got a null pointer");
}

// Query heads of a KV head that one backward task takes. A long sequence is shared out by query
// head; the rule looks at the sequence alone, so results depend on neither batch nor threads.
int heads_per_task(const PlanHeader& plan, const PlanSequence& sequence) {
  constexpr int32_t kLongSequence = 1024;
  return sequence.num_rows >= kLongSequence ? 1 : plan.num_heads_q / plan.num_heads_kv;
}

}  // namespace

void hybrid_attention(const HybridAttentionParams& params) {
  const PlanHeader& plan = params.plan.header;
  check_plan(plan, params.dtype);
  check_tensors(plan, params.q, params.k, params.v, params.out);
  PDIFF_CHECK(params.softmax_scale >= 0.0f, "softmax_scale: expected >= 0, got ",
              params.softmax_scale);
  const cpu::HybridAttentionForward& kernel = forward_kernel(params.dtype);
  const int64_t workspace_floats = kernel.workspace_floats(plan);
  const int64_t num_tasks = int64_t{plan.num_tiles} * plan.num_heads_kv;
  parallel_for(num_tasks, params.num_threads, 1, [&](int64_t task) {
    kernel.tile(params, params.plan.tiles[task / plan.num_heads_kv],
                static_cast<int>(task % plan.num_heads_kv), thread_workspace(workspace_floats));
  });
}

void hybrid_attention_backward(const HybridAttentionBackwardParams& params) {
  const PlanHeader& plan = params.plan.header;
  check_plan(plan, params.dtype);
  PDIFF_CHECK(plan.page_size == 0, "plan: expected packed keys, got a page table");
  check_tensors(plan, params.q, params.k, params.v, params.out);
  check_tensors(plan, params.dout, params.dk, params.dv, params.dq);
  PDIFF_CHECK(plan.total_q == 0 || params.lse != nullptr, "lse: expected memory, got null");
  const cpu::HybridAttentionBackward& kernel = backward_kernel(params.dtype);

  // One entry per sequence and KV head: its tasks' parts of dk and dv lie one after another.
  struct Gradient {
    int32_t sequence, kv_head, num_parts;
    int64_t offset;
  };
  std::vector<Gradient> gradients;
  std::vector<cpu::HybridAttentionBackwardTask> tasks;
  const int group_size = plan.num_heads_q / plan.num_heads_kv;
  int64_t num_floats = 0;
  for (int32_t i = 0; i < plan.num_sequences; ++i) {
    const int32_t idx = params.plan.sequence_order[i];
    const PlanSequence& sequence = params.plan.sequences[idx];
    const int heads = heads_per_task(plan, sequence);
    for (int32_t kv_head = 0; kv_head < plan.num_heads_kv; ++kv_head) {
      gradients.push_back({idx, kv_head, group_size / heads, num_floats});
      num_floats += group_size / heads * cpu::part_floats(plan, sequence);
    }
  }
  const AlignedFloats dk = allocate_floats(num_floats), dv = allocate_floats(num_floats);
  for (const Gradient& gradient : gradients) {
    const int64_t part_floats = cpu::part_floats(plan, params.plan.sequences[gradient.sequence]);
    const int heads = group_size / gradient.num_parts;
    for (int32_t part = 0; part < gradient.num_parts; ++part) {
      const int32_t head_lo = gradient.kv_head * group_size + part * heads;
      const int64_t offset = gradient.offset + part * part_floats;
      tasks.push_back({gradient.sequence, gradient.kv_head, head_lo, head_lo + heads,
                       dk.get() + offset, dv.get() + offset});
    }
  }

  const int64_t workspace_floats = kernel.workspace_floats(plan);
  parallel_for(static_cast<int64_t>(tasks.size()), params.num_threads, 1, [&](int64_t task) {
    kernel.task(params, tasks[task], thread_workspace(workspace_floats));
  });
  parallel_for(static_cast<int64_t>(gradients.size()), params.num_threads, 1, [&](int64_t i) {
    const Gradient& gradient = gradients[i];
    kernel.finish(params, gradient.sequence, gradient.kv_head, gradient.num_parts,
                  dk.get() + gradient.offset, dv.get() + gradient.offset);
  });
}

}  // namespace pdiff
