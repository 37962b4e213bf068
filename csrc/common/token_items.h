#pragma once

// What the tokens of packed sequences come down to, and what each of it adds to their layouts: the
// rules of layout_from_tokens and key_major, for all items at once. Host and device code.
//
// The items of a sequence, in order: its spans, of its syncs the first one after a span, and its
// end. The text between two items belongs to the later one. A sync is the first token of the text
// behind it, so that text is never empty.
//
// What rows see besides their own segment is a run of gaps: the texts since the last sync, each a
// gap, and before them the gap [0, end of the text that starts with the sync).

#include <cstdint>

#include "common/macros.h"
#include "pdiff/span_layout.h"

namespace pdiff {

enum TokenItemKind : int32_t { kSpanItem = 0, kSyncItem = 1, kEndItem = 2 };

/// Tokens [lo, hi) of its sequence; nothing for a sync or an end, which lie before token lo.
struct TokenItem {
  int32_t lo, hi, kind, sequence;
};

/// How many of each the items before have made, over all sequences.
struct ItemPlace {
  int32_t segments, gaps, key_segments, syncs;
};

struct TokenItems {
  const TokenItem* items;    // [num_items], the last of each sequence its end
  const ItemPlace* places;   // [num_items]
  const int32_t* syncs;      // [num_syncs] items
  const int32_t* first_gap;  // [num_sequences] of the sequence
  int32_t num_syncs;

  PDIFF_HD bool is_first(int32_t i) const {
    return i == 0 || items[i - 1].sequence != items[i].sequence;
  }
  PDIFF_HD int32_t text_lo(int32_t i) const { return is_first(i) ? 0 : items[i - 1].hi; }
  PDIFF_HD bool has_text(int32_t i) const { return text_lo(i) < items[i].lo; }
  PDIFF_HD bool follows_sync(int32_t i) const {
    return !is_first(i) && items[i - 1].kind == kSyncItem;
  }
  /// Is its text a gap of its own?
  PDIFF_HD bool starts_gap(int32_t i) const { return has_text(i) && !follows_sync(i); }
  /// By keys, text on both sides of a sync is one segment.
  PDIFF_HD bool starts_key_text(int32_t i) const {
    return has_text(i) && !(follows_sync(i) && has_text(i - 1));
  }

  PDIFF_HD ItemPlace adds(int32_t i) const {
    const int32_t is_span = items[i].kind == kSpanItem, is_sync = items[i].kind == kSyncItem;
    return {has_text(i) + is_span, starts_gap(i) + is_sync, starts_key_text(i) + is_span, is_sync};
  }

  // From here on, places, syncs and first_gap are known.

  /// The gaps that rows behind the item's text see.
  PDIFF_HD KeyInterval visible_gaps(int32_t i) const {
    const int32_t sequence = items[i].sequence, num_before = places[i].syncs;
    int32_t lo = first_gap[sequence];
    if (num_before > 0 && items[syncs[num_before - 1]].sequence == sequence) {
      const int32_t sync = syncs[num_before - 1];
      lo = places[sync].gaps + starts_gap(sync);
    }
    return {lo, places[i].gaps + starts_gap(i)};
  }
  PDIFF_HD int32_t num_text_intervals(int32_t i) const {
    const KeyInterval gaps = visible_gaps(i);
    return has_text(i) ? gaps.hi - gaps.lo : 0;
  }
  /// A span that touches the text before it makes one interval with it.
  PDIFF_HD int32_t num_span_intervals(int32_t i) const {
    const KeyInterval gaps = visible_gaps(i);
    return items[i].kind == kSpanItem ? gaps.hi - gaps.lo + !has_text(i) : 0;
  }

  /// From which row on everyone sees span i, in a sequence of num_rows.
  PDIFF_HD int32_t opened_at(int32_t i, int32_t num_rows) const {
    const int32_t next = places[i].syncs;
    const bool is_opened = next < num_syncs && items[syncs[next]].sequence == items[i].sequence;
    return is_opened ? items[syncs[next]].lo : num_rows;
  }
  PDIFF_HD int32_t num_ranges(int32_t i, int32_t num_rows) const {
    if (items[i].kind != kSpanItem) return starts_key_text(i);
    const int32_t opened = opened_at(i, num_rows);
    return starts_key_text(i) + (opened == items[i].hi || opened == num_rows ? 1 : 2);
  }
};

}  // namespace pdiff
