"""Layers with the same input as one product, of weights that lie side by side in memory.

A product with few rows or few columns leaves most of a GPU idle; one over the queries, keys and
values together leaves less. The layers keep their parameters, as parts of the joint memory, so
nothing is there twice.
"""

from __future__ import annotations

import dataclasses
import itertools
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pdiff_runtime.models.decoder import project_at_once
from pdiff_runtime.models.layer_memory import LayerMemory, is_product


@dataclasses.dataclass
class _Joint:
    """What several layers' parameters are parts of.

    Attributes:
        memory: Theirs, by which it is seen that they still are.
    """

    weight: Tensor
    bias: Tensor | None
    out_features: list[int]
    memory: LayerMemory


class JoinedWeights:
    """A :data:`~pdiff_runtime.models.decoder.Project` that moves weights next to one another.

    It does so when layers first come together, and again where one got another tensor. Layers that
    are more than a product, or differ in kind, run one by one.
    """

    def __init__(self) -> None:
        # By the first layer of a group; what is kept goes with it.
        self._joined: weakref.WeakKeyDictionary[nn.Linear, _Joint] = weakref.WeakKeyDictionary()

    def __call__(self, linears: Sequence[nn.Linear], x: Tensor) -> Sequence[Tensor]:
        """``[rows, in_features]`` -> ``[rows, out_features]`` of each layer."""
        if len(linears) == 1:
            return project_at_once(linears, x)
        joint = self._joined.get(linears[0])
        if joint is None or not joint.memory.is_of(linears):
            if not _can_be_joined(linears):
                return project_at_once(linears, x)
            joint = self._joined[linears[0]] = _join(linears)
        out = nn.functional.linear(x, joint.weight, joint.bias)
        return torch.split_with_sizes(out, joint.out_features, 1)


def _can_be_joined(linears: Sequence[nn.Linear]) -> bool:
    if not all(map(is_product, linears)):
        return False
    kinds = {(lin.weight.dtype, lin.weight.device, lin.bias is None) for lin in linears}
    has_own_weights = len({id(lin.weight) for lin in linears}) == len(linears)
    return has_own_weights and len(kinds) == 1


def _join(linears: Sequence[nn.Linear]) -> _Joint:
    weight = _side_by_side([linear.weight for linear in linears])
    biases = [linear.bias for linear in linears if linear.bias is not None]
    bias = _side_by_side(biases) if biases else None
    memory = LayerMemory(linears, is_copied=False)
    return _Joint(weight, bias, [len(linear.weight) for linear in linears], memory)


def _side_by_side(parameters: Sequence[Tensor]) -> Tensor:
    """One tensor of all of them, of which each becomes a part unless it is one."""
    first = parameters[0].detach()
    if all(_is_behind(*pair) for pair in itertools.pairwise(parameters)):
        return first.as_strided((sum(map(len, parameters)), *first.shape[1:]), first.stride())
    with torch.inference_mode(first.is_inference()):  # else they may be trained on
        joint = torch.cat([parameter.detach() for parameter in parameters])
        parts = joint.split([len(parameter) for parameter in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.data = part
    return joint


def _is_behind(before: Tensor, tensor: Tensor) -> bool:
    return (
        tensor.data_ptr() == before.data_ptr() + before.nbytes
        and tensor.untyped_storage().data_ptr() == before.untyped_storage().data_ptr()
        and before.is_contiguous()
        and tensor.is_contiguous()
    )
