"""How the rows of a forward attend: over the pages of their requests."""

from __future__ import annotations

from torch import Tensor

from pdiff_runtime import ops
from pdiff_runtime.cache import KVCache
from pdiff_runtime.models.decoder import Decoder


class PagedAttention:
    """Writes the rows' keys and values into their pages, then attends to the pages.

    Args:
        plan: Who sees whom; see :class:`pdiff_runtime.ops.AttentionPlan`.
        cache: Keys and values of all layers.
        model: Its rotary tables.
        positions, slots: ``[rows]`` int64; slot -1 is not written.
    """

    def __init__(
        self, plan: ops.AttentionPlan, cache: KVCache, model: Decoder, positions: Tensor,
        slots: Tensor,
    ) -> None:  # fmt: skip
        self.plan, self.cache, self.model = plan, cache, model
        self.positions, self.slots = positions, slots

    def __call__(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See :data:`pdiff_runtime.models.decoder.Attend`."""
        k_cache, v_cache = self.cache.layer(layer_idx)
        ops.rope_kv_write_(
            q, k, v, self.model.cos, self.model.sin, self.positions, self.slots, k_cache, v_cache
        )
        return ops.hybrid_attention(q, k_cache, v_cache, self.plan)
