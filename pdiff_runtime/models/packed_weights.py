"""Matrix products on CPUs over weights that were rearranged once, not in every call.

oneDNN brings bfloat16 weights into the order its tiles want before it multiplies. For a few hundred
rows that is a fifth of a product's time, for few rows half of it. Layers with the same input become
one product.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pdiff_runtime.models.decoder import Project, project_at_once
from pdiff_runtime.models.layer_memory import LayerMemory, is_product

_MAX_ROWS = 512  # a hint for the order; any number of rows is fine


@dataclasses.dataclass
class _Packed:
    """Layers side by side.

    Attributes:
        memory: What it was made of.
    """

    packed: Tensor
    bias: Tensor | None
    out_features: list[int]
    memory: LayerMemory


class PackedWeights:
    """A :data:`~pdiff_runtime.models.decoder.Project` that keeps a rearranged copy of the weights.

    Weights and biases may change in place or be replaced: the copy is made anew then. Only tensors
    made in inference mode do not tell when they change, nor do others when ``parameter.data`` is
    written to.

    Args:
        otherwise: Runs the layers it can not help: another device or dtype, layers that are more
            than a product.
    """

    def __init__(self, otherwise: Project = project_at_once) -> None:
        self._otherwise = otherwise
        self._product = torch.ops.mkldnn._linear_pointwise  # three look-ups, so not in every call
        # By the first layer of a group; a copy goes with it.
        self._packed: weakref.WeakKeyDictionary[nn.Linear, _Packed] = weakref.WeakKeyDictionary()

    @staticmethod
    def is_available() -> bool:
        """Whether this torch has the products that take such weights."""
        return torch.backends.mkldnn.is_available() and hasattr(
            torch.ops.mkldnn, "_linear_pointwise"
        )

    def __call__(self, linears: Sequence[nn.Linear], x: Tensor) -> Sequence[Tensor]:
        """``[rows, in_features]`` -> ``[rows, out_features]`` of each layer."""
        if x.dtype is not torch.bfloat16 or not x.is_cpu:
            return self._otherwise(linears, x)
        kept = self._packed.get(linears[0])
        if kept is None or not kept.memory.is_of(linears):
            if not all(map(_can_be_packed, linears)):
                return self._otherwise(linears, x)
            kept = self._packed[linears[0]] = _pack(linears)
        out = self._product(x, kept.packed, kept.bias, "none", [], "")
        return (out,) if len(linears) == 1 else torch.split_with_sizes(out, kept.out_features, 1)


def _can_be_packed(linear: nn.Linear) -> bool:
    return is_product(linear) and linear.weight.dtype is torch.bfloat16


def _pack(linears: Sequence[nn.Linear]) -> _Packed:
    weights = [linear.weight for linear in linears]
    side_by_side = torch.cat([weight.detach() for weight in weights])
    bias = None
    if any(linear.bias is not None for linear in linears):
        bias = torch.cat(
            [w.new_zeros(len(w)) if lin.bias is None else lin.bias.detach()
             for lin, w in zip(linears, weights, strict=True)]
        )  # fmt: skip
    packed = torch.ops.mkldnn._reorder_linear_weight(side_by_side, _MAX_ROWS)
    memory = LayerMemory(linears, is_copied=True)
    return _Packed(packed, bias, [len(weight) for weight in weights], memory)
