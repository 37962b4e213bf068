"""Matrix products on CPUs over weights that were rearranged once, not in every call.

oneDNN brings bfloat16 weights into the order its tiles want before it multiplies. For a few hundred
rows that is a fifth of a product's time, for few rows half of it. Layers with the same input become
one product.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pdiff_runtime.models.decoder import Project, project_at_once

_MAX_ROWS = 512  # a hint for the order; any number of rows is fine
_NO_VERSION = -1


@dataclasses.dataclass
class _Packed:
    """Layers side by side.

    Attributes:
        sources: Where each layer keeps its weight, the weight, and its version then.
    """

    sources: list[tuple[dict[str, Any], Tensor, int]]
    packed: Tensor
    bias: Tensor | None
    out_features: list[int]

    def is_of(self, linears: Sequence[nn.Linear]) -> bool:
        """Whether it was made of these layers, and of the weights they have."""
        if len(linears) != len(self.sources):
            return False
        for linear, (parameters, weight, version) in zip(linears, self.sources, strict=True):
            if linear._parameters is not parameters or parameters["weight"] is not weight:
                return False
            if version != _NO_VERSION and weight._version != version:
                return False
        return True


class PackedWeights:
    """A :data:`~pdiff_runtime.models.decoder.Project` that keeps a rearranged copy of the weights.

    Weights may change in place or be replaced: the copy is made anew then. Only tensors made in
    inference mode do not tell when they change.

    Args:
        otherwise: Runs the layers it can not help: another device or dtype, a wrapped layer.
    """

    def __init__(self, otherwise: Project = project_at_once) -> None:
        self._otherwise = otherwise
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
        if x.dtype is not torch.bfloat16 or x.device.type != "cpu":
            return self._otherwise(linears, x)
        kept = self._packed.get(linears[0])
        if kept is None or not kept.is_of(linears):
            if not all(map(_can_be_packed, linears)):
                return self._otherwise(linears, x)
            kept = self._packed[linears[0]] = _pack(linears)
        out = torch.ops.mkldnn._linear_pointwise(x, kept.packed, kept.bias, "none", [], "")
        return (out,) if len(linears) == 1 else torch.split_with_sizes(out, kept.out_features, 1)


def _can_be_packed(linear: nn.Linear) -> bool:
    return type(linear) is nn.Linear and linear.weight.dtype is torch.bfloat16


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
    sources = [
        (lin._parameters, w, _NO_VERSION if w.is_inference() else w._version)
        for lin, w in zip(linears, weights, strict=True)
    ]
    return _Packed(sources, packed, bias, [len(weight) for weight in weights])
