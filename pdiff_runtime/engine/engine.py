"""The engine: holds requests and moves all of them one forward at a time."""

from __future__ import annotations

import dataclasses
import itertools
import numbers
import time
from collections.abc import Collection, Sequence

import torch

from pdiff_runtime.cache import KVCache, PageAllocator
from pdiff_runtime.engine.denoise_loop import DenoiseLoop, Launched, OpenSpan
from pdiff_runtime.engine.errors import (
    BadLogitsError,
    DuplicateRequestError,
    OutOfMemoryError,
    OverloadedError,
    RequestTooLongError,
)
from pdiff_runtime.engine.graphs import Graphs
from pdiff_runtime.engine.output import (
    Event,
    Finished,
    FinishReason,
    PlanReady,
    RequestOutput,
    Round,
    SpanDone,
    SpanUpdate,
    Text,
)
from pdiff_runtime.engine.params import (
    MAX_SEED,
    ONE_SPAN_MODES,
    PLAN_MODES,
    EngineConfig,
    GenerationParams,
    Mode,
)
from pdiff_runtime.engine.reader import Decode
from pdiff_runtime.engine.request import Limits, PlanRound, Request, Work
from pdiff_runtime.engine.runner import Predicted, Runner
from pdiff_runtime.engine.scheduler import Scheduler
from pdiff_runtime.engine.span import SpanKind
from pdiff_runtime.models.decoder import Decoder, Project, project_at_once
from pdiff_runtime.models.joined_weights import JoinedWeights
from pdiff_runtime.models.packed_weights import PackedWeights
from pdiff_runtime.models.row_tiles import RowTiles
from pdiff_runtime.plan import (
    PLAN_TAGS,
    ControlTokens,
    PlanError,
    PlanGrammar,
    parse_plan,
    visible_text,
)
from pdiff_runtime.plan.control_tokens import MISSING


