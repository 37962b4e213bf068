"""SpanLayout against a mask written straight from the rule, and against its own key-major twin."""

import copy
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pdiff_runtime.ops import AttentionPlan
from pdiff_runtime.plan import ControlTokens, SpanLayout

TAGS = ControlTokens(
    topic_start=0, topic_end=1, async_start=2, async_end=3, sync=4, mask=5, pad=6, eos=7,
    digits=tuple(range(10, 20)),
)  # fmt: skip
TEXT, OPEN, CLOSE, SYNC = 8, TAGS.async_start, TAGS.async_end, TAGS.sync


def spans_of(token_ids, isolate_spans):
    """``[start, end)`` of well-formed spans; None if they nest."""
    spans, start = [], None
    for i, token_id in enumerate(token_ids):
        if token_id == OPEN:
            if start is not None:
                return None
            start = i
        elif token_id == CLOSE and start is not None:
            if not isolate_spans and spans and spans[-1][1] == start:
                spans[-1] = (spans[-1][0], i + 1)
            else:
                spans.append((start, i + 1))
            start = None
    return spans


def mask_from_rule(token_ids, isolate_spans):
    """One key at a time, word by word as the rule says."""
    num_tokens = len(token_ids)
    spans = spans_of(token_ids, isolate_spans)
    span_of = {k: span for span in spans for k in range(*span)}
    mask = np.zeros((num_tokens, num_tokens), dtype=bool)
    for k in range(num_tokens):
        if k not in span_of:
            mask[k:, k] = True
            continue
        start, end = span_of[k]
        mask[start:end, k] = True
        for q in range(end, num_tokens):
            if token_ids[q] == SYNC and q not in span_of:
                mask[q:, k] = True
                break
    return mask


def mask_from_key_major(layout):
    twin = layout.key_major
    mask = np.zeros((layout.num_rows, layout.num_keys), dtype=bool)
    for s, (k_lo, k_hi) in enumerate(twin.segments):
        row_end = 0
        for q_lo, q_hi, kind in twin.ranges[twin.range_ptr[s] : twin.range_ptr[s + 1]]:
            assert row_end <= q_lo < q_hi  # ascending, not empty, no overlap
            row_end = q_hi
            for k in range(k_lo, k_hi):
                mask[q_lo if kind == 1 else q_lo + k - k_lo : q_hi, k] = True
    return mask


def assert_is_normal_form(layout):
    rows = 0
    for s, (q_lo, q_hi, kind) in enumerate(layout.segments):
        assert q_lo == rows < q_hi
        rows = q_hi
        own = layout.intervals[layout.interval_ptr[s] : layout.interval_ptr[s + 1]]
        assert (own[:, 0] < own[:, 1]).all()
        assert (own[1:, 0] > own[:-1, 1]).all()  # touching intervals are one
        assert kind == 1 or own[-1, 1] - own[-1, 0] >= q_hi - q_lo
    assert rows == layout.num_rows
    for array in (layout.segments, layout.interval_ptr, layout.intervals):
        assert array.dtype == np.int32
        assert not array.flags.writeable


def assert_layout_is(layout, mask):
    assert np.array_equal(layout.dense_mask().numpy(), mask)
    assert np.array_equal(mask_from_key_major(layout), mask)
    assert layout.num_visible_pairs == mask.sum()
    assert_is_normal_form(layout)


