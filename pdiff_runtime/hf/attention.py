"""Hybrid attention as an attention implementation of transformers, by the name of "pdiff".

A forward takes its plan as a keyword, ``model(input_ids, pdiff_plan=...)``; transformers hands
keywords it does not know down to the attention of every layer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pdiff_runtime import ops
from pdiff_runtime.plan import SpanLayout

Plan = ops.AttentionPlan | SpanLayout | Sequence[SpanLayout]
"""Who sees whom in a forward; see :func:`register_hf`."""

_REFUSED = ("sliding_window", "softcap", "s_aux", "position_bias", "cu_seq_lens_q", "cu_seq_lens_k",
            "cache", "output_attentions")  # fmt: skip
"""Keywords that would change what attention computes or returns."""

_NOT_CAUSAL = "not causal"
"""What layers get for a mask that only a plan can stand in for."""

_NUM_KEPT_PLANS = 8


def register_hf() -> None:
    """Make ``attn_implementation="pdiff"`` known to transformers; a second call changes nothing.

    Models that look their attention up by name (Qwen2, Llama, ...) then take, beside what they take
    anyhow, ``pdiff_plan``: who sees whom in this forward. It is

    - a ``SpanLayout`` for each row of the batch, or just one for a batch of one. Its rows are the
      row's tokens, its keys those and all that a KV cache holds before them. A layout may be
      shorter than its row: what is left at the row's end is padding.
    - an ``ops.AttentionPlan`` over all rows of the batch one after another: for documents packed
      into one row, with ``position_ids`` that restart, and under ``torch.compile``.
    - None: plain causal attention.

    Other implementations take the keyword too, and ignore it.

    Plans of layouts are kept, so that a forward packs its layouts once and not in every layer.
    Gradients flow. What the kernel does not compute is refused with a ``ValueError`` that names it:
    padding masks and dense masks, dropout, sliding windows, soft caps, attention sinks, attention
    weights as an output, and caches of a fixed size.

    Raises:
        ImportError: transformers is not installed.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        raise ImportError(
            "register_hf: expected transformers >= 5.16 (pip install pdiff_runtime[hf]), got none"
        ) from error
    AttentionInterface.register("pdiff", _attention)
    AttentionMaskInterface.register("pdiff", _mask)


