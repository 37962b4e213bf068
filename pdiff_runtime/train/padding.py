"""Pads at the end of spans, from which a model learns to stop before a span's length is used up."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pdiff_runtime.plan import ControlTokens


def pad_spans(
    token_ids: Sequence[int], tags: ControlTokens, num_pads: int | Callable[[], int]
) -> list[int]:
    """Put pad tokens before the ``</async>`` of every span.

    The published training data has 0 to 10 in each, drawn once:
    ``pad_spans(token_ids, tags, lambda: random.randint(0, 10))``. Tags need not be balanced: a span
    that is never closed is padded at the end, one inside another is content, and a stray
    ``</async>`` gets no pads.

    Args:
        token_ids: ``[n]`` integers.
        tags: The control tokens.
        num_pads: Pads per span, or what to ask for them, once per span in order.

    Returns:
        The padded token ids, a new list.

    Raises:
        ValueError: A negative number of pads.
    """

    def pads() -> list[int]:
        count = num_pads() if callable(num_pads) else num_pads
        if count < 0:
            raise ValueError(f"num_pads: expected >= 0, got {count}")
        return [tags.pad] * count

    padded: list[int] = []
    is_open = False
    for token_id in token_ids:
        if is_open and token_id == tags.async_end:
            padded += pads()
        if token_id in (tags.async_start, tags.async_end):
            is_open = token_id == tags.async_start
        padded.append(token_id)
    return padded + pads() if is_open else padded
