/* libpdiff from C: which token sees which while two spans are written at once, and attention by it.
 */

#include <pdiff/c_api.h>
#include <stdio.h>
#include <stdlib.h>

static void check(pdiff_status status) {
  if (status == PDIFF_OK) return;
  fprintf(stderr, "%s\n", pdiff_last_error());
  exit(1);
}

int main(void) {
  /* Two prompt tokens, two spans < . . >, a sync, and one token after it. */
  enum { kOpen = 1, kClose = 2, kSync = 3, kNumTokens = 12, kNumHeads = 2, kHeadDim = 16 };
  const int64_t token_ids[kNumTokens] = {9, 9, kOpen, 9, 9, kClose, kOpen, 9, 9, kClose, kSync, 9};
  const pdiff_span_tags tags = {.async_start = kOpen, .async_end = kClose, .sync = kSync};

  const char* isa;
  check(pdiff_isa_name(&isa));
  printf("libpdiff %s, CPU kernels: %s, CUDA devices: %d\n", pdiff_version(), isa,
         pdiff_cuda_device_count());

  pdiff_span_layout* layout;
  check(pdiff_span_layout_from_tokens(token_ids, kNumTokens, &tags, 1, &layout));
  uint8_t mask[kNumTokens][kNumTokens];
  check(pdiff_span_layout_write_dense_mask(layout, &mask[0][0]));
  for (int q = 0; q < kNumTokens; ++q) {
    for (int k = 0; k < kNumTokens; ++k) putchar(mask[q][k] ? '#' : '.');
    putchar('\n');
  }

  pdiff_attention_plan* plan;
  const pdiff_attention_plan_options options = {
      .num_heads_q = kNumHeads, .num_heads_kv = 1, .head_dim = kHeadDim};
  check(pdiff_attention_plan_create((const pdiff_span_layout* const*)&layout, 1, &options, &plan));

  /* Equal keys: a row's output is the mean of the values it sees, here of their token numbers. */
  static float q[kNumTokens][kNumHeads][kHeadDim], k[kNumTokens][kHeadDim], v[kNumTokens][kHeadDim];
  static float out[kNumTokens][kNumHeads][kHeadDim];
  for (int i = 0; i < kNumTokens; ++i) v[i][0] = (float)i;
  const pdiff_hybrid_attention_args args = {
      .dtype = PDIFF_FLOAT32, .q = q, .k = k, .v = v, .out = out};
  check(pdiff_cpu_hybrid_attention(plan, &args));
  int num_wrong = 0;
  for (int i = 0; i < kNumTokens; ++i) {
    float sum = 0, count = 0;
    for (int j = 0; j < kNumTokens; ++j) sum += (float)(mask[i][j] * j), count += mask[i][j];
    const float error = out[i][1][0] - sum / count;
    num_wrong += !(error < 1e-5f && error > -1e-5f);
  }
  printf("attention: %d of %d rows are the mean of what they see\n", kNumTokens - num_wrong,
         kNumTokens);

  pdiff_attention_plan_free(plan);
  pdiff_span_layout_free(layout);
  return num_wrong == 0 ? 0 : 1;
}
