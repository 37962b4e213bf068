"""One request's way through the engine: prompt, plan, spans, sync, next round.

A request is a state machine. :meth:`Request.work` says which rows it wants forwarded next and which
of them predict something; the engine forwards the rows of all requests at once and gives back what
was predicted through :meth:`Request.accept_tokens` or :meth:`Request.accept_denoised`.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
from collections.abc import Sequence
from typing import Literal

from pdiff_runtime.cache import PageTable
from pdiff_runtime.denoise import RULES, num_steps, num_unmask
from pdiff_runtime.engine.output import FinishReason, Usage
from pdiff_runtime.engine.params import GenerationParams
from pdiff_runtime.plan import (
    ControlTokens,
    PlanError,
    PlanGrammar,
    PlanState,
    SpanLayout,
    Topic,
    parse_plan,
)

Run = tuple[int, int, Literal["causal", "full"], list[tuple[int, int]]]
"""Positions ``[lo, hi)`` to forward, and the key intervals they see; see ``SpanLayout``."""


class Phase(enum.Enum):
    """What a request waits for."""

    WAITING = "waiting"
    PLAN = "plan"
    DENOISE = "denoise"
    DONE = "done"


@dataclasses.dataclass
class Span:
    """A span at positions ``[lo, hi)``, its two tags included."""

    lo: int
    hi: int
    num_masked: int

    @property
    def content(self) -> tuple[int, int]:
        """Positions between the tags."""
        return self.lo + 1, self.hi - 1


@dataclasses.dataclass
class PlanRound:
    """Topics of one round, where its spans lie, and how far it is."""

    topics: list[Topic]
    spans: list[Span]
    num_steps: int
    step_idx: int = 0
    history: list[list[tuple[int, int]]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Work:
    """What one request wants from the next forward.

    Attributes:
        positions: Of the rows, runs of ascending positions.
        token_ids: Of the rows.
        layout: Who sees whom; the same object as long as the rows stay the same.
        spans: For denoising, ``(span, masked positions, how many to write)``; the row before a
            position predicts it.
        mask_idx: For writing token by token, the grammar's mask for what follows each of the last
            rows, the drafted ones included; None bans nothing.
    """

    request: Request
    positions: list[int]
    token_ids: list[int]
    layout: SpanLayout
    spans: list[tuple[Span, list[int], int]]
    mask_idx: list[int | None]


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a request must know of its model and engine."""

    tags: ControlTokens
    grammar: PlanGrammar
    length_unit: int
    draft_plan: bool


