#pragma once

#include <cstdint>

namespace pdiff {

/// What the grammar knows of a token. The classes 0 to 9 are the single-digit tokens.
enum TokenClass : uint8_t {
  kDigit0 = 0,
  kDigit9 = 9,
  kText = 10,
  kTopicStart,
  kTopicEnd,
  kSync,
  kEos,
  kBanned,  // async tags, mask, pad and what the caller bans
  kNumTokenClasses
};

/// The sets of classes that can be legal next, by number: one token mask each.
enum PlanMask : uint8_t {
  kMaskNothing,  // after eos, or out of budget
  kMaskEos,
  kMaskEosSync,
  kMaskText,
  kMaskTextSync,
  kMaskTextTopic,
  kMaskTextTopicSync,
  kMaskContent,
  kMaskContentEnd,
  kMaskNumber,
  kMaskNumberEnd,
  kMaskNumber0End,
  kMaskEnd,
  kNumPlanMasks
};

using TokenClassSet = uint16_t;  // bit c: class c is legal

TokenClassSet legal_classes(PlanMask mask);

enum PlanFinish : int32_t { kNotFinished = 0, kFinishedSync = 1, kFinishedEos = 2 };

struct PlanCaps {
  int32_t max_topic_tokens;  // between the tags, number included; >= 2
  int32_t max_topics;        // per round
};

/// The grammar of what a model writes outside spans:
///   reply := (text | topic)* (sync | eos), again after each sync; sync only after a topic
///   topic := topic_start text+ number topic_end; number := 1 to 99 in one or two digits
/// Digits are text but for the number, which is the longest one right before topic_end that leaves
/// a token of text.
/// Budget  the tokens that may still come, the closing sync or eos included. A token is legal only
///         if the rest of its topic and that closing token fit behind it; so at a cap or at the end
///         of the budget only what closes is left.
/// A plain value: copying it forks the plan.
struct PlanState {
  int32_t budget;            // >= closing_len
  int32_t num_topics;        // closed in this round
  int32_t num_topic_tokens;  // since topic_start; -1 outside a topic
  int32_t number;            // what topic_end would announce now; 0 if it is not legal
  int32_t last_digit;        // of the open topic's last token; -1 if that is no digit
  int32_t finish;            // PlanFinish: what the last token was
};

inline constexpr int32_t kMaxPlanCount = 1 << 30;  // bound of the caps and of the budget

PlanState plan_start(const PlanCaps& caps, int32_t budget);  // throws pdiff::Error on a bad bound
PlanMask plan_mask(const PlanState& state, const PlanCaps& caps);

/// False, with the state as it was, where the class is not legal.
bool plan_advance(PlanState& state, const PlanCaps& caps, TokenClass token_class);

}  // namespace pdiff
