"""Weights side by side: the same products, of parameters that stay what they are."""

from __future__ import annotations

import copy

import pytest
import safetensors.torch
import torch
from torch import nn

from pdiff_runtime.models.joined_weights import JoinedWeights

DTYPES = [torch.float32, torch.bfloat16]


def layers(*sizes: int, bias: bool = False, dtype=torch.float32) -> list[nn.Linear]:
    torch.manual_seed(sum(sizes))
    return [nn.Linear(48, n, bias=bias).to(dtype) for n in sizes]


def rows_of(linears, num: int = 5) -> torch.Tensor:
    return torch.randn(num, 48, dtype=linears[0].weight.dtype)


def assert_same(project, linears, x):
    expected = [linear(x) for linear in linears]
    for out, each in zip(project(linears, x), expected, strict=True):
        torch.testing.assert_close(out, each, rtol=2e-2, atol=2e-2)


def are_side_by_side(linears) -> bool:
    return len({linear.weight.untyped_storage().data_ptr() for linear in linears}) == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("sizes", [(64,), (64, 32, 32), (40, 24)])
@pytest.mark.parametrize("rows", [0, 1, 300])
def test_products_are_those_of_the_layers(sizes, rows, bias, dtype):
    linears, project = layers(*sizes, bias=bias, dtype=dtype), JoinedWeights()
    before = [linear.weight.clone() for linear in linears]
    for _ in range(2):
        assert_same(project, linears, rows_of(linears, rows))
    assert are_side_by_side(linears)
    for linear, weight in zip(linears, before, strict=True):
        assert torch.equal(linear.weight, weight)


def test_one_product_for_all(monkeypatch):
    linears, project = layers(64, 32, bias=True), JoinedWeights()
    calls = []
    linear = nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda *args: calls.append(args) or linear(*args))
    project(linears, rows_of(linears))
    assert [args[1].shape for args in calls] == [(96, 48)]


def test_changed_weights_are_seen():
    linears, project = layers(64, 32, bias=True), JoinedWeights()
    x = rows_of(linears)
    assert_same(project, linears, x)
    with torch.no_grad():
        linears[1].weight.mul_(3)
        linears[0].bias.add_(1)
    assert_same(project, linears, x)
    linears[0].weight = nn.Parameter(torch.zeros_like(linears[0].weight))
    assert_same(project, linears, x)
    linears[1].bias.data = torch.ones_like(linears[1].bias)
    assert_same(project, linears, x)
    assert are_side_by_side(linears)


def test_a_part_of_what_there_was_is_seen():
    linears, project = layers(64, 32, bias=True), JoinedWeights()
    x = rows_of(linears)
    assert_same(project, linears, x)
    for parameter in (linears[1].weight, linears[1].bias):  # at the same address
        parameter.data = parameter.data[:24]
    assert_same(project, linears, x)
    assert_same(project, linears, x)
    square = layers(48, 48)
    assert_same(project, square, x)
    square[0].weight.data = square[0].weight.data.T
    assert_same(project, square, x)


def test_two_engines_share_what_lies_side_by_side():
    linears = layers(64, 32, bias=True)
    first, second = JoinedWeights(), JoinedWeights()
    addresses = []
    for project in (first, second, first):
        assert_same(project, linears, rows_of(linears))
        addresses.append([linear.weight.data_ptr() for linear in linears])
    assert addresses[0] == addresses[1] == addresses[2]


def test_layers_can_be_trained_copied_and_saved(tmp_path):
    linears, project = layers(64, 32), JoinedWeights()
    x = rows_of(linears)
    with torch.inference_mode():
        project(linears, x)
    sum(linear(x).square().sum() for linear in linears).backward()
    torch.optim.SGD([linear.weight for linear in linears], lr=0.1).step()
    assert_same(project, linears, x)
    assert_same(project, copy.deepcopy(linears), x)
    model = nn.ModuleList(linears)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
    saved = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(saved[name], weight) for name, weight in model.state_dict().items())


def test_layers_that_share_a_weight_run_one_by_one():
    one, other = layers(64, 32)
    twin = copy.deepcopy(one)
    twin.weight = one.weight
    assert_same(JoinedWeights(), [one, twin, other], rows_of([one]))
    assert one.weight.untyped_storage().nbytes() == one.weight.nbytes


@pytest.mark.parametrize("joins_in_inference", [False, True])
@pytest.mark.parametrize("made_in_inference", [False, True])
def test_layers_stay_of_the_mode_they_were_made_in(made_in_inference, joins_in_inference):
    with torch.inference_mode(made_in_inference):
        linears = layers(64, 32, bias=True)
    for linear in linears:
        linear.requires_grad_(False)
    with torch.inference_mode(joins_in_inference):
        assert_same(JoinedWeights(), linears, rows_of(linears))
    assert are_side_by_side(linears)
    for parameter in (p for linear in linears for p in linear.parameters()):
        assert parameter.is_inference() == made_in_inference
        assert made_in_inference or parameter._version >= 0


def test_layers_of_other_kinds_run_one_by_one():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    class Scaled(torch.Tensor):  # as weights of few bits are: what is stored is no summand
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            out = super().__torch_function__(func, types, args, kwargs)
            return out.as_subclass(torch.Tensor) * 3 if func is nn.functional.linear else out

    scaled = layers(64, 32)
    for linear in scaled:
        linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Scaled))
    plain, other = layers(64, 32)
    doubled = Doubled(48, 32, bias=False)
    hooked = copy.deepcopy(other)
    hooked.register_forward_hook(lambda _module, _args, out: -out)
    hooked_before = copy.deepcopy(other)
    hooked_before.register_forward_pre_hook(lambda _module, args: (-args[0],))
    groups = (
        [plain, doubled], [doubled, copy.deepcopy(doubled)], [plain, hooked],
        [plain, hooked_before], [plain, *layers(16, bias=True)], scaled,
    )  # fmt: skip
    for linears in groups:
        assert_same(JoinedWeights(), linears, rows_of(linears))
        assert not are_side_by_side(linears)


def test_hooks_that_come_later_run():
    linears, project = layers(64, 32), JoinedWeights()
    x = rows_of(linears)
    assert_same(project, linears, x)
    hook = linears[1].register_forward_hook(lambda _module, _args, out: -out)
    assert_same(project, linears, x)
    hook.remove()
    assert_same(project, linears, x)


def test_parts_of_one_storage_in_another_order_are_moved():
    whole = torch.randn(96, 48)
    linears = layers(64, 32)
    linears[1].weight.data, linears[0].weight.data = whole.split([32, 64])
    assert_same(JoinedWeights(), linears, rows_of(linears))


def test_neighbours_that_are_no_rows_of_one_tensor_are_moved():
    whole = torch.randn(96, 48)
    for is_turned in ((True, False), (False, True)):
        linears = layers(48, 48)
        for linear, part, turned in zip(linears, whole.split(48), is_turned, strict=True):
            linear.weight.data = part.T if turned else part
        assert_same(JoinedWeights(), linears, rows_of(linears))
    memory = bytearray(whole.nbytes)
    linears = layers(48, 48)
    for linear, offset in zip(linears, (0, whole.nbytes // 2), strict=True):
        part = torch.frombuffer(memory, dtype=torch.float32, count=48 * 48, offset=offset)
        linear.weight.data = part.view(48, 48).copy_(linear.weight.detach())
    assert_same(JoinedWeights(), linears, rows_of(linears))
