"""unmask_: from logits to written tokens in one call, for spans of many requests at once."""

from __future__ import annotations

import math
from enum import StrEnum
from typing import NamedTuple

import torch
from torch import Tensor

from pdiff_runtime import _C
from pdiff_runtime.ops import reference
from pdiff_runtime.ops._library import (
    ELEMENT_TYPES,
    FLOAT32_MAX,
    Impl,
    check_no_grad,
    check_tensor,
    cuda_stream,
    is_traced,
    library,
    select_impl,
)


class Rule(StrEnum):
    """How a span chooses positions, see :func:`unmask_`; the published names are accepted too."""

    ENTROPY = "entropy"
    PROBABILITY = "probability"
    MARGIN = "margin"
    THRESHOLD = "threshold"
    FACTOR = "factor"
    ENTROPY_BUDGET = "entropy_budget"

    @classmethod
    def _missing_(cls, value: object) -> Rule | None:
        published = {
            "maskgit_plus": cls.PROBABILITY,
            "topk_margin": cls.MARGIN,
            "confidence_threshold": cls.THRESHOLD,
        }
        return published.get(str(value))


class UnmaskStats(NamedTuple):
    """What was decided for each row.

    Attributes:
        confidence: ``[num_rows]`` float32, higher is more certain; entropy is negative, in nats.
        candidate: ``[num_rows]`` int64, the token that was or would be written; -1 if ``is_nan``.
        is_nan: ``[num_rows]`` bool: the logits are no distribution (NaN, +inf, or all -inf).
        is_written: ``[num_rows]`` bool.
    """

    confidence: Tensor
    candidate: Tensor
    is_nan: Tensor
    is_written: Tensor


class _Settings(NamedTuple):
    """What a span may have of its own: one value for all, or ``[num_spans]``."""

    temperature: float | Tensor
    top_p: float | Tensor
    top_k: int | Tensor
    alg_temp: float | Tensor
    threshold: float | Tensor | None
    step_idx: int | Tensor


_SETTING_DTYPES = (
    torch.float32, torch.float32, torch.int32, torch.float32, torch.float32, torch.int32,
)  # fmt: skip
_SETTING_RANGES = (
    (0.0, FLOAT32_MAX, "a finite number >= 0"),
    (0.0, math.inf, ">= 0"),
    (0, 2**31 - 1, "0 to 2147483647"),
    (0.0, math.inf, ">= 0"),
    (0.0, math.inf, ">= 0"),
    (0, 2**31 - 1, "0 to 2147483647"),
)
"""The least and the largest number of each setting, and what messages say; NaN is in none."""
_NEEDS_THRESHOLD = (Rule.THRESHOLD, Rule.FACTOR, Rule.ENTROPY_BUDGET)
_RULE_CODES = {rule: code for code, rule in enumerate(Rule)}


