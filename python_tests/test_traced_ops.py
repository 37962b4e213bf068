"""Whoever records torch's calls without `torch.compile` records our ops too."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_map

from pdiff_runtime import ops
from pdiff_runtime.testing.problems import AttentionProblem

ROW_POSITION = torch.arange(6, dtype=torch.int32)
CU_ROWS_SPAN = torch.tensor([0, 6], dtype=torch.int32)
NUM_UNMASK = torch.tensor([2], dtype=torch.int32)
PLAN = AttentionProblem("one_span").plan()


def attention(q, k, v):
    return ops.hybrid_attention(q, k, v, PLAN, return_lse=True)


def unmask(token_ids, logits):
    stats = ops.unmask_(token_ids, logits, ROW_POSITION, CU_ROWS_SPAN, NUM_UNMASK)
    return token_ids, *stats


def rope(q, k, cos, sin):
    ops.rope_kv_write_(q, k, None, cos, sin, torch.arange(5), None, None, None)
    return q, k


def cross_entropy(logits, labels, weight, kind):
    return tuple(ops.weighted_cross_entropy(logits, labels, weight, kind, normaliser=3.0))


CASES = {
    "hybrid_attention": (attention, AttentionProblem("one_span").inputs(PLAN)),
    "unmask_": (unmask, (torch.zeros(6, dtype=torch.int64), torch.randn(6, 40))),
    "rope_kv_write_": (
        rope,
        (torch.randn(5, 2, 8), torch.randn(5, 1, 8), torch.randn(9, 4), torch.randn(9, 4)),
    ),
    "weighted_cross_entropy": (
        cross_entropy,
        (torch.randn(6, 40), torch.arange(6), torch.ones(6), torch.zeros(6, dtype=torch.uint8)),
    ),
}


@pytest.fixture(params=CASES)
def case(request):
    """Name, function and inputs, which an op may write to."""
    function, inputs = CASES[request.param]
    return request.param, function, lambda: tuple(x.clone() for x in inputs)


def test_make_fx_records_the_op(case):
    name, function, inputs = case
    graph = make_fx(function)(*inputs())
    assert any(f"pdiff.{name}" in str(node.target) for node in graph.graph.nodes)
    actual, expected = (tree_flatten(f(*inputs()))[0] for f in (graph, function))
    assert all(map(torch.equal, actual, expected))


def test_fake_tensors_give_fake_tensors(case):
    _, function, inputs = case
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = tree_flatten(function(*tree_map(mode.from_tensor, inputs())))[0]
    real = tree_flatten(function(*inputs()))[0]
    assert [(x.shape, x.dtype) for x in fake] == [(x.shape, x.dtype) for x in real]