def _mask(
    *,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor,
    kv_offset: int,
    mask_function: Callable[..., Any],
    attention_mask: Tensor | None,
    **_: Any,
) -> str | None:
    """No mask, but a note to the layers where the model wants another than a causal one.

    Args:
        q_length, kv_length: Rows of this forward, and keys they may see.
        q_offset, kv_offset: Positions of the first row and the first key.
        mask_function: What the model wants.
        attention_mask: ``[batch, kv_length]`` bool, False at padding.
    """
    from transformers.masking_utils import causal_mask_function

    if attention_mask is not None and not bool(attention_mask.all()):
        raise ValueError(
            "attention_mask: expected no padding, got some; pass no mask, pad on the right, and "
            "give pdiff_plan layouts as long as their tokens"
        )
    if kv_offset != 0 or kv_length != int(q_offset) + q_length:
        raise ValueError(
            f"past_key_values: expected a cache that grows with its tokens, got {kv_length} keys "
            f"from {kv_offset} on for {q_length} rows from {int(q_offset)} on"
        )
    return None if mask_function is causal_mask_function else _NOT_CAUSAL


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | str | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    pdiff_plan: Plan | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What a layer calls.

    Args:
        module: The layer.
        query: ``[batch, num_heads_q, q_len, head_dim]``.
        key, value: ``[batch, num_heads_kv, kv_len, head_dim]``; rows are at the end of the keys.
        attention_mask: From :func:`_mask`, or a caller's dense one.
        scaling: ``head_dim ** -0.5`` if None.
        dropout: 0.
        is_causal: Overrides what the layer says of itself.
        pdiff_plan: See :func:`register_hf`.

    Returns:
        ``[batch, q_len, num_heads_q, head_dim]``, and no attention weights.
    """
    for name in _REFUSED:
        given = kwargs.get(name)
        if given is not None and given is not False:
            raise ValueError(f"{name}: attn_implementation 'pdiff' takes none, got {given}")
    if dropout:
        raise ValueError(f"dropout: attn_implementation 'pdiff' has none, got {dropout}")
    if isinstance(attention_mask, Tensor):
        raise ValueError(
            "attention_mask: expected none (pdiff_plan says who sees whom), got a dense one "
            f"{list(attention_mask.shape)}"
        )
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if pdiff_plan is None and not (attention_mask is None and is_causal):
        raise ValueError("pdiff_plan: expected one where a mask is not plain causal, got None")
    batch, _, q_len, _ = query.shape
    plan = _plan(pdiff_plan, query, key)
    dtype = value.dtype  # under autocast the rotary embedding leaves q and k in float32
    q, k, v = (_rows(x).to(dtype) for x in (query, key, value))
    out = ops.hybrid_attention(q, k, v, plan, scaling)
    return out.unflatten(0, (batch, q_len)), None


def _rows(x: Tensor) -> Tensor:
    """``[batch, heads, len, head_dim]`` -> ``[batch * len, heads, head_dim]``."""
    return x.transpose(1, 2).flatten(0, 1).contiguous()


def _plan(given: Plan | None, query: Tensor, key: Tensor) -> ops.AttentionPlan:
    """The plan of a forward, packed when one of its layers asks for the first time."""
    if isinstance(given, ops.AttentionPlan):
        return given
    batch, num_heads_q, q_len, head_dim = query.shape
    num_heads_kv, kv_len = key.shape[1:3]
    layouts = (_causal(q_len, kv_len),) * batch if given is None else _layouts(given)
    if len(layouts) != batch:
        raise ValueError(f"pdiff_plan: expected {batch} layouts, one per row, got {len(layouts)}")
    return _packed(layouts, q_len, kv_len, num_heads_q, num_heads_kv, head_dim, query.device)


def _layouts(given: SpanLayout | Sequence[SpanLayout]) -> tuple[SpanLayout, ...]:
    """One layout, or a list of them."""
    layouts = tuple(given) if isinstance(given, Sequence) else (given,)
    for layout in layouts:
        if not isinstance(layout, SpanLayout):
            raise ValueError(
                "pdiff_plan: expected an AttentionPlan, a SpanLayout or a list of those, "
                f"got {type(layout).__name__}"
            )
    return layouts


@functools.lru_cache(_NUM_KEPT_PLANS)
def _causal(q_len: int, kv_len: int) -> SpanLayout:
    """The same object for the same lengths, so that its plan is found again."""
    return SpanLayout.causal(q_len, kv_len)


@functools.lru_cache(_NUM_KEPT_PLANS)
def _packed(
    layouts: tuple[SpanLayout, ...],
    q_len: int,
    kv_len: int,
    num_heads_q: int,
    num_heads_kv: int,
    head_dim: int,
    device: torch.device,
) -> ops.AttentionPlan:
    """The plan over whole rows; padding at a row's end is a sequence of its own."""
    sequences = []
    for row_idx, layout in enumerate(layouts):
        num_pads = q_len - layout.num_rows
        if num_pads < 0 or layout.num_keys + num_pads != kv_len:
            raise ValueError(
                f"pdiff_plan[{row_idx}]: expected up to {q_len} rows and {kv_len - q_len} keys "
                f"before them, got {layout}"
            )
        sequences.append(layout)
        if num_pads > 0:
            sequences.append(SpanLayout.causal(num_pads, num_pads))
    return ops.AttentionPlan.pack(
        sequences,
        num_heads_q=num_heads_q,
        num_heads_kv=num_heads_kv,
        head_dim=head_dim,
        device=device,
    )
