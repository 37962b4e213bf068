"""What a caller gets back: events while a request runs, and its whole answer at the end."""

from __future__ import annotations

import dataclasses
from typing import Literal

from pdiff_runtime.engine.errors import GenerationError

FinishReason = Literal["stop", "length", "abort", "deadline", "invalid_plan", "error"]


@dataclasses.dataclass
class Round:
    """One plan and the spans it announced.

    Attributes:
        topics: The words of each topic.
        lengths: Content tokens of each span, in the order of the topics; the last topics have none
            where ``max_tokens`` left no room for them.
        spans: The text of each span, pads removed.
        num_steps: Forwards in which spans were denoised; more than the longest span's steps where
            spans run in waves.
        history: Per such forward, the ``(position, token_id)`` pairs it wrote, positions counted
            from the start of the prompt; empty unless ``record_steps``.
    """

    topics: list[str]
    lengths: list[int]
    spans: list[str] = dataclasses.field(default_factory=list)
    num_steps: int = 0
    history: list[list[tuple[int, int]]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Usage:
    """What a request cost.

    Attributes:
        prompt_tokens, plan_tokens, span_tokens, pad_tokens: Tokens by kind; plan tokens are all
            tokens written one by one, span tokens include tags and pads.
        cached_tokens: Tokens whose keys and values came from the prefix cache when the request was
            first admitted.
        num_forwards: Forward passes the request took part in.
        critical_path: Those that had to wait for one another: one per decision of a plan and per
            denoising step. The others are chunks of prompts, waves of spans, and recomputation. A
            plan takes fewer decisions where drafted tags find spare rows.
        num_preemptions: How often its pages were taken for another request.
        seconds: From submission to the end.
        seconds_in: Parts of ``seconds`` by phase: "waiting", "prefill", "plan", "denoise",
            "commit".
    """

    prompt_tokens: int = 0
    plan_tokens: int = 0
    span_tokens: int = 0
    pad_tokens: int = 0
    cached_tokens: int = 0
    num_forwards: int = 0
    critical_path: int = 0
    num_preemptions: int = 0
    seconds: float = 0.0
    seconds_in: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class RequestOutput:
    """A whole answer.

    Attributes:
        token_ids: Everything after the prompt but eos.
        text: The visible text in reading order: no tags, no plan, no pads; cut before a stop
            string.
        rounds: Plan and spans of every round; empty for a plain reply.
        finish_reason: "stop", "length" (``max_tokens`` cut something), "abort", "deadline",
            "invalid_plan" (only without the grammar), or "error".
        error: What went wrong, for "error" and "invalid_plan".
        logprobs: One per token of ``token_ids`` if asked for: the natural logarithm of the
            probability the model gave the token when it was written, before temperature, filters
            and bans; None for tokens the model did not choose (tags of spans, a user's plan).
    """

    request_id: str
    token_ids: list[int]
    text: str
    rounds: list[Round]
    finish_reason: FinishReason
    usage: Usage
    error: GenerationError | None = None
    logprobs: list[float | None] | None = None


@dataclasses.dataclass(frozen=True)
class PlanReady:
    """A round's plan is complete and its spans are laid out.

    ``bounds`` are the content positions ``[lo, hi)`` of each span, counted from the prompt's start.
    """

    request_id: str
    round_idx: int
    topics: list[str]
    bounds: list[tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class SpanUpdate:
    """A denoising step wrote ``token_ids`` at ``positions``, both in the same order."""

    request_id: str
    step_idx: int
    positions: list[int]
    token_ids: list[int]


@dataclasses.dataclass(frozen=True)
class SpanDone:
    """A span has no mask left; ``text`` is its own, pads removed."""

    request_id: str
    round_idx: int
    span_idx: int
    text: str


@dataclasses.dataclass(frozen=True)
class Text:
    """More visible text, in reading order: what is filled behind a gap comes when the gap is."""

    request_id: str
    text: str


@dataclasses.dataclass(frozen=True)
class Finished:
    """The request is over."""

    request_id: str
    output: RequestOutput


Event = PlanReady | SpanUpdate | SpanDone | Text | Finished