def unmask_(
    token_ids: Tensor,
    logits: Tensor,
    row_position: Tensor,
    cu_rows_span: Tensor,
    num_unmask: Tensor,
    *,
    rule: Rule | str = Rule.ENTROPY,
    threshold: float | Tensor | None = None,
    temperature: float | Tensor = 0.0,
    top_p: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    alg_temp: float | Tensor = 0.0,
    banned_ids: Tensor | None = None,
    seeds: Tensor | None = None,
    step_idx: int | Tensor = 0,
    positions: Tensor | None = None,
    num_masked: Tensor | None = None,
    impl: Impl | str = Impl.AUTO,
) -> UnmaskStats:
    """Reveal the most certain masked tokens of each span, in place.

    A row's distribution is softmax after bans, temperature, top-p and top-k, in that order. In the
    order (logit descending, id ascending), top-p keeps the shortest prefix whose probability
    reaches ``top_p``, and top-k all of it that ties with or comes before the ``top_k``-th; at least
    one token. Temperature 0 takes the likeliest token (lowest id on ties) with confidence from the
    unscaled logits; above, the token is a sample whose random numbers depend on (seed, position,
    step, id) alone.

    ``threshold``, ``temperature``, ``top_p``, ``top_k``, ``alg_temp`` and ``step_idx`` are each one
    value or ``[num_spans]`` (float32; ``top_k`` and ``step_idx`` int32), so requests with different
    settings share a call.

    Args:
        token_ids: ``[total_tokens]`` int64, written in place.
        logits: ``[num_rows, vocab_size]`` float32, bfloat16 or float16, rows any
            stride apart; row r already predicts ``token_ids[row_position[r]]``.
        row_position: ``[num_rows]`` int32, ascending within a span.
        cu_rows_span: ``[num_spans + 1]`` int32, from 0 to ``num_rows``.
        num_unmask: ``[num_spans]`` int32; more than a span has reveals all of it.
        rule: What positions are ranked by, and how many of the ``num_unmask`` best are written.
            All of them: ``entropy`` (sum p log p), ``probability`` of the token, ``margin`` between
            the two likeliest. The first and as many as are sure: ``threshold``, by probability,
            those with p >= ``threshold``; ``factor``, by probability, ranks 2, 3, ... up to where
            (rank + 1) (1 - p) < ``threshold`` fails (Wu et al. 2025); ``entropy_budget``, by
            entropy, as long as the entropies of the ranks before add up to at most ``threshold``
            (Ben-Hamu et al. 2025).
        threshold: 0 or greater; the three rules that read it need one.
        alg_temp: Above 0, positions are drawn without replacement from
            softmax(confidence / alg_temp).
        banned_ids: ``[num_banned]`` int64; -inf before everything else.
        seeds: ``[num_rows]`` int64, default 0.
        positions: ``[num_rows]`` int32 in place of ``row_position`` for the random numbers.
        num_masked: ``[num_spans]`` int32, how many masks each span has left: what is written is
            taken off, in place, so that a span is done where it reads 0.

    On a GPU nothing waits for the device, so what tensors hold cannot be checked first: there a
    position out of range and a row of no span are not written, a banned id out of range bans
    nothing, and a setting below its range counts as 0.

    Returns:
        Statistics per row. A row that is no distribution is flagged and never written.

    Raises:
        ValueError: A shape, dtype or device differs, e.g. "num_unmask: expected int32 [3], got
            int64 [3]"; nothing has been written then.
    """
    rule = _checked_rule(rule, threshold)
    settings = _Settings(temperature, top_p, top_k, alg_temp, threshold, step_idx)
    _check_numbers(settings)
    if is_traced():
        result = torch.ops.pdiff.unmask_(
            token_ids, logits, row_position, cu_rows_span, num_unmask, rule,
            *_as_tensors(settings, num_unmask), banned_ids, seeds, positions, num_masked, str(impl),
        )  # fmt: skip
        return UnmaskStats(*result)
    return _run(
        token_ids, logits, row_position, cu_rows_span, num_unmask, rule, settings,
        banned_ids, seeds, positions, num_masked, impl,
    )  # fmt: skip


def _run(
    token_ids: Tensor,
    logits: Tensor,
    row_position: Tensor,
    cu_rows_span: Tensor,
    num_unmask: Tensor,
    rule: Rule,
    settings: _Settings,
    banned_ids: Tensor | None,
    seeds: Tensor | None,
    positions: Tensor | None,
    num_masked: Tensor | None,
    impl: Impl | str,
) -> UnmaskStats:
    device = logits.device
    choice = select_impl(impl, device)
    check_no_grad("unmask_", logits=logits)
    check_tensor(
        "logits",
        logits,
        ELEMENT_TYPES,
        ("num_rows", "vocab_size"),
        logits,
        contiguous=False,
    )
    num_rows, vocab_size = logits.shape
    if vocab_size > 1 and logits.stride(1) != 1:
        raise ValueError(f"logits: expected rows without gaps, got strides {logits.stride()}")
    if vocab_size == 0:
        raise ValueError("logits: expected a vocab_size >= 1, got 0")
    check_tensor("token_ids", token_ids, torch.int64, ("total_tokens",), logits)
    check_tensor("row_position", row_position, torch.int32, (num_rows,), logits)
    check_tensor("num_unmask", num_unmask, torch.int32, ("num_spans",), logits)
    num_spans = num_unmask.shape[0]
    check_tensor("cu_rows_span", cu_rows_span, torch.int32, (num_spans + 1,), logits)
    if banned_ids is not None:
        check_tensor("banned_ids", banned_ids, torch.int64, ("num_banned",), logits)
    if seeds is not None:
        check_tensor("seeds", seeds, torch.int64, (num_rows,), logits)
    if positions is not None:
        check_tensor("positions", positions, torch.int32, (num_rows,), logits)
    if num_masked is not None:
        check_tensor("num_masked", num_masked, torch.int32, (num_spans,), logits)
    for name, value, dtype in zip(_Settings._fields, settings, _SETTING_DTYPES, strict=True):
        if isinstance(value, Tensor):
            check_tensor(name, value, dtype, (num_spans,), logits)

    if choice is Impl.REFERENCE:
        return UnmaskStats(
            *reference.unmask_(
                token_ids, logits, row_position, cu_rows_span, num_unmask, rule=rule,
                banned_ids=banned_ids, seeds=seeds, positions=positions, num_masked=num_masked,
                **settings._asdict(),
            )
        )  # fmt: skip

    stats = _empty_stats(logits)
    if choice is Impl.TRITON:
        from pdiff_runtime.ops import triton

        triton.unmask(
            token_ids, logits, row_position, cu_rows_span, num_unmask, *stats,
            rule_code=_RULE_CODES[rule], banned_ids=banned_ids, seeds=seeds, positions=positions,
            num_masked=num_masked, **settings._asdict(),
        )  # fmt: skip
        return stats
    arguments = (
        token_ids, logits, row_position, cu_rows_span, num_unmask, num_masked, banned_ids, seeds,
        positions, *stats, _RULE_CODES[rule], settings,
    )  # fmt: skip
    if choice is Impl.CPU:
        _C.unmask(*arguments, torch.get_num_threads())
        return stats
    filters = any(
        isinstance(setting, Tensor) or setting != off
        for setting, off in ((settings.top_p, 1.0), (settings.top_k, 0))
    )
    num_bytes = _C.unmask_workspace_bytes(num_rows, vocab_size, filters)
    workspace = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    _C.unmask_cuda(*arguments, workspace, *cuda_stream(device))
    return stats