SEQUENCES = {
    "empty": [],
    "one_token": [TEXT],
    "no_spans": [TEXT] * 5,
    "only_a_span": [OPEN, TEXT, CLOSE],
    "empty_span": [TEXT, OPEN, CLOSE, TEXT],
    "two_spans_two_rounds": [TEXT, OPEN, TEXT, CLOSE, OPEN, CLOSE, SYNC, TEXT, OPEN, CLOSE, SYNC],
    "text_between_unsynced_spans": [OPEN, CLOSE, TEXT, OPEN, TEXT, CLOSE, TEXT, TEXT, SYNC, TEXT],
    "sync_first": [SYNC, OPEN, TEXT, CLOSE, TEXT],
    "two_syncs": [TEXT, OPEN, CLOSE, SYNC, SYNC, TEXT],
    "sync_without_spans": [TEXT, SYNC, TEXT],
    "sync_inside_a_span": [TEXT, OPEN, SYNC, CLOSE, TEXT, SYNC, TEXT],
    "never_closed": [TEXT, OPEN, CLOSE, OPEN, TEXT, SYNC, TEXT],
    "never_opened": [TEXT, CLOSE, TEXT, OPEN, CLOSE, CLOSE, SYNC],
}


@pytest.mark.parametrize("isolate_spans", [True, False], ids=["isolated", "joint"])
@pytest.mark.parametrize("token_ids", SEQUENCES.values(), ids=SEQUENCES.keys())
def test_named_sequences_follow_the_rule(token_ids, isolate_spans):
    layout = SpanLayout.from_tokens(token_ids, TAGS, isolate_spans=isolate_spans)
    assert_layout_is(layout, mask_from_rule(token_ids, isolate_spans))


def random_sequence(rng):
    """Text, spans and syncs in any order; one in four with stray tags too."""
    token_ids = []
    for _ in range(rng.integers(0, 12)):
        kind = rng.choice(["text", "span", "span", "sync"])
        if kind == "text":
            token_ids += [TEXT] * rng.integers(1, 6)
        elif kind == "span":
            token_ids += [OPEN, *rng.choice([TEXT, SYNC], rng.integers(0, 5), p=[0.9, 0.1]), CLOSE]
        else:
            token_ids.append(SYNC)
    if rng.random() < 0.25:
        for _ in range(rng.integers(1, 3)):
            token_ids.insert(rng.integers(0, len(token_ids) + 1), rng.choice([OPEN, CLOSE]))
    return [int(token_id) for token_id in token_ids]


@pytest.mark.parametrize("isolate_spans", [True, False], ids=["isolated", "joint"])
def test_random_sequences_follow_the_rule(isolate_spans):
    rng = np.random.default_rng(0)
    num_checked = 0
    for _ in range(600):
        token_ids = random_sequence(rng)
        if spans_of(token_ids, isolate_spans) is None:
            with pytest.raises(ValueError, match="not nested"):
                SpanLayout.from_tokens(token_ids, TAGS, isolate_spans=isolate_spans)
            continue
        layout = SpanLayout.from_tokens(token_ids, TAGS, isolate_spans=isolate_spans)
        assert_layout_is(layout, mask_from_rule(token_ids, isolate_spans))
        twin = layout.key_major
        assert (np.diff(twin.range_ptr) <= 2).all()
        num_checked += 1
    assert num_checked > 500


def as_rows(layout):
    """What ``from_segments`` takes, read back from a layout."""
    return [
        (
            q_hi - q_lo,
            "full" if kind else "causal",
            layout.intervals[layout.interval_ptr[s] : layout.interval_ptr[s + 1]].tolist(),
        )
        for s, (q_lo, q_hi, kind) in enumerate(layout.segments.tolist())
    ]


def random_layouts(seed, num_sequences):
    """Of random sequences, without those whose spans nest."""
    rng = np.random.default_rng(seed)
    sequences = [random_sequence(rng) for _ in range(num_sequences)]
    return [
        SpanLayout.from_tokens(ids, TAGS) for ids in sequences if spans_of(ids, True) is not None
    ]


def test_copies_are_the_same_layout():
    for layout in random_layouts(seed=2, num_sequences=50):
        same = copy.deepcopy(layout)
        for name in ("segments", "interval_ptr", "intervals"):
            assert np.array_equal(getattr(layout, name), getattr(same, name))
        assert (layout.num_rows, layout.num_keys) == (same.num_rows, same.num_keys)
        assert np.array_equal(layout.key_major.ranges, same.key_major.ranges)


