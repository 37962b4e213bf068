"""How tensors cross to the compiled core, and what it checks of them itself."""

from __future__ import annotations

import pytest
import torch

from pdiff_runtime import _C, SpanLayout, ops


def cross_entropy(**changes) -> None:
    arguments = {
        "logits": torch.zeros(4, 9),
        "labels": torch.zeros(4, dtype=torch.int64),
        "weight": torch.ones(4),
        "kind": torch.zeros(4, dtype=torch.uint8),
        "dlogits": None,
        "loss": torch.empty(()),
        "weighted_sums": torch.empty(2),
        "unweighted_sums": torch.empty(2),
        "counts": torch.empty(2, dtype=torch.int64),
    }
    _C.weighted_cross_entropy(*(arguments | changes).values(), 1.0, 1)


def freed(tensor: torch.Tensor) -> torch.Tensor:
    tensor.untyped_storage().resize_(0)
    return tensor


def test_the_core_takes_tensors():
    cross_entropy()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": torch.zeros(3, dtype=torch.int64)}, r"labels: expected 4 elements, got \[3\]"),
        ({"labels": torch.zeros(4, dtype=torch.int32)}, "labels: expected int64, got int32"),
        ({"weight": torch.ones(4).bfloat16()}, "weight: expected float32, got bfloat16"),
        ({"weight": torch.ones(4, dtype=torch.bool)}, "weight: expected float32, got bool"),
        ({"kind": torch.zeros(4, dtype=torch.int8)}, "kind: expected uint8, got int8"),
        ({"logits": torch.zeros(4, 9, 1)}, r"logits: expected 2 dimensions, got \[4, 9, 1\]"),
        ({"logits": torch.zeros(4, 9).double()}, "logits: expected float32.*, got float64"),
        ({"logits": torch.zeros(4, 9).to_sparse()}, "logits: expected .*, got "),
        ({"labels": torch.zeros(4, dtype=torch.int64).to("meta")}, "labels: expected "),
        ({"logits": freed(torch.zeros(4, 9))}, "logits: expected "),
        ({"weight": freed(torch.ones(4))}, "weight: expected "),
    ],
)
def test_the_core_names_what_does_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        cross_entropy(**changes)


@pytest.mark.parametrize("labels", [3, "3", [1, 2], object()])
def test_the_core_refuses_what_is_no_tensor(labels):
    with pytest.raises(TypeError, match=f"expected a tensor, got {type(labels).__name__}"):
        cross_entropy(labels=labels)


def test_a_transformed_tensor_is_named():
    plan = ops.AttentionPlan.pack(
        [SpanLayout.causal(3, 3)], num_heads_q=1, num_heads_kv=1, head_dim=8
    )
    q = torch.randn(2, 3, 1, 8)
    with pytest.raises(ValueError, match="q, k, v: expected tensors on cpu, with memory of their"):
        torch.func.vmap(lambda q: ops.hybrid_attention(q, q, q, plan))(q)


def test_parameters_and_subclasses_are_tensors():
    class Marked(torch.Tensor):
        pass

    x, weight = torch.randn(2, 8), torch.nn.Parameter(torch.randn(8))
    expected, out = torch.empty(2, 8), torch.empty(2, 8)
    _C.rms_norm(x, weight.detach(), expected, 1e-6, 1)
    _C.rms_norm(x.as_subclass(Marked), weight, out, 1e-6, 1)
    assert torch.equal(out, expected)
