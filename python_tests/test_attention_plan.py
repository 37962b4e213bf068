"""AttentionPlan: what it refuses, and what it holds."""

import gc

import pytest
import torch

from pdiff_runtime.ops import AttentionPlan
from pdiff_runtime.plan import SpanLayout
from pdiff_runtime.testing.problems import layout_of

HEADS = {"num_heads_q": 4, "num_heads_kv": 2, "head_dim": 64}


def table(*rows):
    return torch.tensor(rows, dtype=torch.int32)


def test_counts_rows_and_keys():
    plan = AttentionPlan.pack([SpanLayout.causal(3, 10), layout_of(4, "6")], **HEADS)
    assert (plan.total_q, plan.total_kv) == (13, 20)
    assert plan.words.dtype == torch.int32
    assert repr(plan) == "AttentionPlan(2 sequences, 13 rows, 20 keys, heads 4/2 x 64)"


def test_an_empty_batch_is_a_plan():
    plan = AttentionPlan.pack([], **HEADS)
    assert (plan.total_q, plan.total_kv) == (0, 0)


def test_words_outlive_the_plan():
    words = AttentionPlan.pack([layout_of(4, "6")], **HEADS).words
    before = words.clone()
    gc.collect()
    assert torch.equal(words, before)


def test_size_is_linear_in_segments():
    rounds = [*["60"] * 4, "sync", 20]
    small, large = (AttentionPlan.pack([layout_of(100, *rounds * n)], **HEADS) for n in (10, 40))
    assert large.words.nbytes < 4.2 * small.words.nbytes < 100_000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads_q": 5}, r"num_heads_q: expected a multiple of num_heads_kv \(2\), got 5"),
        ({"num_heads_kv": 0}, "num_heads_kv: expected > 0, got 0"),
        ({"head_dim": 257}, "head_dim: expected 1 to 256, got 257"),
        ({"device": "meta"}, "impl: cuda is not available on meta"),
        ({"impl": "cuda", "device": "meta"}, "impl: cuda is not available on meta"),
        ({"page_size": 16}, "page_table, page_size: expected both or neither"),
        ({"page_table": table([0])}, "page_table, page_size: expected both or neither"),
        ({"page_table": table([0]), "page_size": 0}, "page_size: expected > 0, got 0"),
        (
            {"page_table": table([0]).long(), "page_size": 16},
            r"page_table: expected int32 \[1, max_pages\], got int64 \[1, 1\]",
        ),
        (
            {"page_table": table([0], [1]), "page_size": 16},
            r"page_table: expected int32 \[1, max_pages\], got int32 \[2, 1\]",
        ),
        (
            {"page_table": table([0]), "page_size": 16},
            "page_table: expected at least 2 columns for the 20 keys of sequence 0, got 1",
        ),
        (
            {"page_table": table([0, -1]), "page_size": 16},
            r"page_table: expected a page at \[0, 1\], got -1",
        ),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        AttentionPlan.pack([SpanLayout.causal(20, 20)], **{**HEADS, **changes})
