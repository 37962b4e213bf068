#include <cstring>
#include <string>
#include <vector>

#include "pdiff/c_api.h"
#include "tests/check.h"

namespace {

TEST(version_is_the_one_of_the_build) {
  CHECK_EQ(std::string(pdiff_version()), std::string(PDIFF_VERSION));
}

TEST(an_error_becomes_a_status_and_a_message) {
  CHECK_EQ(pdiff_select_isa("vax"), PDIFF_INVALID_ARGUMENT);
  CHECK(std::string(pdiff_last_error()).find("got vax") != std::string::npos);
  CHECK_EQ(pdiff_isa_name(nullptr), PDIFF_INVALID_ARGUMENT);
  CHECK(std::string(pdiff_last_error()).find("name: expected a pointer") != std::string::npos);
}

TEST(isa_can_be_read_and_lowered) {
  const char* name = nullptr;
  CHECK_EQ(pdiff_select_isa("generic"), PDIFF_OK);
  CHECK_EQ(pdiff_isa_name(&name), PDIFF_OK);
  CHECK_EQ(std::string(name), std::string("generic"));
  CHECK_EQ(pdiff_select_isa(nullptr), PDIFF_OK);
}

TEST(cuda_is_safe_to_ask_for) {
  CHECK(pdiff_built_with_cuda() == 0 || pdiff_built_with_cuda() == 1);
  CHECK(pdiff_cuda_device_count() >= 0);
}

bool error_mentions(const char* text) { return std::strstr(pdiff_last_error(), text) != nullptr; }

constexpr pdiff_span_tags kTags{1, 2, 3};

pdiff_span_layout* layout_of(const std::vector<int64_t>& token_ids) {
  pdiff_span_layout* layout = nullptr;
  CHECK_EQ(pdiff_span_layout_from_tokens(token_ids.data(), static_cast<int64_t>(token_ids.size()),
                                         &kTags, 1, &layout),
           PDIFF_OK);
  return layout;
}

TEST(layout_comes_and_goes_through_a_handle) {
  pdiff_span_layout* layout = layout_of({9, 1, 9, 2, 1, 9, 2, 3});
  CHECK_EQ(pdiff_span_layout_num_rows(layout), 8);
  CHECK_EQ(pdiff_span_layout_num_keys(layout), 8);
  CHECK(pdiff_span_layout_num_segments(layout) > 0);
  std::vector<uint8_t> mask(64, 7);
  CHECK_EQ(pdiff_span_layout_write_dense_mask(layout, mask.data()), PDIFF_OK);
  CHECK_EQ(int{mask[1 * 8 + 3]}, 1);  // a span sees all of itself
  CHECK_EQ(int{mask[4 * 8 + 2]}, 0);  // and no sibling
  CHECK_EQ(int{mask[7 * 8 + 2]}, 1);  // the sync sees everything
  CHECK_EQ(pdiff_span_layout_write_dense_mask(layout, nullptr), PDIFF_INVALID_ARGUMENT);
  CHECK(error_mentions("mask: expected a pointer"));
  pdiff_span_layout_free(layout);
  pdiff_span_layout_free(nullptr);
}

TEST(an_empty_sequence_needs_no_array) {
  pdiff_span_layout* layout = nullptr;
  CHECK_EQ(pdiff_span_layout_from_tokens(nullptr, 0, &kTags, 1, &layout), PDIFF_OK);
  CHECK_EQ(pdiff_span_layout_num_rows(layout), 0);
  pdiff_span_layout_free(layout);
}

TEST(a_refused_argument_leaves_the_output_alone) {
  auto* const before = reinterpret_cast<pdiff_span_layout*>(&layout_of);
  pdiff_span_layout* layout = before;
  const int64_t nested[] = {1, 1, 2, 2};
  CHECK_EQ(pdiff_span_layout_from_tokens(nested, 4, &kTags, 1, &layout), PDIFF_INVALID_ARGUMENT);
  CHECK(layout == before);
  CHECK_EQ(pdiff_span_layout_from_tokens(nested, -1, &kTags, 1, &layout), PDIFF_INVALID_ARGUMENT);
  CHECK_EQ(pdiff_span_layout_from_tokens(nullptr, 4, &kTags, 1, &layout), PDIFF_INVALID_ARGUMENT);
  CHECK(error_mentions("token_ids: expected a pointer"));
  CHECK_EQ(pdiff_span_layout_from_tokens(nested, 4, nullptr, 1, &layout), PDIFF_INVALID_ARGUMENT);
  CHECK(error_mentions("tags: expected a pointer"));
}

TEST(attention_checks_its_arguments_and_gives_the_mean_of_equal_keys) {
  pdiff_span_layout* layout = layout_of({9, 9, 9});
  const pdiff_span_layout* layouts[] = {layout, nullptr};
  const pdiff_attention_plan_options options{.num_heads_q = 1,
                                             .num_heads_kv = 1,
                                             .head_dim = 16,
                                             .page_size = 0,
                                             .page_table = nullptr,
                                             .max_pages = 0,
                                             .for_gpu = 0,
                                             .whole_keys = 0};
  pdiff_attention_plan* plan = nullptr;
  CHECK_EQ(pdiff_attention_plan_create(layouts, 2, &options, &plan), PDIFF_INVALID_ARGUMENT);
  CHECK(error_mentions("layouts[1]: expected a layout, got NULL"));
  CHECK_EQ(pdiff_attention_plan_create(layouts, 1, &options, &plan), PDIFF_OK);
  pdiff_span_layout_free(layout);  // the plan does not need it any more
  CHECK_EQ(pdiff_attention_plan_total_q(plan), 3);
  CHECK_EQ(pdiff_attention_plan_total_kv(plan), 3);

  std::vector<float> q(3 * 16, 1.0f), k(3 * 16, 0.0f), v(3 * 16), out(3 * 16), lse(3);
  for (size_t i = 0; i < v.size(); ++i) v[i] = static_cast<float>(i / 16);
  pdiff_hybrid_attention_args args{};
  args.q = q.data();
  args.k = k.data();
  args.v = v.data();
  CHECK_EQ(pdiff_cpu_hybrid_attention(plan, &args), PDIFF_INVALID_ARGUMENT);
  CHECK(error_mentions("out: expected a pointer"));
  args.out = out.data();
  args.lse = lse.data();
  CHECK_EQ(pdiff_cpu_hybrid_attention(plan, &args), PDIFF_OK);
  for (int row = 0; row < 3; ++row) {
    CHECK_NEAR(out[row * 16], row / 2.0, 1e-6);
    CHECK_NEAR(lse[row], std::log(row + 1.0), 1e-6);
  }
  args.k_stride = 15;
  CHECK_EQ(pdiff_cpu_hybrid_attention(plan, &args), PDIFF_INVALID_ARGUMENT);
  CHECK(error_mentions("k_stride: expected 0 or at least 16, got 15"));
  args.k_stride = 0;
  args.dtype = 5;
  CHECK_EQ(pdiff_cpu_hybrid_attention(plan, &args), PDIFF_INVALID_ARGUMENT);
  CHECK(error_mentions("dtype: expected"));
  pdiff_attention_plan_free(plan);
}

TEST(unmask_writes_the_most_certain_row_and_refuses_a_bad_one) {
  // Two masked positions of one span; the second row is the surer one.
  std::vector<int64_t> token_ids = {7, -1, -1};
  const std::vector<float> logits = {0.0f, 0.1f, 0.0f, 0.0f, 9.0f, 0.0f, 0.0f, 0.0f};
  const std::vector<int32_t> row_position = {1, 2}, cu_rows_span = {0, 2}, num_unmask = {1};
  std::vector<float> confidence(2);
  std::vector<int64_t> candidate(2);
  std::vector<uint8_t> is_nan(2), is_written(2);
  pdiff_unmask_args args{};
  CHECK_EQ(pdiff_cpu_unmask(nullptr), PDIFF_INVALID_ARGUMENT);
  args.token_ids = token_ids.data();
  args.logits = logits.data();
  args.row_position = row_position.data();
  args.cu_rows_span = cu_rows_span.data();
  args.num_unmask = num_unmask.data();
  args.confidence = confidence.data();
  args.candidate = candidate.data();
  args.is_nan = is_nan.data();
  args.is_written = is_written.data();
  args.total_tokens = 3;
  args.num_rows = 2;
  args.num_spans = 1;
  args.vocab_size = 4;
  args.rule = 9;
  CHECK_EQ(pdiff_cpu_unmask(&args), PDIFF_INVALID_ARGUMENT);
  CHECK(error_mentions("rule: expected"));
  args.rule = PDIFF_RULE_PROBABILITY;
  args.total_tokens = 2;
  CHECK_EQ(pdiff_cpu_unmask(&args), PDIFF_INVALID_ARGUMENT);
  CHECK(error_mentions("row_position[1]: expected 0 to 1, got 2"));
  CHECK_EQ(token_ids[2], -1);
  args.total_tokens = 3;
  int32_t num_masked = 2;
  args.num_masked = &num_masked;
  CHECK_EQ(pdiff_cpu_unmask(&args), PDIFF_OK);
  CHECK_EQ(num_masked, 1);
  CHECK_EQ(token_ids[0], 7);
  CHECK_EQ(token_ids[1], -1);
  CHECK_EQ(token_ids[2], 0);
  CHECK_EQ(int{is_written[1]}, 1);
  CHECK_EQ(candidate[0], 1);
  const int32_t both = 2;
  args.num_unmask = &both;
  args.rule = PDIFF_RULE_ENTROPY_BUDGET;
  args.threshold = -1.0f;
  CHECK_EQ(pdiff_cpu_unmask(&args), PDIFF_INVALID_ARGUMENT);
  CHECK(error_mentions("threshold: expected >= 0, got -1"));
  for (const float threshold : {0.001f, 0.01f}) {  // the surer row has an entropy of 0.004
    args.threshold = threshold;
    CHECK_EQ(pdiff_cpu_unmask(&args), PDIFF_OK);
    CHECK_EQ(int{is_written[0]}, threshold > 0.004f ? 1 : 0);
    CHECK_EQ(int{is_written[1]}, 1);
  }
}

TEST(unknown_dtypes_are_refused) {
  pdiff_unmask_args args{};
  const int32_t zero = 0;
  args.cu_rows_span = &zero;
  args.vocab_size = 4;
  args.logits_dtype = 3;
  CHECK_EQ(pdiff_cpu_unmask(&args), PDIFF_INVALID_ARGUMENT);
  CHECK(error_mentions(
      "logits_dtype: expected PDIFF_FLOAT32, PDIFF_BFLOAT16 or PDIFF_FLOAT16, got 3"));
}

// Equal keys: every row is the mean of the values it sees.
TEST(attention_on_a_gpu_gives_the_mean_of_equal_keys) {
  pdiff_span_layout* layout = layout_of({9, 9, 9});
  const pdiff_span_layout* layouts[] = {layout};
  pdiff_attention_plan_options options{};
  options.num_heads_q = options.num_heads_kv = 1;
  options.head_dim = 64;
  options.for_gpu = 1;
  pdiff_attention_plan* plan = nullptr;
  CHECK_EQ(pdiff_attention_plan_create(layouts, 1, &options, &plan), PDIFF_OK);
  pdiff_span_layout_free(layout);
  constexpr uint16_t kOne = 0x3f80;  // in bfloat16
  alignas(16) static uint16_t q[3 * 64], k[3 * 64], v[3 * 64], out[3 * 64];
  for (int i = 0; i < 64; ++i) v[i] = v[128 + i] = kOne;  // the second row's value is 0
  const int64_t num_bytes = pdiff_cuda_hybrid_attention_workspace_bytes(plan);
  CHECK(num_bytes > 0);
  std::vector<float> lse(3);
  std::vector<uint64_t> workspace(2 * static_cast<size_t>(num_bytes) / 8 + 2);
  void* aligned = workspace.data();
  if (reinterpret_cast<uintptr_t>(aligned) % 16 != 0) aligned = workspace.data() + 1;
  pdiff_hybrid_attention_args args{};
  args.dtype = PDIFF_BFLOAT16;
  args.q = q;
  args.k = k;
  args.v = v;
  args.lse = lse.data();
  const int32_t* words = pdiff_attention_plan_words(plan);
  CHECK(pdiff_attention_plan_num_words(plan) > 0);
#if PDIFF_WITH_CUDA
  CHECK_EQ(pdiff_cuda_hybrid_attention(plan, words, &args, aligned, {}), PDIFF_INVALID_ARGUMENT);
  CHECK(error_mentions("out: expected a pointer"));
#endif
  args.out = out;
#if PDIFF_EMULATE_CUDA
  CHECK_EQ(pdiff_cuda_hybrid_attention(plan, words, &args, aligned, {}), PDIFF_OK);
  CHECK_EQ(out[0], kOne);
  CHECK_EQ(out[64], 0x3f00);   // 1 / 2
  CHECK_EQ(out[128], 0x3f2b);  // 2 / 3
  for (int row = 0; row < 3; ++row) CHECK_NEAR(lse[row], std::log(row + 1.0), 1e-5);
#elif !PDIFF_WITH_CUDA
  CHECK_EQ(pdiff_cuda_hybrid_attention(plan, words, &args, aligned, {}), PDIFF_INVALID_ARGUMENT);
  CHECK(error_mentions("built without CUDA"));
#endif
  pdiff_attention_plan_free(plan);
}

TEST(unmask_on_a_gpu_writes_the_most_certain_row) {
  std::vector<int64_t> token_ids = {7, -1, -1};
  const std::vector<float> logits = {0.0f, 0.1f, 0.0f, 0.0f, 9.0f, 0.0f, 0.0f, 0.0f};
  const std::vector<int32_t> row_position = {1, 2}, cu_rows_span = {0, 2}, num_unmask = {1};
  std::vector<float> confidence(2);
  std::vector<int64_t> candidate(2);
  std::vector<uint8_t> is_nan(2), is_written(2);
  pdiff_unmask_args args{};
  args.token_ids = token_ids.data();
  args.logits = logits.data();
  args.row_position = row_position.data();
  args.cu_rows_span = cu_rows_span.data();
  args.num_unmask = num_unmask.data();
  args.confidence = confidence.data();
  args.candidate = candidate.data();
  args.is_nan = is_nan.data();
  args.is_written = is_written.data();
  args.total_tokens = 3;
  args.num_rows = 2;
  args.num_spans = 1;
  args.vocab_size = 4;
  args.rule = PDIFF_RULE_PROBABILITY;
  const int64_t num_bytes = pdiff_cuda_unmask_workspace_bytes(&args);
  CHECK(num_bytes > 0);
#if PDIFF_EMULATE_CUDA || !PDIFF_WITH_CUDA
  std::vector<uint64_t> workspace(static_cast<size_t>(num_bytes) / 8 + 3);
  void* aligned = workspace.data();
  if (reinterpret_cast<uintptr_t>(aligned) % 16 != 0) aligned = workspace.data() + 1;
  const pdiff_status status = pdiff_cuda_unmask(&args, aligned, num_bytes, {});
#if PDIFF_EMULATE_CUDA
  CHECK_EQ(status, PDIFF_OK);
  CHECK_EQ(token_ids[1], -1);
  CHECK_EQ(token_ids[2], 0);
#else
  CHECK_EQ(status, PDIFF_INVALID_ARGUMENT);
  CHECK(error_mentions("built without CUDA"));
#endif
#endif
}

}  // namespace

int main() { return pdiff::test::run_all(); }
