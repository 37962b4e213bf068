"""Who takes part in the next forward, and who gets which pages.

Requests are served by priority, then in the order they came. A step has room for
``max_batch_tokens`` rows and is filled in this order:

1. the next token of every request that writes one by one: few rows, and much waits for them;
2. spans that have started, as far as rows go; single rows of later requests give way to them;
3. the rest, request by request: chunks of prompts, finished spans to commit, and new spans.

Pages are taken when rows need them. Where none is free, the request that is served last gives
its own back and goes on later from the tokens it has, so the first one always gets on. The spans
of a round start together if rows and pages allow; else as many as fit, in reading order, and the
others in waves after them. A request takes pages from others for spans only while none of its own
runs.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable

from pdiff_runtime.cache import OutOfPagesError, PageAllocator
from pdiff_runtime.engine.params import EngineConfig
from pdiff_runtime.engine.request import Request, Work, count_rows
from pdiff_runtime.engine.span import Span


class Scheduler:
    """Holds all requests of an engine.

    Attributes:
        waiting, running: In the order they are served.
        num_preemptions: How often a request lost its pages.
    """

    def __init__(self, config: EngineConfig, allocator: PageAllocator) -> None:
        self.config, self.allocator = config, allocator
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.num_preemptions = 0

    def add(self, request: Request) -> None:
        """Queue a request."""
        bisect.insort(self.waiting, request, key=_order)

    def remove(self, requests: Iterable[Request]) -> None:
        """Forget requests; their pages are their own business."""
        gone = {id(request) for request in requests}
        self.waiting = [r for r in self.waiting if id(r) not in gone]
        self.running = [r for r in self.running if id(r) not in gone]

    def schedule(self) -> list[Work]:
        """What the next forward does; starts and stops requests as pages and rows demand."""
        self._admit()
        batch = _Batch(self.config.max_batch_tokens)
        writing: list[Request] = []
        others: list[Request] = []
        for request in self.running:
            is_writing = request.writes_next and request.has_predicted
            (writing if is_writing else others).append(request)
        for request in writing:
            if request.is_running:  # not preempted by one of those before it
                self._take_context(request, batch)
        for request in others:
            if request.is_running and request.computed == request.context_end:
                for spans in request.span_groups():
                    num_rows, work = count_rows(spans), Work(request)
                    if spans[0].is_started and batch.can_hold(num_rows, work, is_started=True):
                        batch.make_room(num_rows, work)
                        batch.add_spans(request, spans)
        for request in others:
            if request.is_running and request not in batch.works:
                self._take_context(request, batch)
            if request.is_running and batch.context_end(request) == request.context_end:
                self._start_spans(request, batch)
        if self.running and not batch.works:
            self._end_a_deadlock()
        return list(batch.works.values())

    def _end_a_deadlock(self) -> None:
        """All that run wait for pages of others that can not give any back: the last one ends."""
        for request in reversed(self.running):
            if request.is_pinned:
                request.fail(request.overshoot_error())
                self.remove([request])
                return

    def _admit(self) -> None:
        """Start waiting requests for which there is room beside what the running ones will take."""
        for request in list(self.waiting):
            if len(self.running) >= self.config.max_requests:
                return
            leader = request.leader
            if leader is not None and not (leader.has_predicted or leader.is_done):
                continue
            if self.config.prefix_cache:
                request.adopt_prefix()
            if (
                self.running
                and sum(r.num_pages_wanted for r in (*self.running, request))
                > self.allocator.num_free
            ):
                request.give_back()
                return
            if request.is_pinned:
                request.pages.grow(request.num_pinned_tokens)
            if request.usage.num_preemptions == 0:
                request.usage.cached_tokens = request.computed
            self.waiting.remove(request)
            request.start()
            bisect.insort(self.running, request, key=_order)

    def _take_context(self, request: Request, batch: _Batch) -> None:
        """Forward what of the context fits, and ask for a token where that completes it."""
        work = Work(request)
        for runs in request.context_groups():
            room = batch.room - work.num_context_rows
            lo, hi, kind, _ = runs[0]
            is_cut, num_rows = False, 0
            if kind == "causal":
                if room <= 0:
                    break
                is_cut = hi > lo + room
                hi = min(hi, lo + room)
                runs = [(lo, hi, kind, ((0, hi),))]
            else:
                num_rows = sum(hi - lo for lo, hi, _, _ in runs)
                if not batch.can_hold(num_rows, work):
                    break
            if not self._grow(request, runs[-1][1], batch):
                break
            if num_rows:
                batch.make_room(num_rows, work)
            work.context += runs
            if is_cut:
                break
        if not work.context:
            return
        if work.context[-1][1] == len(request.token_ids) and not request.span_groups():
            request.draft_plan(work, max_drafts=batch.room - work.num_context_rows)
            if work.num_drafts and not self._grow(request, work.context[-1][1], batch):
                return
        batch.add(work)

    def _start_spans(self, request: Request, batch: _Batch) -> None:
        groups = request.span_groups()
        is_first = not any(spans[0].is_started for spans in groups)
        for spans in groups:
            if spans[0].is_started:
                continue
            num_rows, work = count_rows(spans), Work(request)
            if batch.is_blocked or not batch.can_hold(num_rows, work):
                return
            if not self._grow(request, spans[-1].hi, batch, may_preempt=is_first):
                return
            batch.make_room(num_rows, work)
            for span in spans:
                span.is_started = True
            batch.add_spans(request, spans)
            is_first = False

    def _grow(
        self, request: Request, num_tokens: int, batch: _Batch, *, may_preempt: bool = True
    ) -> bool:
        """Pages for the first ``num_tokens`` positions, from requests served later if need be."""
        while True:
            try:
                request.grow(num_tokens)
            except OutOfPagesError:
                victim = self._victim(request) if may_preempt else None
                if victim is None:
                    return False
                self._preempt(victim, batch)
            else:
                return True

    def _victim(self, request: Request) -> Request | None:
        """The running request that is served last, if it is served after ``request``."""
        for other in reversed(self.running):
            if other is request:
                return None
            if not other.is_pinned:
                return other
        return None

    def _preempt(self, request: Request, batch: _Batch) -> None:
        batch.drop(request)
        request.preempt()
        self.running.remove(request)
        self.add(request)
        self.num_preemptions += 1


class _Batch:
    """The works of one forward, and how many more rows it takes.

    Attributes:
        has_spans: Whether any rows are those of spans.
        is_blocked: Spans did not fit, so no others may start.
    """

    def __init__(self, max_rows: int) -> None:
        self.max_rows = self.room = max_rows
        self.works: dict[Request, Work] = {}
        self.is_blocked = False
        self.has_spans = False

    def can_hold(self, num_rows: int, work: Work, *, is_started: bool = False) -> bool:
        """Whether spans fit behind what ``work`` has, if :meth:`make_room` makes room.

        Single rows of later requests give way to spans that have started, and to others where no
        spans run: else a stream of such requests would hold them up for ever. Spans that are longer
        than a batch fit where there are no others. Where spans do not fit, those of later requests
        must not start: they would take the rows that these wait for.
        """
        has_spans = self.has_spans or work.has_span_rows
        missing = num_rows + work.num_context_rows - self.room
        if num_rows > self.max_rows:
            fits = not has_spans
        elif missing > 0 and (is_started or not has_spans):
            fits = missing <= sum(w.num_context_rows for w in self._later(work.request))
        else:
            fits = missing <= 0
        self.is_blocked |= not fits
        return fits

    def make_room(self, num_rows: int, work: Work) -> None:
        """Put off rows of later requests, the last ones first, until spans fit or none is left."""
        while num_rows <= self.max_rows and num_rows + work.num_context_rows > self.room:
            later = self._later(work.request)
            if not later:
                return
            self.drop(later[-1].request)

    def _later(self, request: Request) -> list[Work]:
        return [w for w in self.works.values() if w.request.order > request.order and not w.spans]

    def add(self, work: Work) -> None:
        self.works[work.request] = work
        self.room -= work.num_context_rows
        self.has_spans |= work.has_span_rows

    def add_spans(self, request: Request, spans: list[Span]) -> None:
        self.works.setdefault(request, Work(request)).spans += spans
        self.room -= count_rows(spans)
        self.has_spans = True

    def drop(self, request: Request) -> None:
        work = self.works.pop(request, None)
        if work is not None:
            self.room += work.num_rows

    def context_end(self, request: Request) -> int:
        """How far the request's context is computed after this forward."""
        work = self.works.get(request)
        if work is None or not work.context:
            return request.computed
        return work.context[-1][1] - work.num_drafts


def _order(request: Request) -> tuple[int, int]:
    return request.order
