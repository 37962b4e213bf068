"""The paged key and value tensors of a model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class KVCache:
    """Keys (after rotary) and values of every layer.

    Attributes:
        k, v: One ``[num_pages, page_size, num_heads_kv, head_dim]`` tensor per layer.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_pages: int,
        page_size: int,
        num_heads_kv: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (num_pages, page_size, num_heads_kv, head_dim)
        self.page_size = page_size
        self.k, self.v = (
            [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
            for _ in range(2)
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all layers together."""
        return sum(tensor.nbytes for tensor in (*self.k, *self.v))

    def layer(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Key and value pages of one layer."""
        return self.k[layer_idx], self.v[layer_idx]

    def clear(self, pages: Sequence[int]) -> None:
        """Fill pages of all layers with zeros."""
        index = torch.tensor(pages, dtype=torch.int64, device=self.k[0].device)
        for tensor in (*self.k, *self.v):
            tensor.index_fill_(0, index, 0)
