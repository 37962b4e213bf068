"""One request's way through the engine: prompt, plan, spans, sync, next round.

A request is a state machine over its tokens. Positions ``[0, computed)`` have their final keys and
values in its pages; what follows up to :attr:`Request.context_end` is still to be forwarded, in
chunks as they fit; behind it are either a token to be written or open spans. Losing the pages
therefore loses nothing but time: `computed` goes back to 0. (Not where keys and values are those of
an earlier step, with ``kv_commit="published"`` or a block cache: such a request keeps its pages.)
"""

from __future__ import annotations

import copy
import dataclasses
import enum
import functools
import itertools
import time
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from pdiff_runtime.cache import PageAllocator, SharedPages
from pdiff_runtime.denoise import PUBLISHED_RULES, RULES, UnmaskRule, num_steps
from pdiff_runtime.engine.errors import GenerationError, InvalidPlanError, OutOfMemoryError
from pdiff_runtime.engine.output import FinishReason, Usage
from pdiff_runtime.engine.params import ONE_SPAN_MODES, GenerationParams
from pdiff_runtime.engine.reader import Decode, Reader
from pdiff_runtime.engine.span import BlockSpan, BranchSpan, Span, SpanKind
from pdiff_runtime.plan import (
    ControlTokens,
    PlanError,
    PlanGrammar,
    PlanState,
    SpanLayout,
    Topic,
    parse_plan,
)

Run = tuple[int, int, Literal["causal", "full"], tuple[tuple[int, int], ...]]
"""Positions ``[lo, hi)`` to forward, and the key intervals they see; see ``SpanLayout``."""


_ISOLATED, _JOINT = -1, -2  # end the prefix-cache keys of pages with spans


class Phase(enum.StrEnum):
    """What a request waits for."""

    WAITING = "waiting"
    PREFILL = "prefill"
    PLAN = "plan"
    DENOISE = "denoise"
    COMMIT = "commit"
    DONE = "done"


def count_rows(spans: Sequence[Span]) -> int:
    """Rows of the next forward of spans together."""
    return sum(span.num_rows for span in spans)


@dataclasses.dataclass
class PlanRound:
    """Topics of one round, where its spans lie, and how far it is.

    Attributes:
        num_steps: Forwards so far in which any of its spans was denoised.
        num_added_steps: Steps beyond the schedule, for what a published threshold has rejected.
    """

    topics: list[Topic]
    spans: list[Span]
    num_steps: int = 0
    num_added_steps: int = 0
    history: list[list[tuple[int, int]]] = dataclasses.field(default_factory=list)

    @property
    def lo(self) -> int:
        return self.spans[0].lo

    @property
    def hi(self) -> int:
        return self.spans[-1].hi


@dataclasses.dataclass
class Write:
    """A token that a denoising step has chosen."""

    position: int
    token_id: int
    logprob: float | None = None


@dataclasses.dataclass
class Rows:
    """The rows of a request in one forward.

    Attributes:
        runs: What they are.
        layout: Who sees whom.
        positions, slots: ``[num_rows]``, or one number for a single row.
    """

    runs: list[Run]
    layout: SpanLayout
    positions: npt.NDArray[np.int64] | int
    slots: npt.NDArray[np.int64] | int

    @property
    def num_rows(self) -> int:
        return self.layout.num_rows


