"""Reading a whole plan: the topics of its last round."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Literal

from pdiff_runtime.plan.control_tokens import ControlTokens
from pdiff_runtime.plan.grammar import PlanGrammar, Topic

_UNBOUNDED = 1 << 30


class PlanError(ValueError):
    """A plan that breaks the grammar.

    Attributes:
        position: Index of the token to blame; the length of the plan if something is missing.
    """

    def __init__(self, message: str, position: int) -> None:
        super().__init__(message)
        self.position = position


def parse_plan(
    token_ids: Iterable[int], tags: ControlTokens, *, compat: Literal["published"] | None = None
) -> list[Topic]:
    """The topics after the last sync, in order.

    Args:
        token_ids: Plan tokens. A sync or eos at the end closes the plan; all up to the last sync
            before it is skipped.
        tags: Ids of the control tokens.
        compat: ``"published"`` reads a plan as the published models do: from the last sync on, also
            one at the end; free text around topics; a topic's number is its first digit, with a
            second one if that follows at once, and the rest are its words; an open topic ends the
            plan.

    Returns:
        The topics; none for plain text.

    Raises:
        PlanError: The grammar is broken; with ``"published"``, no topic or one without a digit.
    """
    if compat not in (None, "published"):
        raise ValueError(f"compat: expected None or 'published', got {compat!r}")
    ids = [int(token_id) for token_id in token_ids]
    if compat == "published":
        return _parse_published(ids, tags)

    state = _grammar(tags).start(_UNBOUNDED)
    for position in range(_after_last(tags.sync, ids[:-1]), len(ids)):
        try:
            state.advance(ids[position])
        except ValueError as error:
            raise PlanError(f"token_ids[{position}]: {error}", position) from None
    if state.is_in_topic:
        raise PlanError(
            f"token_ids: expected topic_end, got the end at {len(ids)} with a topic open", len(ids)
        )
    return state.topics


def _parse_published(ids: list[int], tags: ControlTokens) -> list[Topic]:
    topics: list[Topic] = []
    start = _after_last(tags.sync, ids)
    opened: int | None = None
    for position in range(start, len(ids)):
        if opened is None:
            opened = position if ids[position] == tags.topic_start else None
        elif ids[position] == tags.topic_end:
            topics.append(_published_topic(ids[opened + 1 : position], tags, opened))
            opened = None
    if not topics:
        raise PlanError(f"token_ids: expected a topic from position {start} on, got none", start)
    return topics


def _published_topic(words: list[int], tags: ControlTokens, opened: int) -> Topic:
    digit_of = {token_id: digit for digit, token_id in enumerate(tags.digits)}
    first = next((i for i, token_id in enumerate(words) if token_id in digit_of), None)
    if first is None:
        raise PlanError(f"token_ids[{opened}]: expected a topic with a digit, got {words}", opened)
    digits = [str(digit_of[t]) for t in words[first : first + 2] if t in digit_of]
    return Topic(tuple(words[:first] + words[first + len(digits) :]), int("".join(digits)))


def _after_last(token_id: int, ids: list[int]) -> int:
    return len(ids) - ids[::-1].index(token_id) if token_id in ids else 0


@functools.lru_cache(maxsize=16)
def _grammar(tags: ControlTokens) -> PlanGrammar:
    return PlanGrammar(tags, vocab_size=1 << 62, max_topic_tokens=_UNBOUNDED, max_topics=_UNBOUNDED)
