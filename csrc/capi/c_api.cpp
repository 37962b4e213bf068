#include "pdiff/c_api.h"

#include <vector>

#include "capi/support.h"
#include "pdiff/attention_plan.h"
#include "pdiff/device.h"
#include "pdiff/hybrid_attention.h"
#include "pdiff/isa.h"
#include "pdiff/span_layout.h"
#include "pdiff/unmask.h"

using namespace pdiff::capi;

pdiff::UnmaskParams pdiff::capi::unmask_params(const pdiff_unmask_args& a) {
  check_count(a.total_tokens, "total_tokens");
  check_count(a.num_rows, "num_rows");
  check_count(a.num_spans, "num_spans");
  check_count(a.num_banned, "num_banned");
  check_count(a.num_threads, "num_threads");
  check_pointer(a.token_ids, "token_ids", a.num_rows);
  check_pointer(a.logits, "logits", a.num_rows);
  check_pointer(a.row_position, "row_position", a.num_rows);
  check_pointer(a.cu_rows_span, "cu_rows_span");
  check_pointer(a.num_unmask, "num_unmask", a.num_spans);
  check_pointer(a.banned_ids, "banned_ids", a.num_banned);
  check_pointer(a.confidence, "confidence", a.num_rows);
  check_pointer(a.candidate, "candidate", a.num_rows);
  check_pointer(a.is_nan, "is_nan", a.num_rows);
  check_pointer(a.is_written, "is_written", a.num_rows);
  PDIFF_CHECK(a.rule >= PDIFF_RULE_ENTROPY && a.rule <= PDIFF_RULE_ENTROPY_BUDGET,
              "rule: expected PDIFF_RULE_ENTROPY to PDIFF_RULE_ENTROPY_BUDGET, got ", a.rule);
  return {.token_ids = a.token_ids,
          .logits = a.logits,
          .row_position = a.row_position,
          .cu_rows_span = a.cu_rows_span,
          .num_unmask = a.num_unmask,
          .num_masked = a.num_masked,
          .banned_ids = a.banned_ids,
          .seeds = a.seeds,
          .random_position = a.random_position,
          .confidence = a.confidence,
          .candidate = a.candidate,
          .is_nan = a.is_nan,
          .is_written = a.is_written,
          .logits_dtype = dtype_of(a.logits_dtype, "logits_dtype"),
          .logits_stride = stride_or(a.logits_stride, a.vocab_size, "logits_stride"),
          .total_tokens = a.total_tokens,
          .num_rows = a.num_rows,
          .num_spans = a.num_spans,
          .vocab_size = a.vocab_size,
          .num_banned = a.num_banned,
          .rule = static_cast<pdiff::UnmaskRule>(a.rule),
          .temperature = {a.temperature_per_span, a.temperature},
          .top_p = {a.top_p_per_span, a.top_p == 0.0f ? 1.0f : a.top_p},
          .top_k = {a.top_k_per_span, a.top_k},
          .alg_temp = {a.alg_temp_per_span, a.alg_temp},
          .threshold = {a.threshold_per_span, a.threshold},
          .step_idx = {a.step_idx_per_span, a.step_idx},
          .num_threads = a.num_threads == 0 ? 1 : a.num_threads};
}

