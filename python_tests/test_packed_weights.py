"""Rearranged weights: the same products, and never stale ones."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from pdiff_runtime.models.packed_weights import PackedWeights

pytestmark = pytest.mark.skipif(
    not PackedWeights.is_available(), reason="this torch has no products over packed weights"
)


def layers(*sizes: int, bias: bool = False, dtype=torch.bfloat16) -> list[nn.Linear]:
    torch.manual_seed(sum(sizes))
    return [nn.Linear(48, n, bias=bias).to(dtype).requires_grad_(False) for n in sizes]


def assert_same(project, linears, x):
    outs = project(linears, x)
    assert [out.shape for out in outs] == [(len(x), lin.out_features) for lin in linears]
    for out, linear in zip(outs, linears, strict=True):
        torch.testing.assert_close(out, linear(x), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("sizes", [(64,), (64, 32, 32), (40, 24)])
@pytest.mark.parametrize("rows", [1, 7, 300])
def test_products_are_those_of_the_layers(sizes, rows, bias):
    x = torch.randn(rows, 48, dtype=torch.bfloat16)
    assert_same(PackedWeights(), layers(*sizes, bias=bias), x)


def test_one_of_the_layers_may_have_a_bias():
    linears = [*layers(16, bias=True), *layers(24)]
    assert_same(PackedWeights(), linears, torch.randn(5, 48, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_run_as_they_are(dtype):
    (linear,) = layers(64, dtype=dtype)
    x = torch.randn(9, 48).to(dtype)
    assert torch.equal(PackedWeights()([linear], x)[0], linear(x))


def test_a_wrapped_layer_runs_as_it_is():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    linear = Doubled(48, 16, bias=False).to(torch.bfloat16).requires_grad_(False)
    x = torch.randn(3, 48, dtype=torch.bfloat16)
    assert torch.equal(PackedWeights()([linear], x)[0], linear(x))


def test_changed_weights_are_seen():
    linears, x = layers(64, 32), torch.randn(5, 48, dtype=torch.bfloat16)
    project = PackedWeights()
    before = project(linears, x)
    linears[1].weight.mul_(3)
    after = project(linears, x)
    assert torch.equal(before[0], after[0])
    torch.testing.assert_close(after[1], 3 * before[1], rtol=2e-2, atol=2e-2)
    linears[0].weight = nn.Parameter(torch.zeros_like(linears[0].weight), requires_grad=False)
    assert_same(project, linears, x)
    assert not project(linears, x)[0].any()


def replace(linear, name, value):
    setattr(linear, name, nn.Parameter(value, requires_grad=False))


CHANGES = {
    "in place": lambda layer, name, value: getattr(layer, name).copy_(value),
    "another tensor": replace,
    "another memory": lambda layer, name, value: setattr(getattr(layer, name), "data", value),
    "none": lambda layer, name, value: setattr(layer, name, None),
}


@pytest.mark.parametrize("sizes", [(64,), (64, 32)])
@pytest.mark.parametrize(
    ("change", "name"),
    [case for case in itertools.product(CHANGES, ("weight", "bias")) if case != ("none", "weight")],
)
def test_every_change_of_a_parameter_is_seen(change, name, sizes):
    linears, x = layers(*sizes, bias=True), torch.randn(5, 48, dtype=torch.bfloat16)
    project = PackedWeights()
    assert_same(project, linears, x)
    CHANGES[change](linears[-1], name, torch.ones_like(getattr(linears[-1], name)))
    assert_same(project, linears, x)
    assert_same(project, linears, x)


def test_a_bias_that_comes_later_is_seen():
    (linear,), x = layers(64), torch.randn(5, 48, dtype=torch.bfloat16)
    project = PackedWeights()
    assert_same(project, [linear], x)
    replace(linear, "bias", torch.ones(64, dtype=torch.bfloat16))
    assert_same(project, [linear], x)


@pytest.mark.parametrize("sizes", [(64,), (64, 32)])
def test_other_memory_at_an_address_that_became_free_is_seen(sizes):
    linears, x = layers(*sizes), torch.randn(5, 48, dtype=torch.bfloat16)
    project = PackedWeights()
    assert_same(project, linears, x)
    for value in (0.0, 1.0):  # the second one may lie where the first weight did
        linears[0].weight.data = torch.full_like(linears[0].weight, value)
    assert_same(project, linears, x)


HOOKS = {
    "register_forward_hook": lambda _layer, _args, out: -out,
    "register_forward_pre_hook": lambda _layer, args: (-args[0],),
}


@pytest.mark.parametrize("register", HOOKS)
def test_hooks_that_come_later_run(register):
    linears, x = layers(64, 32), torch.randn(5, 48, dtype=torch.bfloat16)
    project = PackedWeights()
    assert_same(project, linears, x)
    hook = getattr(linears[1], register)(HOOKS[register])
    assert_same(project, linears, x)
    hook.remove()
    assert_same(project, linears, x)


def test_weights_of_a_tensor_subclass_run_as_they_are():
    class Scaled(torch.Tensor):  # as weights of few bits are: what is stored is no factor
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            out = super().__torch_function__(func, types, args, kwargs)
            return out.as_subclass(torch.Tensor) * 3 if func is nn.functional.linear else out

    (linear,) = layers(64)
    weight = linear.weight.detach().as_subclass(Scaled)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    assert_same(PackedWeights(), [linear], torch.randn(5, 48, dtype=torch.bfloat16))


def test_weights_made_in_inference_mode():
    with torch.inference_mode():
        linears = layers(64)
        assert_same(PackedWeights(), linears, torch.randn(5, 48, dtype=torch.bfloat16))
