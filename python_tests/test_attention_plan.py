"""AttentionPlan: what it refuses, and what it holds."""

import gc
import itertools

import pytest
import torch
from on_backends import backend_fixture

from pdiff_runtime import ops
from pdiff_runtime.ops import AttentionPlan, Impl
from pdiff_runtime.plan import SpanLayout
from pdiff_runtime.testing import Backend
from pdiff_runtime.testing.problems import TAGS, document, layout_of

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


backend = backend_fixture(["generic"], [Impl.CUDA, Impl.TRITON])
TAG_IDS = {"async_start": TAGS.async_start, "async_end": TAGS.async_end, "sync": TAGS.sync}
DOCUMENTS = [
    document(45, "30", "17", "64", "3", "sync", 23, "9", 2, "5"),
    document(),
    document(150),
    document("2", "2", 3, "sync", "40", "2", "sync", "sync", 5, "2"),
    [TAGS.async_end, *document(3, "4", "sync"), TAGS.async_start],
]


def packed(documents, device="cpu"):
    token_ids = torch.tensor([*itertools.chain(*documents)], dtype=torch.int64, device=device)
    lengths = torch.tensor([0, *map(len, documents)])
    return token_ids, lengths.cumsum(0).to(device, torch.int32)


@pytest.mark.parametrize("isolate_spans", [True, False], ids=["isolated", "joint"])
@pytest.mark.parametrize("documents", [DOCUMENTS, DOCUMENTS[:1], [], [[]]], ids=len)
def test_from_tokens_attends_as_the_layouts_do(documents, isolate_spans, backend):
    plan = AttentionPlan.from_tokens(
        *packed(documents, backend.device), **TAG_IDS, **HEADS, isolate_spans=isolate_spans,
        impl=backend.impl,
    )  # fmt: skip
    plan.check()
    layouts = [SpanLayout.from_tokens(d, TAGS, isolate_spans=isolate_spans) for d in documents]
    expected = AttentionPlan.pack(
        layouts, **HEADS, device=backend.device, split_keys=False, impl=backend.impl
    )
    total = sum(map(len, documents))
    assert (plan.total_q, plan.total_kv, plan.num_slots) == (total, total, 0)
    assert repr(plan) == repr(expected)
    dtype = torch.float16 if torch.float16 in backend.dtypes else torch.float32
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(total, heads, 64, generator=generator).to(backend.device, dtype)
        for heads in (4, 2, 2)
    )
    assert torch.equal(ops.hybrid_attention(q, k, v, plan), ops.hybrid_attention(q, k, v, expected))


@pytest.mark.parametrize(
    ("token_ids", "cu_seqlens", "message"),
    [
        ([TAGS.async_start, TAGS.async_start], [0, 2], "token_ids: expected .* not nested"),
        ([8, 8, 8], [0, 2], "cu_seqlens: expected ascending from 0"),
        ([8, 8, 8], [0, 2, 1, 3], "cu_seqlens: expected ascending from 0"),
        ([8, 8, 8], [], "cu_seqlens: expected at least one element"),
    ],
)
def test_from_tokens_names_what_is_wrong(token_ids, cu_seqlens, message, backend):
    with pytest.raises(ValueError, match=message):
        AttentionPlan.from_tokens(
            torch.tensor(token_ids, device=backend.device),
            torch.tensor(cu_seqlens, dtype=torch.int32, device=backend.device),
            **TAG_IDS, **HEADS, impl=backend.impl,
        ).check()  # fmt: skip


@pytest.fixture
def cuda():
    backend = Backend(Impl.CUDA)
    if backend.missing:
        pytest.skip(backend.missing)
    return backend


def test_cuda_plan_has_no_layouts_and_room_for_so_many_tags(cuda):
    tokens = packed(DOCUMENTS, cuda.device)
    arguments = {**TAG_IDS, **HEADS, "impl": cuda.impl}
    num_tags = sum(sum(id in TAG_IDS.values() for id in d) for d in DOCUMENTS)
    plan = AttentionPlan.from_tokens(*tokens, **arguments, max_tags=num_tags)
    plan.check()
    with pytest.raises(ValueError, match="expected one with layouts"):
        _ = plan.layouts
    plan = AttentionPlan.from_tokens(*tokens, **arguments, max_tags=num_tags - 1)
    with pytest.raises(ValueError, match="max_tags: expected at least as many"):
        plan.check()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: captures a graph")
def test_a_captured_cuda_graph_plans_its_tokens(cuda):
    token_ids, cu_seqlens = packed(DOCUMENTS, cuda.device)
    q, k, v = (torch.randn(len(token_ids), n, 64, device="cuda").bfloat16() for n in (4, 2, 2))

    def step():
        plan = AttentionPlan.from_tokens(token_ids, cu_seqlens, **TAG_IDS, **HEADS)
        return ops.hybrid_attention(q, k, v, plan)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    other, bounds = packed(DOCUMENTS[::-1], cuda.device)
    token_ids.copy_(other)
    cu_seqlens.copy_(bounds)
    graph.replay()
    assert torch.equal(captured, step())