extern "C" {

const char* pdiff_version(void) { return PDIFF_VERSION; }

const char* pdiff_last_error(void) { return last_error().c_str(); }

pdiff_status pdiff_isa_name(const char** name) {
  return guarded([&] {
    check_pointer(name, "name");
    *name = pdiff::isa_name(pdiff::selected_isa());
  });
}

pdiff_status pdiff_select_isa(const char* name) {
  return guarded([&] { pdiff::select_isa(name); });
}

int pdiff_built_with_cuda(void) { return pdiff::built_with_cuda() ? 1 : 0; }

int pdiff_cuda_device_count(void) { return pdiff::cuda_device_count(); }

pdiff_status pdiff_span_layout_from_tokens(const int64_t* token_ids, int64_t num_tokens,
                                           const pdiff_span_tags* tags, int isolate_spans,
                                           pdiff_span_layout** layout) {
  return guarded([&] {
    check_count(num_tokens, "num_tokens");
    check_pointer(token_ids, "token_ids", num_tokens);
    check_pointer(tags, "tags");
    check_pointer(layout, "layout");
    const pdiff::SpanTagIds ids{tags->async_start, tags->async_end, tags->sync};
    hand_over(pdiff::layout_from_tokens(token_ids, num_tokens, ids, isolate_spans != 0), layout);
  });
}

pdiff_status pdiff_span_layout_from_segments(int64_t num_keys, int64_t num_segments,
                                             const int64_t* num_rows, const int32_t* kind,
                                             const int64_t* interval_ptr, const int64_t* intervals,
                                             pdiff_span_layout** layout) {
  return guarded([&] {
    check_count(num_segments, "num_segments");
    check_pointer(num_rows, "num_rows", num_segments);
    check_pointer(kind, "kind", num_segments);
    check_pointer(interval_ptr, "interval_ptr");
    check_pointer(intervals, "intervals", num_segments > 0 ? interval_ptr[num_segments] : 0);
    check_pointer(layout, "layout");
    hand_over(pdiff::layout_from_segments(num_keys, num_segments, num_rows, kind, interval_ptr,
                                          intervals),
              layout);
  });
}

void pdiff_span_layout_free(pdiff_span_layout* layout) { delete layout; }

int64_t pdiff_span_layout_num_rows(const pdiff_span_layout* layout) {
  return layout->layout.num_rows;
}

int64_t pdiff_span_layout_num_keys(const pdiff_span_layout* layout) {
  return layout->layout.num_keys;
}

int64_t pdiff_span_layout_num_segments(const pdiff_span_layout* layout) {
  return layout->layout.num_segments();
}

pdiff_status pdiff_span_layout_write_dense_mask(const pdiff_span_layout* layout, uint8_t* mask) {
  return guarded([&] {
    check_pointer(layout, "layout");
    const int64_t num_rows = layout->layout.num_rows;
    check_pointer(mask, "mask", num_rows * layout->layout.num_keys);
    pdiff::write_dense_mask(layout->layout, mask);
  });
}

pdiff_status pdiff_attention_plan_create(const pdiff_span_layout* const* layouts,
                                         int64_t num_layouts,
                                         const pdiff_attention_plan_options* options,
                                         pdiff_attention_plan** plan) {
  return guarded([&] {
    check_count(num_layouts, "num_layouts");
    check_pointer(layouts, "layouts", num_layouts);
    check_pointer(options, "options");
    check_pointer(plan, "plan");
    std::vector<const pdiff::SpanLayout*> pointers;
    for (int64_t i = 0; i < num_layouts; ++i) {
      PDIFF_CHECK(layouts[i] != nullptr, "layouts[", i, "]: expected a layout, got NULL");
      pointers.push_back(&layouts[i]->layout);
    }
    hand_over(
        pdiff::AttentionPlan(pointers, {.num_heads_q = options->num_heads_q,
                                        .num_heads_kv = options->num_heads_kv,
                                        .head_dim = options->head_dim,
                                        .schedule = options->for_gpu != 0 ? pdiff::Schedule::kGpu
                                                                          : pdiff::Schedule::kCpu,
                                        .split_keys = options->whole_keys == 0,
                                        .page_size = options->page_size,
                                        .page_table = options->page_table,
                                        .max_pages = options->max_pages}),
        plan);
  });
}

void pdiff_attention_plan_free(pdiff_attention_plan* plan) { delete plan; }

int64_t pdiff_attention_plan_total_q(const pdiff_attention_plan* plan) {
  return plan->plan.header().total_q;
}

int64_t pdiff_attention_plan_total_kv(const pdiff_attention_plan* plan) {
  return plan->plan.header().total_kv;
}

const int32_t* pdiff_attention_plan_words(const pdiff_attention_plan* plan) {
  return plan->plan.words();
}

int64_t pdiff_attention_plan_num_words(const pdiff_attention_plan* plan) {
  return plan->plan.num_words();
}

pdiff_status pdiff_cpu_hybrid_attention(const pdiff_attention_plan* plan,
                                        const pdiff_hybrid_attention_args* args) {
  return guarded([&] {
    check_pointer(plan, "plan");
    check_pointer(args, "args");
    const pdiff::PlanView view = pdiff::view_plan(plan->plan.words(), plan->plan.num_words());
    const pdiff::PlanHeader& h = view.header;
    const AttentionStrides strides = checked_strides(*args, h);
    check_count(args->num_threads, "num_threads");
    pdiff::hybrid_attention({.plan = view,
                             .dtype = dtype_of(args->dtype, "dtype"),
                             .q = args->q,
                             .k = args->k,
                             .v = args->v,
                             .out = args->out,
                             .lse = args->lse,
                             .q_stride = strides.q,
                             .k_stride = strides.k,
                             .v_stride = strides.v,
                             .k_page_stride = strides.k_page,
                             .v_page_stride = strides.v_page,
                             .softmax_scale = scale_or_default(args->softmax_scale, h.head_dim),
                             .num_threads = args->num_threads == 0 ? 1 : args->num_threads});
  });
}

pdiff_status pdiff_cpu_unmask(const pdiff_unmask_args* args) {
  return guarded([&] {
    check_pointer(args, "args");
    pdiff::cpu::unmask(unmask_params(*args));
  });
}

}  // extern "C"
