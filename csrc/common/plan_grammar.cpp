#include "pdiff/plan_grammar.h"

#include "pdiff/error.h"

namespace pdiff {
namespace {

constexpr TokenClassSet bit(int token_class) {
  return static_cast<TokenClassSet>(1u << token_class);
}

constexpr TokenClassSet kDigits1To9 = 0b11'1111'1110;
constexpr TokenClassSet kDigits = kDigits1To9 | bit(kDigit0);
constexpr TokenClassSet kTextAndDigits = kDigits | bit(kText);

// In the order of PlanMask.
constexpr TokenClassSet kLegal[kNumPlanMasks] = {
    0,
    bit(kEos),
    bit(kEos) | bit(kSync),
    kTextAndDigits | bit(kEos),
    kTextAndDigits | bit(kEos) | bit(kSync),
    kTextAndDigits | bit(kEos) | bit(kTopicStart),
    kTextAndDigits | bit(kEos) | bit(kTopicStart) | bit(kSync),
    kTextAndDigits,
    kTextAndDigits | bit(kTopicEnd),
    kDigits1To9,
    kDigits1To9 | bit(kTopicEnd),
    kDigits | bit(kTopicEnd),
    bit(kTopicEnd),
};

// Tokens behind the next one that close the plan, if that is ...
constexpr int32_t kCloseAfterText = 1;        // sync or eos
constexpr int32_t kCloseAfterTopicStart = 4;  // text, digit, topic_end, sync or eos
constexpr int32_t kCloseAfterContent = 3;     // digit, topic_end, sync or eos
constexpr int32_t kCloseAfterNumber = 2;      // topic_end, sync or eos

PlanMask mask_outside(const PlanState& state, const PlanCaps& caps) {
  const int32_t rest = state.budget - 1;
  const bool has_topic = state.num_topics > 0;
  if (rest < 0) return kMaskNothing;
  if (rest < kCloseAfterText) return has_topic ? kMaskEosSync : kMaskEos;
  if (rest < kCloseAfterTopicStart || state.num_topics >= caps.max_topics) {
    return has_topic ? kMaskTextSync : kMaskText;
  }
  return has_topic ? kMaskTextTopicSync : kMaskTextTopic;
}

PlanMask mask_in_topic(const PlanState& state, const PlanCaps& caps) {
  const int32_t rest = state.budget - 1;
  const int32_t room = caps.max_topic_tokens - state.num_topic_tokens;
  const bool has_number = state.number > 0;
  if (room >= 2 && rest >= kCloseAfterContent) return has_number ? kMaskContentEnd : kMaskContent;
  if (room < 1 || rest < kCloseAfterNumber) return kMaskEnd;
  if (!has_number) return kMaskNumber;
  return state.last_digit > 0 ? kMaskNumber0End : kMaskNumberEnd;
}

// The number that topic_end would announce right behind `digit`.
int32_t number_ending_in(const PlanState& state, int32_t digit) {
  if (state.last_digit > 0 && state.num_topic_tokens >= 2) return 10 * state.last_digit + digit;
  return state.num_topic_tokens >= 1 ? digit : 0;
}

}  // namespace

TokenClassSet legal_classes(PlanMask mask) { return kLegal[mask]; }

PlanState plan_start(const PlanCaps& caps, int32_t budget) {
  PDIFF_CHECK(caps.max_topic_tokens >= 2 && caps.max_topic_tokens <= kMaxPlanCount,
              "max_topic_tokens: expected 2 to ", kMaxPlanCount, ", got ", caps.max_topic_tokens);
  PDIFF_CHECK(caps.max_topics >= 0 && caps.max_topics <= kMaxPlanCount,
              "max_topics: expected 0 to ", kMaxPlanCount, ", got ", caps.max_topics);
  PDIFF_CHECK(budget >= 1 && budget <= kMaxPlanCount, "budget: expected 1 to ", kMaxPlanCount,
              ", got ", budget);
  return {budget, 0, -1, 0, -1, kNotFinished};
}

PlanMask plan_mask(const PlanState& state, const PlanCaps& caps) {
  if (state.finish == kFinishedEos) return kMaskNothing;
  return state.num_topic_tokens < 0 ? mask_outside(state, caps) : mask_in_topic(state, caps);
}

bool plan_advance(PlanState& state, const PlanCaps& caps, TokenClass token_class) {
  if ((legal_classes(plan_mask(state, caps)) & bit(token_class)) == 0) return false;
  --state.budget;
  state.finish = kNotFinished;
  switch (token_class) {
    case kTopicStart:
      state.num_topic_tokens = 0;
      break;
    case kTopicEnd:
      ++state.num_topics;
      state.num_topic_tokens = -1;
      state.number = 0;
      state.last_digit = -1;
      break;
    case kSync:
      state.num_topics = 0;
      state.finish = kFinishedSync;
      break;
    case kEos:
      state.finish = kFinishedEos;
      break;
    default:  // text and digits
      if (state.num_topic_tokens < 0) break;
      state.number = token_class <= kDigit9 ? number_ending_in(state, token_class) : 0;
      state.last_digit = token_class <= kDigit9 ? token_class : -1;
      ++state.num_topic_tokens;
  }
  return true;
}

}  // namespace pdiff