class Engine:
    """Runs any number of requests over one model.

    Requests may come and go between any two steps. Nothing here is safe to call from two threads
    at once; :class:`~pdiff_runtime.engine.AsyncEngine` is.

    Args:
        model: The decoder, in the dtype it shall run in.
        tags: Its control tokens.
        config: Sizes.
        decode: Token ids to text, for the visible text of outputs.
        banned_ids: Ids beside the control tokens that may never be written, such as other special
            tokens and rows of the embedding beyond the tokenizer's vocabulary.

    Attributes:
        allocator: Of the KV cache's pages; all of them are free when no request is there.
        num_steps: Forwards so far.
    """

    def __init__(
        self,
        model: Decoder,
        tags: ControlTokens,
        config: EngineConfig,
        decode: Decode,
        banned_ids: Sequence[int] = (),
    ) -> None:
        self.model, self.tags, self.config, self.decode = model, tags, config, decode
        shape = model.config
        num_pages = -(-config.kv_cache_tokens // config.page_size)
        self.allocator = PageAllocator(num_pages)
        grammar = None
        if tags.has_plan:
            grammar = PlanGrammar(
                tags,
                shape.vocab_size,
                max_topic_tokens=config.max_topic_tokens,
                max_topics=config.max_topics,
                banned_ids=tuple(banned_ids),
            )
        self.limits = Limits(
            tags, grammar, shape.length_unit, config.draft_plan, config.page_size,
            max_len=min(shape.max_position, num_pages * config.page_size),
            full_attention=shape.full_attention, logits_shift=shape.logits_shift,
        )  # fmt: skip
        plan_masks = torch.empty(0, shape.vocab_size, dtype=torch.bool, device="cpu")
        ar_mask = torch.ones(shape.vocab_size, dtype=torch.bool, device="cpu")
        ar_mask[_ids({*tags.control_ids, *banned_ids} - {tags.eos})] = False
        in_span = {*tags.banned_in_span, *banned_ids} - {tags.pad}
        weight = model.model.embed_tokens.weight
        self.runner = Runner(
            model,
            KVCache(
                num_layers=shape.num_layers, num_pages=num_pages, page_size=config.page_size,
                num_heads_kv=shape.num_heads_kv, head_dim=shape.head_dim, dtype=weight.dtype,
                device=weight.device,
            ),
            banned={
                SpanKind.TAGGED: _ids(in_span),
                SpanKind.CANVAS: _ids(in_span - {tags.eos}),
                SpanKind.PUBLISHED: _ids(()),
            },
            plan_masks=plan_masks if grammar is None else grammar.masks,
            ar_mask=ar_mask,
            max_logits_rows=config.max_logits_rows,
            project=_project(config),
            split_keys=not config.batch_invariant,
            graphs=Graphs(weight.device) if weight.is_cuda and config.cuda_graphs else None,
        )  # fmt: skip
        self.scheduler = Scheduler(config, self.allocator)
        self._loop: DenoiseLoop | None = None
        if weight.is_cuda if config.run_ahead is None else config.run_ahead:
            self._loop = DenoiseLoop(self.runner, tags.mask)
        self._ahead: _Ahead | None = None
        self.num_steps = 0
        self._requests: dict[str, Request] = {}
        self._events: list[Event] = []  # that nobody was told yet
        self._num_arrived = 0

    # --- what callers do ---

    def add(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        params: GenerationParams,
        user_rounds: Sequence[Sequence[int]] = (),
        *,
        priority: int = 0,
        timeout_s: float | None = None,
        with_text: bool = False,
    ) -> list[str]:
        """Queue a request.

        Args:
            request_id: Unlike that of any request the engine holds.
            prompt_ids: Token ids, control tokens excluded.
            params: How to answer.
            user_rounds: Token ids of each round's plan, sync or eos included, to denoise only.
            priority: Requests with smaller numbers are served first.
            timeout_s: Seconds after which it ends with what it has, and "deadline".
            with_text: Whether :class:`Text` events are wanted.

        Returns:
            The ids its events carry: its own, or ``id/0``, ``id/1``, ... with ``params.n > 1``.

        Raises:
            ValueError: Bad ids, or a request that could never fit; nothing was queued.
            OverloadedError: ``max_waiting`` requests wait already.
        """
        self.check(prompt_ids, params, user_rounds, priority=priority, timeout_s=timeout_s)
        ids = [request_id]
        if params.n > 1:
            ids = [f"{request_id}/{idx}" for idx in range(params.n)]
        for each in (request_id, *ids):
            if each in self._requests:
                raise DuplicateRequestError(f"request_id: {each!r} is already there")
        if not self.has_room(len(ids)):
            raise OverloadedError(f"max_waiting: {self.config.max_waiting} requests wait already")
        now = time.perf_counter()
        seed = params.resolve_seed()
        requests: list[Request] = []
        for idx, each in enumerate(ids):
            request = Request(
                each, prompt_ids, params, self.limits, self.allocator, user_rounds,
                seed=(seed + idx) % (MAX_SEED + 1),
                priority=priority,
                arrival=self._num_arrived + idx,
                deadline=None if timeout_s is None else now + timeout_s,
                leader=requests[0] if requests and self.config.prefix_cache else None,
                decode=self.decode,
                with_text=with_text,
            )  # fmt: skip
            requests.append(request)
        self._num_arrived += len(requests)
        for request in requests:
            self._requests[request.request_id] = request
            if not request.is_done:  # a budget without room for the plan
                self.scheduler.add(request)
        return ids

    def check(
        self,
        prompt_ids: Sequence[int],
        params: GenerationParams,
        user_rounds: Sequence[Sequence[int]] = (),
        *,
        priority: int = 0,
        timeout_s: float | None = None,
    ) -> None:
        """Raise the ``ValueError`` that :meth:`add` would; safe from any thread."""
        self._check_mode(params.mode)
        self._check_prompt(prompt_ids, may_plan=params.compat == "published")
        self._check_plan(user_rounds)
        if not isinstance(priority, int) or isinstance(priority, bool) or abs(priority) >= 1 << 31:
            raise ValueError(f"priority: expected a 32-bit integer, got {priority!r}")
        if timeout_s is not None and not (
            isinstance(timeout_s, int | float)
            and not isinstance(timeout_s, bool)
            and 0 < timeout_s < float("inf")
        ):
            raise ValueError(f"timeout_s: expected a number above 0, got {timeout_s!r}")
        if user_rounds and params.mode not in PLAN_MODES:
            raise ValueError(f"plan: expected a mode with plans, got {params.mode!r}")
        plan_tokens = sum(map(len, user_rounds)) - 1 if user_rounds else 0
        if plan_tokens > params.max_tokens:
            raise ValueError(
                f"max_tokens: the plan alone has {plan_tokens} tokens, got {params.max_tokens}"
            )
        longest = len(prompt_ids) + params.max_tokens
        for limit, name in (
            (self.model.config.max_position, "the model's positions"),
            (self.allocator.num_pages * self.config.page_size, "kv_cache_tokens"),
        ):
            if longest > limit:
                raise RequestTooLongError(
                    f"max_tokens: a prompt of {len(prompt_ids)} and max_tokens="
                    f"{params.max_tokens} need {longest} tokens, {name} hold {limit}"
                )

    def abort(self, request_ids: Sequence[str]) -> list[Event]:
        """End requests, waiting or running, with what they have; unknown ids are fine."""
        for request_id in dict.fromkeys(request_ids):
            if request_id in self._requests:
                self._end(self._requests[request_id], "abort")
        return self._take_events()

    def forget_all(self) -> None:
        """Drop all requests without a word; nothing of a caller's runs, so nothing is raised."""
        self.scheduler.remove(self._requests.values())
        for request in self._requests.values():
            request.pages.release()
        self._requests.clear()
        self._events.clear()
        self._ahead = None

    def has_room(self, num_requests: int) -> bool:
        """Whether the queue takes so many more requests; into an empty one any number goes."""
        num_waiting = len(self.scheduler.waiting)
        return num_waiting == 0 or num_waiting + num_requests <= self.config.max_waiting

    @property
    def request_ids(self) -> list[str]:
        """Of all requests that wait or run."""
        return list(self._requests)

    @property
    def has_work(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self._requests)

    @torch.inference_mode()  # buffers that stay are written in every step, whoever calls
    def step(self) -> list[Event]:
        """Admit what fits, forward once outside any autocast, and say what happened.

        Where it raises, because of the caller's ``decode`` for one, the request that it was about
        can only be ended; the others go on, and what has happened comes with the next events.
        """
        device = self.runner.device.type
        with self.runner.on_device(), torch.autocast(device, enabled=False):
            try:
                self._step()
            except BaseException:
                self._ahead = None  # of a step whose results not all requests have
                raise
        return self._take_events()

    def _take_events(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def _step(self) -> None:
        now = time.perf_counter()
        for request in [r for r in self._requests.values() if r.is_done or r.is_late(now)]:
            self._end(request, "deadline")
        works = self.scheduler.schedule() if self._ahead is None else self._ahead.works
        if not works:
            return
        self.num_steps += 1
        if self._ahead is None:
            results = self._forward(works)
        else:
            results = [result for result in self._ahead_results() if _is_news(result[0])]
        for work, predicted in results:
            self._advance(work, predicted)
            work.request.clock()
        for work in works:
            request = work.request
            if request.is_done and self._requests.get(request.request_id) is request:
                self._end(request)

    def check_integrity(self) -> None:
        """Raise ``RuntimeError`` if the books of pages and requests disagree. For tests."""
        self.allocator.check_integrity()
        held = [page for r in self._requests.values() for page in r.pages.held()]
        num_held = self.allocator.num_pages - self.allocator.num_free
        if len(set(held)) != num_held:
            raise RuntimeError(f"pages: {num_held} are held, requests know of {len(set(held))}")
        for page in set(held):
            if self.allocator.reference_count(page) != held.count(page):
                raise RuntimeError(f"page {page}: reference count and holders differ")
        queued = [r.request_id for r in (*self.scheduler.waiting, *self.scheduler.running)]
        if sorted(queued) != sorted(r.request_id for r in self._requests.values() if not r.is_done):
            raise RuntimeError("requests: the scheduler's and the engine's differ")
        for request in self.scheduler.waiting:
            if request.pages.num_pages or request.computed:
                raise RuntimeError(f"{request.request_id}: waits with pages")

    # --- one step ---

    def _ahead_results(self) -> list[tuple[Work, Predicted]]:
        """Results of the step under way; before they are read, the next one is launched if it may.

        It may if the scheduler could only choose the same rows again.
        """
        assert self._ahead is not None
        assert self._loop is not None
        ahead, self._ahead = self._ahead, None
        works, scheduler = ahead.works, self.scheduler
        is_same = (
            not scheduler.waiting
            and scheduler.running == [work.request for work in works]
            and all(w.spans == list(itertools.chain(*w.request.span_groups())) for w in works)
        )
        if is_same and self._loop.may_run_ahead(ahead.spans):
            spans = [span.after_step() for span in ahead.spans]
            try:
                self._ahead = _Ahead(works, spans, self._loop.launch(spans))
            except (RuntimeError, MemoryError) as error:
                if not _is_out_of_memory(error):
                    raise
        return list(zip(works, ahead.launched.result(len(works)), strict=True))

    def _forward(self, works: list[Work]) -> list[tuple[Work, Predicted]]:
        """Run the forward; where memory is short in halves, where it still is without the worst."""
        for request in [work.request for work in works if work.request.is_pinned]:
            # As published, the tags of an empty span are never forwarded, yet they are read.
            if dirty := request.pages.take_dirty():
                self.runner.cache.clear(dirty)
        try:
            if self._loop is not None and self._loop.takes(works):
                spans = self._loop.start(works)
                self._ahead = _Ahead(works, spans, self._loop.launch(spans))
                return self._ahead_results()
            return list(zip(works, self.runner.run(works), strict=True))
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            self._ahead = None
        done: list[tuple[Work, Predicted]] = []
        middle = (len(works) + 1) // 2
        for half in (works[:middle], works[middle:]):
            try:
                done += zip(half, self.runner.run(half) if half else [], strict=True)
            except (RuntimeError, MemoryError) as error:
                if not _is_out_of_memory(error):
                    raise
                # The others of the half are as they were before the step, and try again.
                largest = max(half, key=lambda work: work.num_rows)
                failure = OutOfMemoryError(f"a forward of {largest.num_rows} rows: {error}")
                largest.request.fail(failure)
        return done

    def _advance(self, work: Work, predicted: Predicted) -> None:
        request = work.request
        request.forwarded(work)
        if predicted.is_nan:
            # Its pages may hold what is no number; nobody else shall ever read that.
            self.runner.cache.clear(request.pages.private())
            request.fail(BadLogitsError("the model's logits are not numbers"))
            return
        self._announce(request)
        if work.spans:
            self._denoised(work, predicted)
        elif predicted.token_ids:
            request.accept_tokens(predicted.token_ids, predicted.logprobs)
        self._announce(request)
        self._tell(request)
        has_logits = bool(work.spans or predicted.token_ids)
        if self.config.prefix_cache and has_logits and not request.is_done:
            request.publish()  # all that was computed, these logits have read

    def _denoised(self, work: Work, predicted: Predicted) -> None:
        request, plan_round = work.request, work.request.open_round
        writes = [*predicted.writes, *request.implied_writes(work.spans, predicted.writes)]
        round_idx = len(request.rounds) - 1
        positions, token_ids = [w.position for w in writes], [w.token_id for w in writes]
        update = SpanUpdate(request.request_id, plan_round.num_steps, positions, token_ids)
        self._events.append(update)
        for span_idx in request.accept_denoised(work.spans, writes):
            if span_idx >= len(plan_round.spans):
                return  # a stop string has cancelled it
            content = request.token_ids[slice(*plan_round.spans[span_idx].content)]
            text = visible_text(content, self.tags, self.decode)
            self._events.append(SpanDone(request.request_id, round_idx, span_idx, text))

    def _announce(self, request: Request) -> None:
        """Say so if the request has come to the spans of a round."""
        while request.num_announced < len(request.rounds):
            plan_round = request.rounds[request.num_announced]
            topics = [self._words(topic.token_ids) for topic in plan_round.topics]
            bounds = [span.content for span in plan_round.spans]
            self._events.append(
                PlanReady(request.request_id, request.num_announced, topics, bounds)
            )
            for span_idx, (lo, hi) in enumerate(bounds):
                if lo == hi:  # a small length_scale
                    done = SpanDone(request.request_id, request.num_announced, span_idx, "")
                    self._events.append(done)
            request.num_announced += 1

    def _tell(self, request: Request) -> None:
        """Say what has become readable."""
        if not request.with_text or request.reader is None:
            return
        if text := request.reader.take(is_last=request.is_done):
            self._events.append(Text(request.request_id, text))

    def _end(self, request: Request, reason: FinishReason | None = None) -> None:
        """Forget a request that is done, or that ends now for a reason from outside."""
        self.scheduler.remove([request])
        del self._requests[request.request_id]
        if reason is not None and not request.is_done:
            request.cut()
            request.finish(reason)
        self._announce(request)
        self._tell(request)
        self._events.append(Finished(request.request_id, self._output(request)))

    def _output(self, request: Request) -> RequestOutput:
        assert request.finish_reason is not None
        answer = request.token_ids[request.prompt_len :]
        text = visible_text(answer, self.tags, self.decode)
        if request.reader is not None and request.reader.is_stopped:
            text = request.reader.text
        logprobs = None
        if request.params.logprobs:
            positions = range(request.prompt_len, len(request.token_ids))
            logprobs = [request.logprobs.get(position) for position in positions]
        return RequestOutput(
            request_id=request.request_id,
            token_ids=answer,
            text=text,
            rounds=[self._round(request, plan_round) for plan_round in request.rounds],
            finish_reason=request.finish_reason,
            usage=request.usage,
            error=request.error,
            logprobs=logprobs,
        )

    def _round(self, request: Request, plan_round: PlanRound) -> Round:
        contents = [request.token_ids[slice(*span.content)] for span in plan_round.spans]
        return Round(
            topics=[self._words(topic.token_ids) for topic in plan_round.topics],
            lengths=[len(content) for content in contents],
            spans=[visible_text(content, self.tags, self.decode) for content in contents],
            num_steps=plan_round.num_steps,
            history=plan_round.history,
        )

    def _words(self, token_ids: Sequence[int]) -> str:
        return self.decode(token_ids).strip()

    # --- what callers may ask for ---

    def _check_mode(self, mode: Mode) -> None:
        """Whether the model's tokens and logits are such that it can answer in a mode."""
        shape, tags = self.model.config, self.tags
        lacks = None
        if mode not in ONE_SPAN_MODES and shape.logits_shift != 1:
            lacks = "logits that predict the next token"
        elif mode in PLAN_MODES and not tags.has_plan:
            lacks = f"the control tokens of plans ({', '.join(PLAN_TAGS)})"
        elif mode in ONE_SPAN_MODES and tags.mask == MISSING:
            lacks = "a mask token"
        elif mode in ONE_SPAN_MODES and not (shape.full_attention or tags.has_plan):
            lacks = "the tags of spans"
        if lacks is not None:
            raise ValueError(f"mode: {mode!r} needs {lacks}, which this model does not have")

    def _check_prompt(self, prompt_ids: Sequence[int], *, may_plan: bool) -> None:
        if len(prompt_ids) == 0:
            raise ValueError("prompt: expected at least one token, got none")
        self._check_ids("prompt", prompt_ids)
        # Earlier replies of a conversation end in eos, and prompts may be padded.
        control = self.tags.control_ids - {self.tags.pad, self.tags.eos}
        if may_plan:
            control = frozenset()
        for position, token_id in enumerate(prompt_ids):
            if token_id in control:
                raise ValueError(
                    f"prompt: control token {token_id} at position {position}, "
                    "which only the model may write"
                )

    def _check_plan(self, user_rounds: Sequence[Sequence[int]]) -> None:
        self._check_ids("plan", [token_id for plan in user_rounds for token_id in plan])
        for round_idx, plan in enumerate(user_rounds):
            try:
                topics = parse_plan(plan, self.tags)
            except PlanError as error:
                raise ValueError(f"plan: round {round_idx + 1}: {error}") from error
            if not topics:
                raise ValueError(f"plan: round {round_idx + 1}: expected a topic, got none")
            is_last = round_idx + 1 == len(user_rounds)
            if plan[-1] != self.tags.sync and not (is_last and plan[-1] == self.tags.eos):
                expected = "sync or eos" if is_last else "sync"
                raise ValueError(f"plan: round {round_idx + 1}: expected {expected} at its end")

    def _check_ids(self, name: str, token_ids: Sequence[int]) -> None:
        vocab_size = self.model.config.vocab_size
        for position, token_id in enumerate(token_ids):
            is_integer = type(token_id) is int or isinstance(token_id, numbers.Integral)
            if not (is_integer and 0 <= token_id < vocab_size):
                raise ValueError(
                    f"{name}: expected ids from 0 to {vocab_size - 1}, "
                    f"got {token_id!r} at position {position}"
                )


@dataclasses.dataclass(frozen=True)
class _Ahead:
    """A denoising step under way, and what was known of its spans when it was launched."""

    works: list[Work]
    spans: list[OpenSpan]
    launched: Launched


def _ids(token_ids: Collection[int]) -> torch.Tensor:
    return torch.tensor(sorted(token_ids), dtype=torch.int64, device="cpu")


def _is_news(work: Work) -> bool:
    """Whether a step that was launched ahead still matters: it may have had nothing left to do."""
    return not work.request.is_done and any(span.masked for span in work.spans)


def _project(config: EngineConfig) -> Project:
    """How the matrices are applied."""
    project: Project = project_at_once
    if config.pack_weights:
        project = JoinedWeights()
        if PackedWeights.is_available():
            project = PackedWeights(otherwise=project)
    return RowTiles(project) if config.batch_invariant else project


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host had no memory left; the host's allocator has no type for it."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return "can't allocate memory" in str(error) or "not enough memory" in str(error)