def _checked_rule(rule: Rule | str, threshold: float | Tensor | None) -> Rule:
    try:
        checked = Rule(rule)
    except ValueError:
        raise ValueError(f"rule: expected one of {', '.join(Rule)}, got {rule!r}") from None
    if checked in _NEEDS_THRESHOLD and threshold is None:
        raise ValueError(f"threshold: expected a value with rule '{checked}', got None")
    return checked


def _check_numbers(settings: _Settings) -> None:
    """Raise for a number that is out of range; what a tensor holds is for the kernel to see."""
    for name, value, dtype, (least, largest, range_name) in zip(
        _Settings._fields, settings, _SETTING_DTYPES, _SETTING_RANGES, strict=True
    ):
        if isinstance(value, Tensor) or (value is None and name == "threshold"):
            continue
        if not isinstance(value, (int, float) if dtype.is_floating_point else int):
            what = "a number" if dtype.is_floating_point else "an integer"
            raise ValueError(f"{name}: expected {what} or a tensor [num_spans], got {value!r}")
        if not least <= value <= largest:
            raise ValueError(f"{name}: expected {range_name}, got {value}")


def _as_tensors(settings: _Settings, num_unmask: Tensor) -> list[Tensor]:
    """Every setting as ``[num_spans]``, for the registered op."""
    return [
        value if isinstance(value, Tensor) else torch.full_like(num_unmask, value or 0, dtype=dtype)
        for value, dtype in zip(settings, _SETTING_DTYPES, strict=True)
    ]


def _empty_stats(logits: Tensor) -> UnmaskStats:
    num_rows = logits.shape[0]
    return UnmaskStats(
        confidence=logits.new_empty(num_rows, dtype=torch.float32),
        candidate=logits.new_empty(num_rows, dtype=torch.int64),
        is_nan=logits.new_empty(num_rows, dtype=torch.bool),
        is_written=logits.new_empty(num_rows, dtype=torch.bool),
    )


library.define(
    "unmask_(Tensor(a!) token_ids, Tensor logits, Tensor row_position, Tensor cu_rows_span, "
    "Tensor num_unmask, str rule, Tensor temperature, Tensor top_p, Tensor top_k, "
    "Tensor alg_temp, Tensor threshold, Tensor step_idx, Tensor? banned_ids, Tensor? seeds, "
    "Tensor? positions, Tensor(b!)? num_masked, str impl) -> (Tensor, Tensor, Tensor, Tensor)"
)


@torch.library.impl(library, "unmask_", "CompositeExplicitAutograd")
def _unmask_op(
    token_ids: Tensor, logits: Tensor, row_position: Tensor, cu_rows_span: Tensor,
    num_unmask: Tensor, rule: str, temperature: Tensor, top_p: Tensor, top_k: Tensor,
    alg_temp: Tensor, threshold: Tensor, step_idx: Tensor, banned_ids: Tensor | None,
    seeds: Tensor | None, positions: Tensor | None, num_masked: Tensor | None, impl: str,
) -> UnmaskStats:  # fmt: skip
    settings = _Settings(temperature, top_p, top_k, alg_temp, threshold, step_idx)
    return _run(
        token_ids, logits, row_position, cu_rows_span, num_unmask, Rule(rule), settings,
        banned_ids, seeds, positions, num_masked, impl,
    )  # fmt: skip


@torch.library.register_fake("pdiff::unmask_", lib=library)
def _unmask_fake(token_ids: Tensor, logits: Tensor, *args: object) -> UnmaskStats:
    return _empty_stats(logits)
