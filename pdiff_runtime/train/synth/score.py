"""Exact scoring of answers: a part is right if it says an accepted wording, to the letter."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

from .tokenizer import CONTROL


def plain(text: str) -> str:
    """Remove pads, then outer white space."""
    return text.replace(CONTROL["pad"], "").strip()


def score(
    parts: Sequence[dict[str, Any]],
    span_texts: Sequence[str] | None = None,
    *,
    answer_text: str | None = None,
) -> list[bool]:
    """Mark each expected part as right or wrong.

    Parts that accept the same wordings (the neighbours of a country) must be answered by
    different facts: the same neighbour twice counts once.

    Args:
        parts: The ``"parts"`` of an evaluation record.
        span_texts: One text per span in the order of the plan; a missing span is wrong, a
            surplus one is ignored. Span ``i`` answers part ``i``.
        answer_text: The whole answer as plain text, instead of ``span_texts``; a part is right if
            the answer contains an accepted wording.

    Returns:
        One mark per part.

    Raises:
        ValueError: Both or neither of ``span_texts`` and ``answer_text`` are given.
    """
    if (span_texts is None) == (answer_text is None):
        raise ValueError("score: expected either span_texts or answer_text")
    used: set[tuple[str, str]] = set()
    marks = []
    for index, part in enumerate(parts):
        if span_texts is not None:
            text = plain(span_texts[index]) if index < len(span_texts) else ""
            said = [wording for wording in part["accepted"] if wording == text]
        else:
            said = [wording for wording in part["accepted"] if wording in plain(answer_text or "")]
        keys = [(part["entity"], _fact_key(part, wording)) for wording in said]
        fresh = [key for key in keys if key not in used]
        marks.append(bool(fresh))
        used.update(fresh[:1])
    return marks


def _fact_key(part: dict[str, Any], wording: str) -> str:
    """What a wording states, so that two wordings of one neighbour count as one."""
    if part["field"] == "neighbour":
        return wording.removeprefix("One neighbour is ").removeprefix("Next to it is ")
    return part["field"]


def coupled_statements(parts: Sequence[dict[str, Any]], text: str) -> list[str]:
    """Facts that a text states in answer to coupled parts, each as often as it is stated.

    Coupled parts accept the same wordings, so that several spans may hit on the same fact.

    Args:
        parts: The ``"parts"`` of an evaluation record.
        text: The whole answer.
    """
    shared = collections.Counter(tuple(part["accepted"]) for part in parts)
    field_of = {tuple(part["accepted"]): part for part in parts}
    return [
        _fact_key(field_of[accepted], wording)
        for accepted, num_parts in shared.items()
        if num_parts > 1
        for wording in accepted
        for _ in range(text.count(wording))
    ]
