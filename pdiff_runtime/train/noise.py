"""The forward process of masked diffusion: hide span content, one noise level per document."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from pdiff_runtime.plan import ControlTokens
from pdiff_runtime.train.targets import hybrid_targets

MIN_TIME = 0.001
"""The smallest noise level, which bounds the weight 1 / t."""


def time_from_uniform(u: Tensor) -> Tensor:
    """Map uniforms in [0, 1) to noise levels in [0.001, 1), fp32."""
    return (1.0 - MIN_TIME) * u.float() + MIN_TIME


def apply_noise(
    token_ids: Tensor,
    tags: ControlTokens,
    *,
    t: Tensor | float,
    u: Tensor,
    cu_seqlens: Tensor | None = None,
    prompt_lens: Tensor | None = None,
    mode: str = "planned",
    compat: str | None = None,
) -> Tensor:
    """Replace span content by the mask token where ``u < t``.

    Args:
        token_ids: ``[n]`` integers, one document or several packed ones.
        tags: The control tokens.
        t: Noise level of each document, scalar or ``[num_documents]``.
        u: ``[n]`` uniforms in [0, 1), so that the result is reproducible.
        cu_seqlens: ``[num_documents + 1]`` int, from 0 to n; None for one document.
        prompt_lens: ``[num_documents]``; the first ``prompt_len - 1`` tokens stay as they are.
        mode: "diffusion" takes the whole document for span content, "ar" none of it; see
            :func:`hybrid_targets`.
        compat: "published" hides the tags of spans too.

    Returns:
        ``[n]`` token ids, a new tensor where ``token_ids`` is.

    Raises:
        ValueError: Shapes that do not fit together, malformed spans, or an unknown mode.
    """
    bounds = document_bounds(token_ids, cu_seqlens)
    if u.shape != token_ids.shape:
        raise ValueError(f"u: expected shape {list(token_ids.shape)}, got {list(u.shape)}")
    check_compat(compat)
    noisable = torch.cat(
        [torch.zeros(0, dtype=torch.bool, device="cpu")]
        + [
            targets.is_span if compat == "published" else targets.is_content
            for targets in (hybrid_targets(token_ids[lo:hi], tags, mode=mode) for lo, hi in bounds)
        ]
    )
    noisable &= ~in_prompt(bounds, prompt_lens)
    hidden = noisable & (u.cpu() < per_token(t, bounds))
    return torch.where(hidden.to(token_ids.device), tags.mask, token_ids)


def check_compat(compat: str | None) -> None:
    """Raise ValueError unless ``compat`` is None or "published"."""
    if compat not in (None, "published"):
        raise ValueError(f"compat: expected None or 'published', got {compat!r}")


def document_bounds(token_ids: Tensor, cu_seqlens: Tensor | None) -> list[tuple[int, int]]:
    """``[lo, hi)`` of each packed document."""
    if token_ids.ndim != 1:
        raise ValueError(f"token_ids: expected shape [n], got {list(token_ids.shape)}")
    n = token_ids.shape[0]
    edges = [0, n] if cu_seqlens is None else cu_seqlens.tolist()
    if edges[0] != 0 or edges[-1] != n or edges != sorted(edges):
        raise ValueError(f"cu_seqlens: expected ascending from 0 to {n}, got {edges}")
    return list(itertools.pairwise(edges))


def in_prompt(bounds: list[tuple[int, int]], prompt_lens: Tensor | None) -> Tensor:
    """``[n]`` bool: the first ``prompt_len - 1`` tokens of each document."""
    result = torch.zeros(bounds[-1][1], dtype=torch.bool, device="cpu")
    if prompt_lens is not None:
        if prompt_lens.shape != (len(bounds),):
            raise ValueError(
                f"prompt_lens: expected shape [{len(bounds)}], got {list(prompt_lens.shape)}"
            )
        for (lo, hi), prompt_len in zip(bounds, prompt_lens.tolist(), strict=True):
            result[lo : min(hi, lo + max(0, prompt_len - 1))] = True
    return result


def per_token(t: Tensor | float, bounds: list[tuple[int, int]]) -> Tensor:
    """Repeat the noise level of each document over its tokens: ``[n]`` fp32."""
    lengths = torch.tensor([hi - lo for lo, hi in bounds], device="cpu")
    t = torch.as_tensor(t, dtype=torch.float32, device="cpu").reshape(-1)
    if len(t) not in (1, len(bounds)) or not bool(((t >= 0) & (t <= 1)).all()):
        raise ValueError(f"t: expected one or {len(bounds)} numbers from 0 to 1, got {t}")
    return torch.repeat_interleave(t.expand(len(bounds)), lengths)