LAYOUTS = [SpanLayout.from_spans(n, [3, n]) for n in range(1, 5)]


def with_plan(layout):
    return layout, AttentionPlan.pack([layout], num_heads_q=2, num_heads_kv=1, head_dim=64)


def test_workers_of_a_data_loader_hand_layouts_and_plans_over():
    loader = torch.utils.data.DataLoader(
        LAYOUTS, batch_size=None, num_workers=1, collate_fn=with_plan, timeout=60
    )
    for expected, (layout, plan) in zip(LAYOUTS, loader, strict=True):
        assert np.array_equal(layout.segments, expected.segments)
        assert torch.equal(plan.words, with_plan(expected)[1].words)
        assert np.array_equal(plan.layouts[0].handle.segments, expected.segments)


def test_both_ways_to_the_key_major_twin_agree():
    # From tokens the twin takes one pass; from segments it is put together interval by interval.
    for one in random_layouts(seed=1, num_sequences=200):
        two = SpanLayout.from_segments(one.num_keys, as_rows(one))
        assert np.array_equal(one.segments, two.segments)
        assert np.array_equal(one.intervals, two.intervals)
        assert mask_from_key_major(one).tolist() == mask_from_key_major(two).tolist()
        assert len(two.key_major.ranges) <= len(one.key_major.ranges)


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.int64, np.uint8], ids=str)
def test_from_tokens_takes_lists_arrays_and_tensors(dtype):
    token_ids = SEQUENCES["two_spans_two_rounds"]
    expected = SpanLayout.from_tokens(token_ids, TAGS).dense_mask()
    array = np.array(token_ids, dtype=dtype)
    strided = np.repeat(array, 2)[::2]
    for given_ids in (tuple(token_ids), array, strided, torch.from_numpy(array)):
        assert torch.equal(SpanLayout.from_tokens(given_ids, TAGS).dense_mask(), expected)


@pytest.mark.parametrize(
    ("token_ids", "message"),
    [
        (np.zeros((2, 3), dtype=np.int64), r"expected integers \[n\], got int64 \[2, 3\]"),
        (np.zeros(3), r"expected integers \[n\], got float64"),
        ([1.0], r"expected integers \[n\], got float64"),
        (torch.zeros(3, dtype=torch.bool), r"expected integers \[n\], got bool"),
        (torch.zeros(3, dtype=torch.int64, device="meta"), "expected a CPU tensor, got one on"),
        ([OPEN, TEXT, OPEN, CLOSE], "opened at 2 inside the one opened at 0"),
    ],
)  # fmt: skip
def test_from_tokens_refuses(token_ids, message):
    with pytest.raises(ValueError, match=message):
        SpanLayout.from_tokens(token_ids, TAGS)


def mask_from_segments(num_keys, segments):
    rows = []
    for num_rows, kind, intervals in segments:
        for i in range(num_rows):
            row = np.zeros(num_keys, dtype=bool)
            for j, (lo, hi) in enumerate(intervals):
                is_last = j + 1 == len(intervals)
                row[lo : hi - (num_rows - 1 - i) if kind == "causal" and is_last else hi] = True
            rows.append(row)
    return np.array(rows, dtype=bool).reshape(len(rows), num_keys)


@st.composite
def segment_lists(draw):
    num_keys = draw(st.integers(0, 24))
    segments = []
    for _ in range(draw(st.integers(0, 6))):
        cuts = draw(st.lists(st.integers(0, num_keys), max_size=6).map(sorted))
        intervals = list(zip(cuts[::2], cuts[1::2], strict=False))
        last_len = intervals[-1][1] - intervals[-1][0] if intervals else 0
        kind = draw(st.sampled_from(["causal", "full"]))
        num_rows = draw(st.integers(0, last_len if kind == "causal" else 5))
        segments.append((num_rows, kind, intervals))
    return num_keys, segments


