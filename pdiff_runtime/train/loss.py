"""The planned-diffusion loss: next-token prediction on the plan, denoising inside the spans."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from pdiff_runtime import ops
from pdiff_runtime.plan import ControlTokens
from pdiff_runtime.train.noise import check_compat, document_bounds, in_prompt, per_token
from pdiff_runtime.train.targets import IGNORE, hybrid_targets

KIND_AR, KIND_SPAN = 0, 1


@dataclasses.dataclass(frozen=True)
class HybridWeights:
    """What each logits row predicts and how much it counts, on the CPU.

    Attributes:
        labels: ``[n]`` int64, ``IGNORE`` where the row carries no loss.
        weight: ``[n]`` float32: 1 for plan rows, 1 / t for span rows, 0 where ignored.
        kind: ``[n]`` uint8: ``KIND_AR`` or ``KIND_SPAN``.
        normaliser: What the weighted sum is divided by.
    """

    labels: Tensor
    weight: Tensor
    kind: Tensor
    normaliser: float


def hybrid_weights(
    token_ids: Tensor,
    noised: Tensor,
    tags: ControlTokens,
    *,
    t: Tensor | float,
    cu_seqlens: Tensor | None = None,
    prompt_lens: Tensor | None = None,
    mode: str = "planned",
    compat: str | None = None,
) -> HybridWeights:
    """Labels and weights of packed documents.

    A span target counts where the token it predicts is hidden, with weight 1 / t; a plan target
    always, with weight 1. The normaliser is the number of plan targets plus the number of span
    targets, counted or not. With ``compat="published"`` a span target counts where the row's *own*
    token is hidden, every weight is 1 / t, and each document's share is divided by its length
    without the prompt, as the published trainer does; in mode "ar" the two are the same.

    Args:
        token_ids: ``[n]`` the clean tokens.
        noised: ``[n]`` the same after :func:`apply_noise`.
        tags: The control tokens.
        t: Noise level, scalar or ``[num_documents]``.
        cu_seqlens: ``[num_documents + 1]``; None for one document.
        prompt_lens: ``[num_documents]``; rows before ``prompt_len - 1`` carry no loss.
        mode: "ar" for plain next tokens, "diffusion" for documents that are denoised as a whole;
            see :func:`hybrid_targets`.
        compat: None or "published".

    Raises:
        ValueError: Shapes that do not fit together, malformed spans, or an unknown mode.
    """
    token_ids, noised = token_ids.cpu(), noised.cpu()
    bounds = document_bounds(token_ids, cu_seqlens)
    check_compat(compat)
    if noised.shape != token_ids.shape:
        raise ValueError(
            f"noised: expected shape {list(token_ids.shape)}, got {list(noised.shape)}"
        )
    targets = [hybrid_targets(token_ids[lo:hi], tags, mode=mode) for lo, hi in bounds]
    labels = torch.cat([target.labels for target in targets])
    is_span = torch.cat([target.is_span for target in targets])
    labels = labels.masked_fill(in_prompt(bounds, prompt_lens), IGNORE)
    return weights_from_targets(
        labels, is_span, noised, tags.mask, t=per_token(t, bounds), bounds=bounds,
        prompt_lens=prompt_lens, compat=None if mode == "ar" else compat,
    )  # fmt: skip


def weights_from_targets(
    labels: Tensor,
    is_span: Tensor,
    noised: Tensor,
    mask_token_id: int,
    *,
    t: Tensor,
    bounds: list[tuple[int, int]] | None = None,
    prompt_lens: Tensor | None = None,
    compat: str | None = None,
) -> HybridWeights:
    """:func:`hybrid_weights` from targets that are already known; all arguments ``[n]``."""
    is_target = labels != IGNORE
    is_hidden = noised == mask_token_id
    if compat == "published":
        counted = is_target & (~is_span | is_hidden)
        assert bounds is not None
        prompts = [0] * len(bounds) if prompt_lens is None else prompt_lens.tolist()
        normaliser = float(
            sum(hi - lo - max(0, p - 1) for (lo, hi), p in zip(bounds, prompts, strict=True))
        )
        weight = 1.0 / t
    else:
        # Row p predicts position p + 1; a span's last row has no target, so no document is crossed.
        predicts_hidden = torch.cat([is_hidden[1:], is_hidden.new_zeros(1)])
        counted = is_target & (~is_span | predicts_hidden)
        normaliser = float(is_target.sum())
        weight = torch.where(is_span, 1.0 / t, 1.0)
    return HybridWeights(
        labels=labels.masked_fill(~counted, IGNORE),
        weight=torch.where(counted, weight, 0.0),
        kind=is_span.to(torch.uint8),
        normaliser=normaliser,
    )


def hybrid_loss(
    logits: Tensor,
    token_ids: Tensor,
    noised: Tensor,
    tags: ControlTokens,
    *,
    t: Tensor | float,
    cu_seqlens: Tensor | None = None,
    prompt_lens: Tensor | None = None,
    mode: str = "planned",
    compat: str | None = None,
) -> Tensor:
    """The loss of packed documents from their whole logits ``[n, vocab_size]``, a scalar.

    The training loop computes logits only for rows that carry loss; this is the convenience for
    everyone else. Arguments as in :func:`hybrid_weights`; only where the logits are matters.
    """
    weights = hybrid_weights(
        token_ids, noised, tags, t=t, cu_seqlens=cu_seqlens, prompt_lens=prompt_lens, mode=mode,
        compat=compat,
    )  # fmt: skip
    labels, weight, kind = (
        x.to(logits.device) for x in (weights.labels, weights.weight, weights.kind)
    )
    return ops.weighted_cross_entropy(
        logits, labels, weight, kind, normaliser=weights.normaliser
    ).loss