class Request:
    """State of one request; positions count from the start of its prompt."""

    def __init__(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        params: GenerationParams,
        limits: Limits,
        pages: PageTable,
        user_rounds: Sequence[Sequence[int]] = (),
    ) -> None:
        self.request_id = request_id
        self.params = params
        self.seed = params.resolve_seed()
        self.limits = limits
        self.tags = limits.tags
        self.pages = pages
        self.token_ids = list(prompt_ids)
        self.prompt_len = len(prompt_ids)
        self.phase = Phase.WAITING
        self.rounds: list[PlanRound] = []
        self.finish_reason: FinishReason | None = None
        self.error: str | None = None
        self.usage = Usage(prompt_tokens=self.prompt_len)
        self._user_rounds = [list(tokens) for tokens in user_rounds]
        self._plan_start = self.prompt_len
        self._plan_state: PlanState | None = None
        self._pending: list[Run] = []
        self._drafts: list[int] = []
        self._continues = False  # a sync, not the end, follows the round's spans
        self._layout: tuple[list[Run], SpanLayout] | None = None

    @property
    def remaining(self) -> int:
        """Tokens that may still be written."""
        return self.params.max_tokens - (len(self.token_ids) - self.prompt_len)

    def start(self) -> None:
        """Leave the queue."""
        self._append_causal(0)
        if self.params.mode == "diffusion":
            self._open_spans([], [max(0, self.remaining - 2)])
        else:
            self._start_plan()

    def work(self) -> Work:
        """The rows to forward next."""
        runs = [*self._pending, *self._open_runs()]
        mask_idx = self._draft_plan(runs)
        if self._layout is None or self._layout[0] != runs:
            segments = [(hi - lo, kind, intervals) for lo, hi, kind, intervals in runs]
            num_keys = max(hi for _, hi, _, _ in runs)
            self._layout = runs, SpanLayout.from_segments(num_keys, segments)
        positions = [position for lo, hi, _, _ in runs for position in range(lo, hi)]
        known = [*self.token_ids, *self._drafts]
        token_ids = [known[position] for position in positions]
        layout = self._layout[1]
        return Work(self, positions, token_ids, layout, self._unmask_work(), mask_idx)

    def forwarded(self) -> None:
        """The rows of :meth:`work` have their keys and values."""
        self._pending = []
        self.usage.num_forwards += 1

    # --- tokens one by one ---

    def _draft_plan(self, runs: list[Run]) -> list[int | None]:
        """Add a plan's structure to the rows, for the model to confirm in the same forward.

        After a number ``topic_end`` and ``topic_start`` are likely, after a topic the next one.
        Where the model decides otherwise the draft is dropped: random numbers belong to positions,
        so the plan is the one that token by token would give.
        """
        self._drafts = []
        state = self._plan_state
        if self.phase is not Phase.PLAN or state is None:
            return [None] if self.phase is Phase.PLAN else []
        mask_idx: list[int | None] = [state.mask_idx]
        if not self.limits.draft_plan:
            return mask_idx
        last = self.token_ids[-1]
        if last in self.tags.digits and state.is_in_topic:
            likely = [self.tags.topic_end, self.tags.topic_start]
        elif last == self.tags.topic_end or len(self.token_ids) == self._plan_start:
            likely = [self.tags.topic_start]
        else:
            likely = []
        state = copy.copy(state)
        for token_id in likely:
            if not state.allowed_mask()[token_id]:
                break
            state.advance(token_id)
            self._drafts.append(token_id)
            mask_idx.append(state.mask_idx)
        if self._drafts:
            lo, hi, kind, _ = runs[-1]
            hi += len(self._drafts)
            runs[-1] = lo, hi, kind, [(0, hi)]
            self.pages.grow(hi)
        return mask_idx

    def accept_tokens(self, token_ids: Sequence[int]) -> None:
        """What the last rows predict; only those behind confirmed drafts count."""
        drafts = [*self._drafts, None]
        for token_id, draft in zip(token_ids, drafts, strict=True):
            self._accept_token(token_id)
            if token_id != draft or self.phase is not Phase.PLAN:
                return

    def _accept_token(self, token_id: int) -> None:
        if self._plan_state is not None:
            self._plan_state.advance(token_id)
        is_end = token_id == self.tags.eos
        is_sync = token_id == self.tags.sync and self.params.mode == "planned"
        if is_end or is_sync:
            self._pending = []
            self._close_plan(continues=is_sync)
            return
        self.token_ids.append(token_id)
        if self.remaining == 0:
            self._close_plan(continues=False, is_cut=True)
            return
        self._pending = []
        self._append_causal(len(self.token_ids) - 1)

    def _start_plan(self) -> None:
        self._plan_start = len(self.token_ids)
        if self._user_rounds:
            self._take_user_plan()
            return
        self.phase = Phase.PLAN
        self._plan_state = None
        if self.params.mode == "planned" and self.params.use_grammar:
            # The closing eos is not kept, so it has a place beyond the budget.
            self._plan_state = self.limits.grammar.start(self.remaining + 1)

    def _take_user_plan(self) -> None:
        *tokens, closing = self._user_rounds.pop(0)
        if len(tokens) > self.remaining:
            self.finish("length")
            return
        start = len(self.token_ids)
        self.token_ids += tokens
        if tokens:
            self._append_causal(start)
        self._close_plan(continues=closing == self.tags.sync and bool(self._user_rounds))

    def _close_plan(self, *, continues: bool, is_cut: bool = False) -> None:
        """Lay out the spans that the plan announced, or end a reply without topics."""
        if self.params.mode == "ar":
            self.finish("length" if is_cut else "stop")
            return
        try:
            topics = parse_plan(self.token_ids[self._plan_start :], self.tags)
        except PlanError as error:
            self.finish("length" if is_cut else "invalid_plan", error=str(error))
            return
        if not topics:
            self.finish("length" if is_cut else "stop")
            return
        self._continues = continues
        self._open_spans(topics, [self._span_len(topic.number) for topic in topics])

    def _span_len(self, number: int) -> int:
        scale = self.params.length_scale
        return number * self.limits.length_unit if scale is None else int(number * scale)

    # --- spans ---

    def _open_spans(self, topics: list[Topic], lengths: list[int]) -> None:
        """Append the round's spans, as many and as long as the budget allows."""
        spans: list[Span] = []
        for length in lengths:
            if self.remaining < 2 + min(1, length):
                self.finish_reason = "length"
                break
            if length > self.remaining - 2:
                self.finish_reason = "length"
                length = self.remaining - 2
            lo = len(self.token_ids)
            masks = [self.tags.mask] * length
            self.token_ids += [self.tags.async_start, *masks, self.tags.async_end]
            spans.append(Span(lo, lo + length + 2, length))
        if self._continues and self.remaining == 0:
            self.finish_reason = "length"
        longest = max((span.num_masked for span in spans), default=0)
        steps = num_steps(longest, self.params.steps_ratio)
        self.rounds.append(PlanRound(topics, spans, steps))
        self.pages.grow(len(self.token_ids))
        self.usage.span_tokens += sum(span.hi - span.lo for span in spans)
        self.phase = Phase.DENOISE
        if longest == 0:
            self._close_round()

    def _open_runs(self) -> list[Run]:
        """Rows of the spans that are still being denoised."""
        if self.phase is not Phase.DENOISE:
            return []
        spans = self.rounds[-1].spans
        # Open siblings must not see a finished span's stale keys, so in joint mode it stays.
        is_joint = not self.params.isolate_spans and self.params.kv_commit != "published"
        return [self._span_run(span) for span in spans if span.num_masked or is_joint]

    def _span_run(self, span: Span) -> Run:
        first, last = self.rounds[-1].spans[0].lo, self.rounds[-1].spans[-1].hi
        if self.params.isolate_spans:
            return span.lo, span.hi, "full", [(0, first), (span.lo, span.hi)]
        return span.lo, span.hi, "full", [(0, last)]

    def _unmask_work(self) -> list[tuple[Span, list[int], int]]:
        if self.phase is not Phase.DENOISE:
            return []
        plan_round = self.rounds[-1]
        has_quota = RULES[self.params.unmask].has_quota
        work = []
        for span in plan_round.spans:
            if span.num_masked:
                quota = num_unmask(span.num_masked, plan_round.step_idx, plan_round.num_steps)
                lo, hi = span.content
                masked = [p for p in range(lo, hi) if self.token_ids[p] == self.tags.mask]
                work.append((span, masked, quota if has_quota else span.num_masked))
        return work

    def accept_denoised(self, writes: list[tuple[int, int]]) -> None:
        """One denoising step's ``(position, token_id)`` pairs."""
        plan_round = self.rounds[-1]
        for position, token_id in writes:
            self.token_ids[position] = token_id
        written = {position for position, _ in writes}
        for span in plan_round.spans:
            span.num_masked -= len(written.intersection(range(*span.content)))
        if self.params.record_steps:
            plan_round.history.append(writes)
        plan_round.step_idx += 1
        if not any(span.num_masked for span in plan_round.spans):
            self._close_round()

    def _close_round(self) -> None:
        """All spans are filled: end here, or commit them and let the sync open the next round."""
        plan_round = self.rounds[-1]
        plan_round.num_steps = plan_round.step_idx
        self.usage.pad_tokens += sum(
            self.token_ids[slice(*span.content)].count(self.tags.pad) for span in plan_round.spans
        )
        if not self._continues or self.finish_reason is not None:
            self.finish(self.finish_reason or "stop")
            return
        if self.params.kv_commit != "published":
            self._pending += [self._span_run(span) for span in plan_round.spans]
        self.token_ids.append(self.tags.sync)
        if self.remaining == 0:
            self.finish("length")
            return
        self._append_causal(len(self.token_ids) - 1)
        self._start_plan()

    # --- both ---

    def _append_causal(self, start: int) -> None:
        """Forward the rows from ``start`` to the end, each seeing all before it."""
        end = len(self.token_ids)
        self.pages.grow(end)
        self._pending.append((start, end, "causal", [(0, end)]))

    def finish(self, reason: FinishReason, *, error: str | None = None) -> None:
        """End the request and give its pages back."""
        self.finish_reason = reason
        self.error = error
        self.phase = Phase.DONE
        self.usage.plan_tokens = len(self.token_ids) - self.prompt_len - self.usage.span_tokens
        self.pages.release()
