"""What a group of layers multiplies by, for a projection that prepares it once."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


def is_product(linear: nn.Linear) -> bool:
    """Whether a layer is the product with its weight, and nothing more."""
    has_hooks = linear._forward_hooks or linear._forward_pre_hooks
    return type(linear) is nn.Linear and type(linear.weight) is nn.Parameter and not has_hooks


class LayerMemory:
    """The weights and biases that layers had, in memory that nothing else can take meanwhile.

    Args:
        linears: Layers that are products.
        is_copied: Whether changes in place count too. Tensors made in inference mode do not tell of
            them, nor does any tensor when its ``data`` are written to.
    """

    def __init__(self, linears: Sequence[nn.Linear], *, is_copied: bool) -> None:
        self._is_copied = is_copied
        self._layers = [
            [(name, *self._known(tensor)) for name, tensor in linear._parameters.items()]
            for linear in linears
        ]

    def is_of(self, linears: Sequence[nn.Linear]) -> bool:
        """Whether these layers are products with what they were then."""
        if len(linears) != len(self._layers):
            return False
        for linear, parameters in zip(linears, self._layers, strict=True):
            if linear._forward_hooks or linear._forward_pre_hooks:
                return False
            held = linear._parameters  # not by attribute, which modules look up in three places
            for name, then, memory, version in parameters:
                tensor = held.get(name)
                if tensor is not then:
                    return False
                if tensor is None or memory is None:
                    continue
                if not tensor.is_set_to(memory):
                    return False
                if version is not None and tensor._version != version:
                    return False
        return True

    def _known(self, tensor: Tensor | None) -> tuple[Tensor | None, Tensor | None, int | None]:
        """A parameter, its memory as it is now, and the number of changes, if they count."""
        if tensor is None:
            return None, None, None
        counts = self._is_copied and not tensor.is_inference()
        return tensor, tensor.detach(), tensor._version if counts else None
