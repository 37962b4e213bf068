"""Which logits row should predict which token.

Labels stand at logits rows, so the shift by one is already in them: the row of a topic's last token
predicts sync or eos across the spans in between, the row of ``<async>`` a span's first token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from pdiff_runtime.plan import ControlTokens

IGNORE = -100
"""The label of a row that carries no loss."""

MODES = ("planned", "ar", "diffusion")
"""What a sequence trains: plan and spans; plain next tokens; or the denoising of all of it. Other
than "planned", a mode takes tags for ordinary tokens."""


@dataclasses.dataclass(frozen=True)
class HybridTargets:
    """Labels of one sequence of n tokens, or of several packed ones.

    Attributes:
        labels: ``[n]`` int64 by logits row, ``IGNORE`` where nothing is predicted.
        is_span: ``[n]`` bool, the tokens of spans, their tags included.
        is_content: ``[n]`` bool, the tokens of spans without their tags: what noise may hide.
    """

    labels: Tensor
    is_span: Tensor
    is_content: Tensor


def span_bounds(token_ids: Sequence[int], tags: ControlTokens) -> list[tuple[int, int]]:
    """``[start, end)`` of every span, from its ``<async>`` to one past its ``</async>``.

    Raises:
        ValueError: A tag that is unbalanced or nested, with its position.
    """
    bounds: list[tuple[int, int]] = []
    start = -1
    for position, token_id in enumerate(token_ids):
        if token_id == tags.async_start:
            if start >= 0:
                raise ValueError(
                    f"token_ids: span opened at {position} inside the one opened at {start}"
                )
            start = position
        elif token_id == tags.async_end:
            if start < 0:
                raise ValueError(f"token_ids: span closed at {position} but none is open")
            bounds.append((start, position + 1))
            start = -1
    if start >= 0:
        raise ValueError(f"token_ids: span opened at {start} is never closed")
    return bounds


def hybrid_targets(
    token_ids: Tensor | Sequence[int], tags: ControlTokens, *, mode: str = "planned"
) -> HybridTargets:
    """Labels of one sequence.

    A span row (its ``<async>`` included) is labelled with the next token, unless that is
    ``</async>``; ``</async>`` with nothing; an autoregressive row with the next autoregressive
    token, across any spans in between; the last autoregressive row with eos. In the modes "ar" and
    "diffusion" every row is labelled with the next token and the last row with nothing; all tokens
    are autoregressive in the one and span content in the other.

    Args:
        token_ids: ``[n]`` integers.
        tags: The control tokens.
        mode: One of :data:`MODES`.

    Raises:
        ValueError: A span tag that is unbalanced or nested, or an unknown mode.
    """
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {MODES}, got {mode!r}")
    ids = token_ids.tolist() if isinstance(token_ids, Tensor) else list(token_ids)
    n = len(ids)
    if mode != "planned":
        next_ids = torch.tensor([*ids, IGNORE][1:], dtype=torch.int64, device="cpu")
        is_noisable = torch.full((n,), mode == "diffusion", device="cpu")
        return HybridTargets(next_ids, is_noisable, is_noisable)
    labels, is_span, is_content = [IGNORE] * n, [False] * n, [False] * n
    for start, end in span_bounds(ids, tags):
        is_span[start:end] = [True] * (end - start)
        is_content[start + 1 : end - 1] = [True] * (end - start - 2)
        labels[start : end - 2] = ids[start + 1 : end - 1]
    next_ar = tags.eos
    for p in reversed(range(n)):
        if not is_span[p]:
            labels[p], next_ar = next_ar, ids[p]
    return HybridTargets(
        torch.tensor(labels, dtype=torch.int64, device="cpu"),
        torch.tensor(is_span, dtype=torch.bool, device="cpu"),
        torch.tensor(is_content, dtype=torch.bool, device="cpu"),
    )
