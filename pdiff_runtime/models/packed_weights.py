"""Matrix products on CPUs over weights that were rearranged once, not in every call.

oneDNN brings bfloat16 weights into the order its tiles want before it multiplies. For a few hundred
rows that is a fifth of a product's time, for few rows half of it.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

_MAX_ROWS = 512  # a hint for the order; any number of rows is fine


@dataclasses.dataclass
class _Packed:
    weight: Tensor
    version: int
    packed: Tensor


class PackedWeights:
    """A :data:`~pdiff_runtime.models.decoder.Project` that keeps a rearranged copy of each weight.

    Layers it can not help (another device or dtype, a wrapped layer) run as they are. Weights may
    change in place or be replaced: the copy is made anew then. Only tensors made in inference mode
    do not tell when they change.

    Attributes:
        nbytes: Of the copies.
    """

    def __init__(self) -> None:
        self._packed: dict[nn.Linear, _Packed] = {}

    @staticmethod
    def is_available() -> bool:
        """Whether this torch has the products that take such weights."""
        return torch.backends.mkldnn.is_available() and hasattr(
            torch.ops.mkldnn, "_linear_pointwise"
        )

    def __call__(self, linear: nn.Linear, x: Tensor) -> Tensor:
        """``[rows, in_features]`` -> ``[rows, out_features]``."""
        if type(linear) is not nn.Linear or x.dtype is not torch.bfloat16 or x.device.type != "cpu":
            return linear(x)
        weight = linear.weight
        kept, version = self._packed.get(linear), _version(weight)
        if kept is None or kept.weight is not weight or kept.version != version:
            if weight.dtype is not torch.bfloat16:
                return linear(x)
            packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _MAX_ROWS)
            kept = self._packed[linear] = _Packed(weight, version, packed)
        return torch.ops.mkldnn._linear_pointwise(x, kept.packed, linear.bias, "none", [], "")

    @property
    def nbytes(self) -> int:
        return sum(kept.weight.nbytes for kept in self._packed.values())


def _version(weight: Tensor) -> int:
    return 0 if weight.is_inference() else weight._version