@given(segment_lists())
def test_from_segments_says_what_it_was_told(case):
    num_keys, segments = case
    layout = SpanLayout.from_segments(num_keys, segments)
    assert_layout_is(layout, mask_from_segments(num_keys, segments))


@pytest.mark.parametrize(
    ("num_keys", "segments", "message"),
    [
        (-1, [], "num_keys: expected 0 to"),
        (8, [(1, "sparse", [])], r"segments\[0\]: expected kind 'causal' or 'full', got 'sparse'"),
        (8, [(1, "full", []), (-1, "full", [])], r"segments\[1\]: expected 0 to \d+ rows, got -1"),
        (8, [(1, "full", [(0, 9)])], r"segments\[0\]: expected ascending.* 0 to 8, got \[0, 9\)"),
        (8, [(1, "full", [(-1, 2)])], r"got \[-1, 2\)"),
        (8, [(1, "full", [(5, 2)])], r"got \[5, 2\)"),
        (8, [(1, "full", [(0, 4), (3, 5)])], r"within 4 to 8, got \[3, 5\)"),
        (8, [(3, "causal", [(0, 4), (6, 8)])], "as long as the 3 causal rows, got 2 keys"),
        (8, [(1, "causal", [])], "as long as the 1 causal rows, got 0 keys"),
        (2**31, [], r"num_keys: expected 0 to 2147483647, got 2147483648"),
        (8, [(2**31 - 1, "full", []), (1, "full", [])], r"segments\[1\]: expected 0 to 0 rows"),
    ],
)
def test_from_segments_refuses(num_keys, segments, message):
    with pytest.raises(ValueError, match=message):
        SpanLayout.from_segments(num_keys, segments)


@pytest.mark.parametrize("isolate_spans", [True, False], ids=["isolated", "joint"])
@pytest.mark.parametrize("span_lens", [[], [3], [2, 5, 4], [2, 0, 3]], ids=str)
@pytest.mark.parametrize("context_len", [0, 7])
def test_from_spans_is_the_end_of_the_whole_sequence(context_len, span_lens, isolate_spans):
    spans = [[OPEN] + [TEXT] * (n - 2) + [CLOSE] for n in span_lens if n]
    whole = mask_from_rule([TEXT] * context_len + list(itertools.chain(*spans)), isolate_spans)
    layout = SpanLayout.from_spans(context_len, span_lens, isolate_spans=isolate_spans)
    assert_layout_is(layout, whole[context_len:])


@pytest.mark.parametrize(("num_rows", "num_keys"), [(0, 0), (0, 5), (1, 1), (4, 4), (3, 9)])
def test_causal_is_the_end_of_a_causal_sequence(num_rows, num_keys):
    layout = SpanLayout.causal(num_rows, num_keys)
    assert_layout_is(layout, np.tri(num_keys, dtype=bool)[num_keys - num_rows :])


def test_size_follows_segments_not_tokens():
    span = [OPEN] + [TEXT] * 60 + [CLOSE]
    token_ids = ([TEXT] * 20 + span * 2 + [SYNC]) * 256
    layout = SpanLayout.from_tokens(token_ids, TAGS)
    assert layout.num_segments == 3 * 256 + 1
    assert layout.nbytes <= 32 * layout.num_segments
    by_rows = layout.nbytes
    assert len(layout.key_major.segments) <= layout.num_segments
    assert by_rows < layout.nbytes <= 64 * layout.num_segments


def test_arrays_outlive_the_layout():
    intervals = SpanLayout.from_tokens(SEQUENCES["no_spans"], TAGS).intervals
    ranges = SpanLayout.from_tokens(SEQUENCES["no_spans"], TAGS).key_major.ranges
    assert intervals.tolist() == [[0, 5]]
    assert ranges.tolist() == [[0, 5, 0]]
