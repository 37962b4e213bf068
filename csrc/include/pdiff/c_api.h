#ifndef PDIFF_C_API_H_
#define PDIFF_C_API_H_

/* The C interface of libpdiff.
 *
 * Errors   A function that can fail returns a status; pdiff_last_error() then holds the message,
 *          which names the argument, what was expected and what came, and outputs are untouched.
 *          No exception leaves the library.
 * Memory   A handle from *_create or *_from_* is the caller's, until *_free; NULL may be freed.
 *          Arrays stay the caller's and are read or written during the call only.
 * Threads  Handles never change: any number of threads may use one at the same time.
 * Numbers  Set an args struct to zeros first: a field left at 0 means its default.
 */

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum pdiff_status {
  PDIFF_OK = 0,
  PDIFF_INVALID_ARGUMENT = 1, /* what pdiff::Error says in C++ */
  PDIFF_OUT_OF_MEMORY = 2,
  PDIFF_INTERNAL_ERROR = 3
} pdiff_status;

/* CPU kernels take the first two. */
typedef enum pdiff_dtype { PDIFF_FLOAT32 = 0, PDIFF_BFLOAT16 = 1, PDIFF_FLOAT16 = 2 } pdiff_dtype;

/* ---- the library ---- */

const char* pdiff_version(void); /* "0.1.0" */

/* Of the last failed call on this thread, "" if there was none. Valid until the next failed call.
 */
const char* pdiff_last_error(void);

/* What the CPU kernels use: "generic", "avx2", "avx512", "avx512_bf16" or "amx"; not to be freed.
 */
pdiff_status pdiff_isa_name(const char** name);

/* Lowers it by name; NULL goes back to the default. Not while a kernel runs. */
pdiff_status pdiff_select_isa(const char* name);

int pdiff_built_with_cuda(void);   /* 1 or 0 */
int pdiff_cuda_device_count(void); /* 0 without a driver or in a build without CUDA */

/* Where a CUDA kernel is put. The call returns at once and waits for nothing; functions that take
 * a queue allocate nothing, so a stream that is being captured will do. */
typedef struct pdiff_cuda_queue {
  int32_t device_idx;
  void* stream; /* cudaStream_t */
} pdiff_cuda_queue;

/* ---- span layout: which key each row of one sequence sees (pdiff/span_layout.h) ---- */

typedef struct pdiff_span_layout pdiff_span_layout;

typedef struct pdiff_span_tags {
  int64_t async_start, async_end, sync; /* token ids */
} pdiff_span_tags;

/* A whole sequence, rows = keys = num_tokens. A span sees what comes before it and all of itself;
 * its siblings not before the next sync. With isolate_spans 0, spans that touch count as one. */
pdiff_status pdiff_span_layout_from_tokens(const int64_t* token_ids, /* [num_tokens] */
                                           int64_t num_tokens, const pdiff_span_tags* tags,
                                           int isolate_spans, pdiff_span_layout** layout);

/* Rows listed in order: segment s has num_rows[s] rows of kind[s] (0 causal, 1 full) and sees the
 * key intervals interval_ptr[s] to interval_ptr[s + 1]. What an engine with a KV cache uses. */
pdiff_status pdiff_span_layout_from_segments(int64_t num_keys, int64_t num_segments,
                                             const int64_t* num_rows,     /* [num_segments] */
                                             const int32_t* kind,         /* [num_segments] */
                                             const int64_t* interval_ptr, /* [num_segments + 1] */
                                             const int64_t* intervals,    /* [.., 2] {lo, hi} */
                                             pdiff_span_layout** layout);

void pdiff_span_layout_free(pdiff_span_layout* layout);

int64_t pdiff_span_layout_num_rows(const pdiff_span_layout* layout);
int64_t pdiff_span_layout_num_keys(const pdiff_span_layout* layout);
int64_t pdiff_span_layout_num_segments(const pdiff_span_layout* layout);

/* mask[q, k] = 1 where row q sees key k, else 0. */
pdiff_status pdiff_span_layout_write_dense_mask(const pdiff_span_layout* layout,
                                                uint8_t* mask /* [num_rows, num_keys] */);

/* ---- attention plan: a batch of layouts, ready for kernels (pdiff/attention_plan.h) ---- */

typedef struct pdiff_attention_plan pdiff_attention_plan;

typedef struct pdiff_attention_plan_options {
  int32_t num_heads_q, num_heads_kv, head_dim;
  int32_t page_size;         /* 0: keys and values are packed */
  const int32_t* page_table; /* [num_layouts, max_pages], -1 past the end */
  int64_t max_pages;
  int32_t for_gpu;    /* 1: tiles for CUDA kernels */
  int32_t whole_keys; /* 1, GPU: no row's keys are shared out between blocks, see AttentionPlan */
} pdiff_attention_plan_options;

/* The layouts are read during the call only. */
pdiff_status pdiff_attention_plan_create(
    const pdiff_span_layout* const* layouts, /* [num_layouts] */
    int64_t num_layouts, const pdiff_attention_plan_options* options, pdiff_attention_plan** plan);

void pdiff_attention_plan_free(pdiff_attention_plan* plan);

int64_t pdiff_attention_plan_total_q(const pdiff_attention_plan* plan);
int64_t pdiff_attention_plan_total_kv(const pdiff_attention_plan* plan);