@dataclasses.dataclass(slots=True)
class Work:
    """What one request does in the next forward.

    Attributes:
        context: Runs that get their final keys and values.
        spans: Open spans that are denoised; behind the context.
        num_drafts: Rows at the end of the context whose tokens are guesses.
        mask_idx: For writing token by token, the grammar's mask for what follows each of the last
            rows, those of drafts included; None bans nothing.
    """

    request: Request
    context: list[Run] = dataclasses.field(default_factory=list)
    spans: list[Span] = dataclasses.field(default_factory=list)
    num_drafts: int = 0
    mask_idx: list[int | None] = dataclasses.field(default_factory=list)

    @property
    def num_context_rows(self) -> int:
        num_rows = 0  # a loop: a sum over a generator takes three times as long
        for lo, hi, _, _ in self.context:
            num_rows += hi - lo
        return num_rows

    @property
    def has_span_rows(self) -> bool:
        """Whether any rows are those of spans, open or finished."""
        return bool(self.spans) or any(kind == "full" for _, _, kind, _ in self.context)

    @property
    def num_rows(self) -> int:
        return self.num_context_rows + count_rows(self.spans)


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a request must know of its model and engine.

    Attributes:
        grammar: None where the model has no tokens for plans.
        max_len: Tokens that the model has positions and the cache has pages for.
        full_attention: Whether a prompt and the one span behind it see each other both ways.
        logits_shift: Logits row p predicts position ``p + logits_shift``.
    """

    tags: ControlTokens
    grammar: PlanGrammar | None
    length_unit: int
    draft_plan: bool
    page_size: int
    max_len: int
    full_attention: bool
    logits_shift: int


class Request:
    """State of one request; positions count from the start of its prompt.

    Attributes:
        token_ids: Prompt and answer so far; open spans with their masks.
        computed: Positions before it have their final keys and values.
        params: How to answer, defaults filled in.
        rule: Chooses what a denoising step writes.
        priority, arrival: Requests are served in this order, the smallest first.
        deadline: Moment on the engine's clock at which it ends, finished or not.
        leader: Another request with the same prompt, whose pages this one waits for.
        reader: Where somebody reads along: a caller, or a search for stop strings.
    """

    def __init__(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        params: GenerationParams,
        limits: Limits,
        allocator: PageAllocator,
        user_rounds: Sequence[Sequence[int]] = (),
        *,
        seed: int,
        priority: int = 0,
        arrival: int = 0,
        deadline: float | None = None,
        leader: Request | None = None,
        decode: Decode,
        with_text: bool = False,
    ) -> None:
        self.request_id = request_id
        self.params = params = params.resolved()
        assert params.unmask is not None
        self.is_published = params.compat == "published"
        self.rule: UnmaskRule = (PUBLISHED_RULES if self.is_published else RULES)[params.unmask]
        self.seed = seed
        self.limits = limits
        self.tags = limits.tags
        self.priority, self.arrival, self.deadline = priority, arrival, deadline
        self.leader = leader
        self.pages = SharedPages(allocator, limits.page_size)
        self.token_ids = [int(token_id) for token_id in prompt_ids]
        self.prompt_len = len(prompt_ids)
        self.computed = 0
        self.rounds: list[PlanRound] = []
        self.finish_reason: FinishReason | None = None
        self.error: GenerationError | None = None
        self.usage = Usage(prompt_tokens=self.prompt_len)
        self.is_running = False
        self.has_predicted = False
        self.num_announced = 0
        self._since, self._phase_then = time.perf_counter(), Phase.WAITING
        self.logprobs: dict[int, float] = {}
        self.reader: Reader | None = None
        self.with_text = with_text
        if with_text or params.stop:
            self.reader = Reader(self.tags, decode, params.stop)
        self._num_read = self.prompt_len
        self._page_keys: list[npt.NDArray[np.int64]] = []
        self._user_rounds = [list(map(int, tokens)) for tokens in user_rounds]
        self._plan_start = self.prompt_len
        self._plan_state: PlanState | None = None
        self._drafts: list[int] = []
        self._is_denoising = False
        self._continues = False  # a sync, not the end, follows the round's spans
        self._sync_logprob: float | None = None
        self._is_cut = False  # the budget shortened or dropped spans of the round
        self._rows: Rows | None = None
        if not self._is_one_span:
            self._start_plan()
        elif self.is_canvas:
            self._open_canvas()
        else:
            self._open_spans([], [max(1, self.remaining - 2)])

    # --- where it stands ---

    @property
    def remaining(self) -> int:
        """Tokens that may still be written."""
        return self.params.max_tokens - (len(self.token_ids) - self.prompt_len)

    @property
    def is_done(self) -> bool:
        return self.finish_reason is not None

    @property
    def is_pinned(self) -> bool:
        """Its keys and values can not be computed again, so its pages are never taken."""
        params = self.params
        keeps_spans = params.mode == "planned" and params.kv_commit == "published"
        keeps_blocks = params.mode == "fast_dllm" and params.block_cache != "off"
        return keeps_spans or keeps_blocks

    @property
    def _is_one_span(self) -> bool:
        return self.params.mode in ONE_SPAN_MODES

    @property
    def is_canvas(self) -> bool:
        """Its one span has the prompt in it, no tags, and ends at the first eos."""
        return self._is_one_span and self.limits.full_attention

    @property
    def span_kind(self) -> SpanKind:
        """What its spans are."""
        if self.is_published:
            return SpanKind.PUBLISHED
        return SpanKind.CANVAS if self.is_canvas else SpanKind.TAGGED

    @property
    def order(self) -> tuple[int, int]:
        return self.priority, self.arrival

    @property
    def open_round(self) -> PlanRound:
        return self.rounds[-1]

    @property
    def context_end(self) -> int:
        """Positions before it are causal rows and finished spans."""
        return self.open_round.lo if self._is_denoising else len(self.token_ids)

    @property
    def writes_next(self) -> bool:
        """Whether one row is all it takes to write a token."""
        return not self._is_denoising and self.computed == len(self.token_ids) - 1

    @property
    def phase(self) -> Phase:
        """What it does next."""
        if self.is_done:
            return Phase.DONE
        if not self.is_running:
            return Phase.WAITING
        if self._is_denoising and self.computed == self.context_end:
            return Phase.DENOISE
        if self.rounds and self.computed >= self.prompt_len:
            closed = self._closed_rounds()
            if closed and closed[-1].hi > self.computed:
                return Phase.COMMIT
        return Phase.PLAN if self.writes_next and self.has_predicted else Phase.PREFILL

    def is_late(self, now: float) -> bool:
        """Whether its deadline has passed at ``time.perf_counter() == now``."""
        return self.deadline is not None and now >= self.deadline

    def clock(self) -> None:
        """Book the time since the last call to the phase it was in then."""
        now, then, seconds_in = time.perf_counter(), self._phase_then, self.usage.seconds_in
        if then is not Phase.DONE:
            seconds_in[then.value] = seconds_in.get(then.value, 0.0) + now - self._since
        self._since, self._phase_then = now, self.phase

    def _closed_rounds(self) -> list[PlanRound]:
        """Rounds with spans, without the open one."""
        rounds = self.rounds[:-1] if self._is_denoising else self.rounds
        return [plan_round for plan_round in rounds if plan_round.spans]

    # --- what it wants forwarded ---

    def start(self) -> None:
        """Leave the queue."""
        self.is_running = True
        self.clock()

    def context_groups(self) -> Iterator[list[Run]]:
        """The rows up to ``context_end`` that are not computed, in order.

        A group of spans must be forwarded as a whole; a causal run may be cut.
        """
        at = self.computed
        for plan_round in self._closed_rounds() if not self.writes_next else ():
            if plan_round.hi <= at:
                continue
            if at < plan_round.lo:
                yield [self._causal(at, plan_round.lo)]
                at = plan_round.lo
            runs = [
                self._span_run(plan_round, max(at, span.lo), span)
                for span in plan_round.spans
                if at < span.hi
            ]
            if self.params.isolate_spans:
                yield from ([run] for run in runs)
            else:
                yield runs
            at = plan_round.hi
        if at < self.context_end:
            yield [self._causal(at, self.context_end)]

    def span_groups(self) -> list[list[Span]]:
        """Spans to denoise in reading order; those of a group start and run together."""
        if not self._is_denoising:
            return []
        spans = self.open_round.spans
        if self.params.isolate_spans:
            return [[span] for span in spans if span.masked]
        # Open siblings must not see a finished span's stale keys, so in joint mode it stays.
        is_clean = self.params.kv_commit != "published"
        return [[span for span in spans if span.masked or is_clean]]

    def draft_plan(self, work: Work, *, max_drafts: int) -> None:
        """Ask for the next token, and add a plan's structure for the model to confirm with it.

        After a number ``topic_end`` and ``topic_start`` are likely, after a topic the next one.
        Where the model decides otherwise the draft is dropped: random numbers belong to positions,
        so the plan is the one that token by token would give.
        """
        self._drafts = []
        state = self._plan_state
        work.mask_idx = [None if state is None else state.mask_idx]
        if state is None or not self.limits.draft_plan:
            return
        last = self.token_ids[-1]
        if last in self.tags.digits and state.is_in_topic:
            likely = [self.tags.topic_end, self.tags.topic_start]
        elif last == self.tags.topic_end or len(self.token_ids) == self._plan_start:
            likely = [self.tags.topic_start]
        else:
            return
        state = copy.copy(state)
        for token_id in likely[: max(0, max_drafts)]:
            if not state.allowed_mask()[token_id]:
                break
            state.advance(token_id)
            self._drafts.append(token_id)
            work.mask_idx.append(state.mask_idx)
        if self._drafts:
            work.num_drafts = len(self._drafts)
            lo, hi, _, _ = work.context[-1]
            work.context[-1] = self._causal(lo, hi + work.num_drafts)

    def rows(self, work: Work) -> Rows:
        """The rows of ``work``; the same object as long as they stay the same."""
        if len(work.context) == 1 and not work.spans:
            lo, hi, kind, _ = work.context[0]
            if kind == "causal" and hi - lo == 1:  # the next token: no arrays for one row
                return Rows(work.context, _causal_row(hi), lo, self.pages.slot(lo))
        runs = [*work.context, *(self._open_run(span) for span in work.spans)]
        if self._rows is None or self._rows.runs != runs:
            segments = [(hi - lo, kind, intervals) for lo, hi, kind, intervals in runs]
            num_keys = max(intervals[-1][1] for _, _, _, intervals in runs)
            bounds = [(lo, hi) for lo, hi, _, _ in runs]
            self._rows = Rows(
                runs,
                SpanLayout.from_segments(num_keys, segments),
                np.concatenate([np.arange(lo, hi) for lo, hi in bounds]),
                np.concatenate([self.pages.slots(lo, hi) for lo, hi in bounds]),
            )
        return self._rows

    def row_tokens(self, rows: Rows) -> list[int]:
        """Token ids of the rows, drafts included."""
        if isinstance(rows.positions, int):
            return [self.token_ids[rows.positions]]
        known = [*self.token_ids, *self._drafts] if self._drafts else self.token_ids
        return list(itertools.chain.from_iterable(known[lo:hi] for lo, hi, _, _ in rows.runs))

    def _causal(self, lo: int, hi: int) -> Run:
        return lo, hi, "causal", ((0, hi),)

    def _span_run(self, plan_round: PlanRound, lo: int, span: Span) -> Run:
        if self.params.isolate_spans:
            return lo, span.hi, "full", ((0, plan_round.lo), (span.lo, span.hi))
        return lo, span.hi, "full", ((0, plan_round.hi),)

    def _open_run(self, span: Span) -> Run:
        lo, hi, kind = span.window
        if kind == "causal":
            return lo, hi, kind, ((0, self.open_round.lo), (span.lo, hi))
        if self.is_canvas:
            return lo, hi, kind, ((0, span.hi),)
        return lo, hi, kind, self._span_run(self.open_round, lo, span)[3]

    # --- what came of it ---

    def forwarded(self, work: Work) -> None:
        """The rows of ``work`` have their keys and values."""
        self.usage.num_forwards += 1
        if work.context:
            self.computed = work.context[-1][1] - work.num_drafts

    def accept_tokens(self, token_ids: Sequence[int], logprobs: Sequence[float | None]) -> None:
        """What the last rows predict; only those behind confirmed drafts count."""
        drafts = [*self._drafts, None]
        self._drafts = []
        self.has_predicted = True
        self.usage.critical_path += 1
        for token_id, logprob, draft in zip(token_ids, logprobs, drafts, strict=True):
            self._accept_token(token_id, logprob)
            if token_id != draft or self._is_denoising or self.is_done:
                return

    def _accept_token(self, token_id: int, logprob: float | None) -> None:
        if self._plan_state is not None:
            self._plan_state.advance(token_id)
        self.computed = len(self.token_ids)
        is_sync = token_id == self.tags.sync and self.params.mode != "ar"
        if token_id == self.tags.eos or is_sync:
            self._close_plan(continues=is_sync, sync_logprob=logprob)
            return
        if logprob is not None:
            self.logprobs[len(self.token_ids)] = logprob
        self.token_ids.append(token_id)
        if self._read_on():
            return
        if self.remaining == 0:
            self._close_plan(continues=False, is_cut=True)

    def implied_writes(self, spans: Sequence[Span], writes: Sequence[Write]) -> list[Write]:
        """What follows from the writes of a step."""
        written, pad = {write.position: write.token_id for write in writes}, self.tags.pad
        return [Write(p, pad) for span in spans for p in span.implied_pads(written, pad)]

    def accept_denoised(self, spans: Sequence[Span], writes: Sequence[Write]) -> list[int]:
        """One denoising step of ``spans``; returns which spans of the round have become full."""
        plan_round = self.open_round
        self.has_predicted = True
        for write in writes:
            self.token_ids[write.position] = write.token_id
            if write.logprob is not None:
                self.logprobs[write.position] = write.logprob
        written = {write.position for write in writes}
        unmasked = {write.position for write in writes if write.token_id != self.tags.mask}
        full = []
        for span in spans:
            was_open = bool(span.masked)
            num_written = sum(position in written for position in span.masked)
            span.stepped(self.rule.carry(span.progress, num_written))
            span.unmasked(unmasked)
            if was_open and not span.masked:
                full.append(plan_round.spans.index(span))
        if self.is_published:
            self._give_up(spans, has_progress=bool(unmasked))
        if self.params.record_steps:
            plan_round.history.append([(w.position, w.token_id) for w in writes])
        plan_round.num_steps += 1
        if self._read_on():
            return full
        if self._ends_at_eos():
            self._close_round()
            return [0]
        if not any(span.masked for span in plan_round.spans):
            self._close_round()
        elif full and (kept := self._kept()) is not None:
            self.pages.drop_all_but(kept, plan_round.lo)
        return full

    def _give_up(self, spans: Sequence[Span], *, has_progress: bool) -> None:
        """Let spans whose steps are over keep their masks, as the published loop does.

        What its threshold rejects in the last step adds a step; without end where the mask is the
        likeliest token, so here only as long as something is written.
        """
        plan_round = self.open_round
        is_over = [span.step_idx >= span.num_steps + plan_round.num_added_steps for span in spans]
        if any(is_over) and has_progress and any(span.carry for span in spans):
            plan_round.num_added_steps += 1
            return
        for span in itertools.compress(spans, is_over):
            span.masked = []

    def _start_plan(self) -> None:
        self._plan_start = len(self.token_ids)
        if self._user_rounds:
            self._take_user_plan()
            return
        self._plan_state = None
        if self.params.mode != "ar" and self.params.use_grammar and not self.is_published:
            assert self.limits.grammar is not None
            # The closing eos is not kept, so it has a place beyond the budget.
            self._plan_state = self.limits.grammar.start(self.remaining + 1)

    def _take_user_plan(self) -> None:
        *tokens, closing = self._user_rounds.pop(0)
        if len(tokens) > self.remaining:
            self.finish("length")
            return
        self.token_ids += tokens
        self._close_plan(continues=closing == self.tags.sync and bool(self._user_rounds))

    def _close_plan(
        self, *, continues: bool, is_cut: bool = False, sync_logprob: float | None = None
    ) -> None:
        """Lay out the spans that the plan announced, or end a reply without topics."""
        if self.params.mode == "ar" or (is_cut and self.is_published):
            self.finish("length" if is_cut else "stop")
            return
        try:
            if self.is_published:  # from the last sync on, the prompt included
                topics = parse_plan(self.token_ids, self.tags, compat="published")
            else:
                topics = parse_plan(self.token_ids[self._plan_start :], self.tags)
        except PlanError as error:
            if is_cut:
                self.finish("length")
            else:
                self.finish("invalid_plan", error=InvalidPlanError(str(error)))
            return
        if not topics:
            self.finish("length" if is_cut else "stop")
            return
        self._continues = continues
        self._sync_logprob = sync_logprob
        self._open_spans(topics, [self._span_len(topic.number) for topic in topics])

    def _span_len(self, number: int) -> int:
        scale = self.params.length_scale
        return number * self.limits.length_unit if scale is None else int(number * scale)

    def _open_spans(self, topics: list[Topic], lengths: list[int]) -> None:
        """Append the round's spans, as many and as long as the budget allows."""
        spans: list[Span] = []
        is_cut = False
        for length in lengths:
            room = self.remaining - 2
            if room < min(1, length) and not self.is_published:
                is_cut = True
                break
            if length > room and not self.is_published:
                is_cut, length = True, room
            lo = len(self.token_ids)
            masks = [self.tags.mask] * length
            self.token_ids += [self.tags.async_start, *masks, self.tags.async_end]
            hi = len(self.token_ids)
            spans.append(self._new_span(lo, hi, (lo + 1, hi - 1)))
        if self._continues and self.remaining == 0:
            is_cut = True
        self._open_round(topics, spans, is_cut=is_cut)

    def _open_canvas(self) -> None:
        """Make prompt and answer one span."""
        self.token_ids += [self.tags.mask] * self.remaining
        hi = len(self.token_ids)
        self._open_round([], [self._new_span(0, hi, (self.prompt_len, hi))], is_cut=False)

    def _new_span(self, lo: int, hi: int, content: tuple[int, int]) -> Span:
        params = self.params
        if params.mode == "skeleton":
            return BranchSpan(lo, hi, content)
        if params.mode == "fast_dllm":
            cache = None if params.block_cache == "off" else params.block_cache
            return BlockSpan(
                lo, hi, content, block_len=params.block_len, cache=cache,
                lead=self.limits.logits_shift,
            )  # fmt: skip
        return Span(lo, hi, content)

    def _open_round(self, topics: list[Topic], spans: list[Span], *, is_cut: bool) -> None:
        """Denoise these spans next, if there is anything to denoise and room for it."""
        self.rounds.append(PlanRound(topics, spans))
        self._is_denoising = True
        self._is_cut = is_cut
        if self.is_published and (error := self._published_failure()) is not None:
            self.fail(error)
            return
        longest = max((len(span.masked) for span in spans), default=0)
        if self.params.mode == "fast_dllm":
            longest = min(longest, self.params.block_len)
        for span in spans:
            span.num_steps = self.params.num_steps or num_steps(longest, self.params.steps_ratio)
        if longest == 0:
            self._close_round()

    def _published_failure(self) -> GenerationError | None:
        """Why a round cannot run in which the published implementation crashes, or overshoots."""
        longest = max(len(span.masked) for span in self.open_round.spans)
        if self.params.num_steps is None and int(longest * self.params.steps_ratio) < 1:
            return InvalidPlanError(
                f"steps_ratio: the longest span has {longest} tokens, and so no step at "
                f"steps_ratio={self.params.steps_ratio}"
            )
        if len(self.token_ids) > self.limits.max_len:
            return self.overshoot_error()
        return None

    def overshoot_error(self) -> GenerationError:
        """For spans that go beyond ``max_tokens``, as published, and for which there is no room."""
        num_tokens = len(self.token_ids)
        return OutOfMemoryError(f"the plan's spans overshoot to {num_tokens} tokens: no room")

    def _close_round(self) -> None:
        """All spans are filled: end here, or commit them and let the sync open the next round."""
        plan_round = self.open_round
        if self.is_canvas:
            self._is_cut = not self._ends_at_eos()
            self.cut()
        elif self.remaining < 0:  # as published
            self._is_cut = True
            self.cut()
        self._end_denoising()
        if self._is_cut or not self._continues:
            self.finish("length" if self._is_cut else "stop")
            return
        if self.is_pinned and plan_round.num_steps > 0:
            self.computed = plan_round.hi
        if self._sync_logprob is not None:
            self.logprobs[len(self.token_ids)] = self._sync_logprob
        self.token_ids.append(self.tags.sync)
        if self.remaining == 0:
            self.finish("length")
            return
        self._start_plan()

    # --- its text ---

    def _read_on(self) -> bool:
        """Read what has become final, in reading order; whether a stop string ended the answer."""
        if self.reader is None:
            return False
        end = self._final_end()
        while self._num_read < end:
            self.reader.read(self.token_ids[self._num_read])
            self._num_read += 1
            if self.reader.is_stopped:
                self.cut(self._num_read)
                self.finish("stop")
                return True
        return False

    def _final_end(self) -> int:
        """The first position that may still change, or that the budget cuts off, as published."""
        end = min(len(self.token_ids), self.prompt_len + self.params.max_tokens)
        if self._is_denoising:
            masked = (span.masked[0] for span in self.open_round.spans if span.masked)
            end = min(end, next(masked, end))
            if self.is_canvas and self.tags.eos in (
                answer := self.token_ids[self.prompt_len : end]
            ):
                end = self.prompt_len + answer.index(self.tags.eos)
        return end

    def _ends_at_eos(self) -> bool:
        """Whether the answer's first eos has nothing but tokens before it."""
        end = self._final_end()
        return self.is_canvas and self.token_ids[end : end + 1] == [self.tags.eos]

    def cut(self, end: int | None = None) -> None:
        """Forget what is not final, or what lies behind ``end``, so that no mask is left."""
        end = self._final_end() if end is None else end
        del self.token_ids[end:]
        self._end_denoising()
        for plan_round in self.rounds:
            plan_round.spans = [span for span in plan_round.spans if span.lo < end]
            for span in plan_round.spans:
                lo, hi = span.content
                span.hi, span.content = min(span.hi, end), (lo, min(hi, end))

    def _end_denoising(self) -> None:
        if self._is_denoising:
            self._is_denoising = False
            self.usage.critical_path += max((s.step_idx for s in self.open_round.spans), default=0)

    def fail(self, error: GenerationError) -> None:
        """End with what is final."""
        self.cut()
        self.finish("error", error=error)

    def finish(self, reason: FinishReason, *, error: GenerationError | None = None) -> None:
        """Give the request's pages back and end it."""
        self.pages.release()
        self.finish_reason = reason
        self.clock()
        self.usage.seconds = sum(self.usage.seconds_in.values())
        self.error = error
        self._is_denoising = False
        self.is_running = False
        if self.reader is not None:
            for token_id in self.token_ids[self._num_read :]:
                self.reader.read(token_id)
            self._num_read = len(self.token_ids)
            self.reader.finish()
        answer = range(self.prompt_len, len(self.token_ids))
        usage, spans = self.usage, [span for r in self.rounds for span in r.spans]
        usage.span_tokens = sum(
            min(span.hi, answer.stop) - max(span.lo, answer.start) for span in spans
        )
        usage.plan_tokens = len(answer) - usage.span_tokens
        usage.pad_tokens = sum(
            self.token_ids[slice(*span.content)].count(self.tags.pad) for span in spans
        )

    # --- its pages ---

    @property
    def num_pinned_tokens(self) -> int:
        """Tokens whose pages a request takes at once where it never gives any back."""
        return max(len(self.token_ids), self.prompt_len + self.params.max_tokens)

    @property
    def num_pages_wanted(self) -> int:
        """How many more pages it will take soon: for all its tokens, and one for a plan to grow."""
        num_tokens = len(self.token_ids)
        if self.is_pinned:
            num_tokens = self.num_pinned_tokens
        num_pages = -(-num_tokens // self.limits.page_size)
        is_growing = not (self._is_denoising or self.is_pinned)
        return num_pages + is_growing - self.pages.num_pages

    def preempt(self) -> None:
        """Back to the queue; the request goes on later from what it has written."""
        self.give_back()
        self.is_running = False
        self.clock()
        self._drafts = []
        self.usage.num_preemptions += 1
        for span in self.open_round.spans if self._is_denoising else ():
            span.lose_pages()

    def give_back(self) -> None:
        """Give the pages back, so that nothing is computed."""
        self.pages.release()
        self.computed = 0
        self._rows = None

    def grow(self, num_tokens: int) -> None:
        """Take pages for the first ``num_tokens`` positions, where anybody will read them.

        Raises:
            OutOfPagesError: Too few are free; none was taken.
        """
        self.pages.grow(num_tokens, self._kept())

    def _kept(self) -> list[tuple[int, int]] | None:
        """Positions that are still read where not all are: finished spans of a last round are not.

        Siblings do not see them, and nothing comes behind them.
        """
        is_last = self._is_denoising and not self._continues
        if not (is_last and self.params.isolate_spans):
            return None
        plan_round = self.open_round
        return [(0, plan_round.lo), *((s.lo, s.hi) for s in plan_round.spans if s.masked)]

    def adopt_prefix(self) -> None:
        """Take the pages that the prefix cache has for this request's context."""
        # The row that predicts must be forwarded.
        end = self.context_end - (0 if self._is_denoising else 1)
        self.computed = self.pages.adopt_prefix(self._page_key, end)

    def publish(self) -> None:
        """Enter the pages that are complete and final into the prefix cache."""
        end = self.computed
        if self.is_pinned and (rounds := self.rounds):
            end = min(end, rounds[0].lo if rounds[0].spans else end)
        self.pages.publish(self._page_key, end)

    def _page_key(self, page_idx: int) -> npt.NDArray[np.int64]:
        """What decides the page's keys and values beside the pages before it.

        That is its tokens and, as rows of a span see the whole span, the rest of the spans in it.
        All of them are final, so a key is made once; pages come in order.
        """
        if page_idx < len(self._page_keys):
            return self._page_keys[page_idx]
        lo = page_idx * self.limits.page_size
        hi = end = lo + self.limits.page_size
        has_span = False
        for plan_round in self._closed_rounds():
            has_span |= plan_round.lo < hi and plan_round.hi > lo
            if plan_round.lo < hi < plan_round.hi:
                end = plan_round.hi
        key = self.token_ids[lo:end]
        if has_span:
            key = [*key, _ISOLATED if self.params.isolate_spans else _JOINT]
        self._page_keys.append(np.array(key, np.int64))
        return self._page_keys[page_idx]


@functools.lru_cache(maxsize=1 << 14)
def _causal_row(num_keys: int) -> SpanLayout:
    return SpanLayout.causal(1, num_keys)