/* The plan as data, to be copied to the device as it is. */
const int32_t* pdiff_attention_plan_words(const pdiff_attention_plan* plan);
int64_t pdiff_attention_plan_num_words(const pdiff_attention_plan* plan);

/* ---- hybrid attention (pdiff/hybrid_attention.h) ---- */

typedef struct pdiff_hybrid_attention_args {
  int32_t dtype; /* pdiff_dtype of q, k, v, out */
  const void* q; /* [total_q, num_heads_q, head_dim] */
  const void* k; /* [total_kv, num_heads_kv, head_dim], or with pages */
  const void* v; /*   [num_pages, page_size, num_heads_kv, head_dim] */
  void* out;     /* [total_q, num_heads_q, head_dim] */
  float* lse;    /* [num_heads_q, total_q], natural log; NULL: not wanted */

  int64_t q_stride, k_stride, v_stride; /* elements from token to token; 0: contiguous */
  int64_t k_page_stride, v_page_stride; /* elements from page to page; 0: contiguous */

  float softmax_scale; /* 0: 1 / sqrt(head_dim) */
  int32_t num_threads; /* 0: 1 */
} pdiff_hybrid_attention_args;

pdiff_status pdiff_cpu_hybrid_attention(const pdiff_attention_plan* plan,
                                        const pdiff_hybrid_attention_args* args);

/* Memory of the device that a call needs beside its tensors, of any content; at least 1. Until the
 * call has run it is the call's own: streams do not share one. */
int64_t pdiff_cuda_hybrid_attention_workspace_bytes(const pdiff_attention_plan* plan);

/* The same on a GPU: bfloat16 or float16, head_dim 64 or 128. Tensors, workspace and the words of
 * the plan, which was made for_gpu, are in the device's memory, aligned to 16 bytes. The handle
 * gives the sizes: in a captured graph, words of another plan of these sizes may replace its own.
 */
pdiff_status pdiff_cuda_hybrid_attention(const pdiff_attention_plan* plan,
                                         const int32_t* device_words,
                                         const pdiff_hybrid_attention_args* args, void* workspace,
                                         pdiff_cuda_queue queue);

/* ---- unmask: reveal the most certain masked tokens of each span (pdiff/unmask.h) ---- */

typedef enum pdiff_unmask_rule {
  PDIFF_RULE_ENTROPY = 0,
  PDIFF_RULE_PROBABILITY = 1,
  PDIFF_RULE_MARGIN = 2,
  PDIFF_RULE_THRESHOLD = 3,
  PDIFF_RULE_FACTOR = 4,
  PDIFF_RULE_ENTROPY_BUDGET = 5
} pdiff_unmask_rule;

/* Row r of the logits already predicts token_ids[row_position[r]]. A setting is one value for all
 * spans, or the [num_spans] values of its *_per_span where that is not NULL. */
typedef struct pdiff_unmask_args {
  int64_t* token_ids;          /* [total_tokens], written in place */
  const void* logits;          /* [num_rows, vocab_size] */
  const int32_t* row_position; /* [num_rows], ascending within a span */
  const int32_t* cu_rows_span; /* [num_spans + 1] from 0 to num_rows */
  const int32_t* num_unmask;   /* [num_spans]; more than the span's rows: all of them */
  int32_t* num_masked;         /* [num_spans], what a span writes is taken off; NULL: not wanted */
  const int64_t* banned_ids;   /* [num_banned] */
  const int64_t* seeds;        /* [num_rows]; NULL: 0 */
  const int32_t* random_position; /* [num_rows]; NULL: row_position */

  float* confidence;   /* [num_rows] out */
  int64_t* candidate;  /* [num_rows] out */
  uint8_t* is_nan;     /* [num_rows] out */
  uint8_t* is_written; /* [num_rows] out */

  int32_t logits_dtype;  /* pdiff_dtype */
  int64_t logits_stride; /* elements from row to row; 0: contiguous */
  int64_t total_tokens, num_rows, num_spans, vocab_size, num_banned;

  int32_t rule;      /* pdiff_unmask_rule */
  float temperature; /* 0: the likeliest token */
  const float* temperature_per_span;
  float top_p; /* 0 or 1: off (per span: 1) */
  const float* top_p_per_span;
  int32_t top_k; /* 0: off */
  const int32_t* top_k_per_span;
  float alg_temp; /* 0: take the best */
  const float* alg_temp_per_span;
  float threshold; /* of PDIFF_RULE_THRESHOLD, FACTOR and ENTROPY_BUDGET; 0 or greater */
  const float* threshold_per_span;
  int32_t step_idx;
  const int32_t* step_idx_per_span;

  int32_t num_threads; /* 0: 1 */
} pdiff_unmask_args;

pdiff_status pdiff_cpu_unmask(const pdiff_unmask_args* args);

/* Memory of the device that a call needs beside its tensors, for itself; at least 1. */
int64_t pdiff_cuda_unmask_workspace_bytes(const pdiff_unmask_args* args);

/* The same on a GPU, all pointers to the device's memory. A position or id out of range can not be
 * told there: it is skipped. */
pdiff_status pdiff_cuda_unmask(const pdiff_unmask_args* args, void* workspace,
                               int64_t workspace_bytes, pdiff_cuda_queue queue);

#ifdef __cplusplus
}
#endif

#endif /* PDIFF_C_API_H_ */
