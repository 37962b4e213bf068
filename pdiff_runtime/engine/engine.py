"""The engine: admits requests and moves all of them one forward at a time."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Sequence

import torch

from pdiff_runtime.cache import KVCache, PageAllocator, PageTable
from pdiff_runtime.engine.output import (
    Event,
    Finished,
    PlanReady,
    RequestOutput,
    Round,
    SpanUpdate,
)
from pdiff_runtime.engine.params import EngineConfig, GenerationParams
from pdiff_runtime.engine.request import Limits, Phase, PlanRound, Request
from pdiff_runtime.engine.runner import Predicted, Runner
from pdiff_runtime.models.decoder import Decoder
from pdiff_runtime.plan import ControlTokens, PlanError, PlanGrammar, parse_plan, visible_text

Decode = Callable[[Sequence[int]], str]


class Engine:
    """Runs any number of requests over one model.

    Requests are admitted in the order they come, each when its longest possible course fits into
    the KV cache beside those that run.

    Args:
        model: The decoder, in the dtype it shall run in.
        tags: Its control tokens.
        config: Sizes.
        decode: Token ids to text, for the visible text of outputs.
        banned_ids: Ids beside the control tokens that may never be written, such as other special
            tokens and rows of the embedding beyond the tokenizer's vocabulary.
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
        grammar = PlanGrammar(
            tags,
            shape.vocab_size,
            max_topic_tokens=config.max_topic_tokens,
            max_topics=config.max_topics,
            banned_ids=tuple(banned_ids),
        )
        self.limits = Limits(tags, grammar, shape.length_unit, config.draft_plan)
        ar_mask = torch.ones(shape.vocab_size, dtype=torch.bool)
        ar_mask[[*(tags.control_ids - {tags.eos}), *banned_ids]] = False
        self.runner = Runner(
            model,
            KVCache(
                num_layers=shape.num_layers, num_pages=num_pages, page_size=config.page_size,
                num_heads_kv=shape.num_heads_kv, head_dim=shape.head_dim,
                dtype=model.model.embed_tokens.weight.dtype,
                device=model.model.embed_tokens.weight.device,
            ),
            banned_in_span=torch.tensor(sorted({*tags.banned_in_span, *banned_ids} - {tags.pad})),
            plan_masks=grammar.masks,
            ar_mask=ar_mask,
            max_logits_rows=config.max_logits_rows,
        )  # fmt: skip
        self.waiting: collections.deque[Request] = collections.deque()
        self.running: list[Request] = []
        self._reserved: dict[str, int] = {}
        self._started: dict[str, float] = {}

    def add(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        params: GenerationParams,
        user_rounds: Sequence[Sequence[int]] = (),
    ) -> None:
        """Queue a request.

        Args:
            request_id: Unlike that of any request the engine holds.
            prompt_ids: Token ids, control tokens excluded.
            params: How to answer.
            user_rounds: Token ids of each round's plan, sync or eos included, to denoise only.

        Raises:
            ValueError: Bad ids, or a request that could never fit; nothing was queued.
        """
        if any(request_id == r.request_id for r in (*self.waiting, *self.running)):
            raise ValueError(f"request_id: {request_id!r} is already there")
        self._check_prompt(prompt_ids)
        self._check_plan(user_rounds)
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
                raise ValueError(
                    f"max_tokens: a prompt of {len(prompt_ids)} and max_tokens="
                    f"{params.max_tokens} need {longest} tokens, {name} hold {limit}"
                )
        pages = PageTable(self.allocator, self.config.page_size)
        self.waiting.append(
            Request(request_id, prompt_ids, params, self.limits, pages, user_rounds)
        )

    def abort(self, request_ids: Sequence[str]) -> None:
        """Forget requests, waiting or running, and give their pages back; unknown ids are fine."""
        aborted = set(request_ids)
        for request in self.running:
            if request.request_id in aborted:
                request.pages.release()
                del self._reserved[request.request_id], self._started[request.request_id]
        self.running = [r for r in self.running if r.request_id not in aborted]
        self.waiting = collections.deque(r for r in self.waiting if r.request_id not in aborted)

    @property
    def has_work(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self.waiting or self.running)

    def step(self) -> list[Event]:
        """Admit what fits, forward once, and say what happened."""
        events: list[Event] = []
        self._admit(events)
        # A budget without room for a span ends a request before its first forward.
        works = [request.work() for request in self.running if request.phase is not Phase.DONE]
        if works:
            for work, predicted in zip(works, self.runner.run(works), strict=True):
                work.request.forwarded()
                self._advance(work.request, predicted, events)
        self._retire(events)
        return events

    def _check_prompt(self, prompt_ids: Sequence[int]) -> None:
        if len(prompt_ids) == 0:
            raise ValueError("prompt: expected at least one token, got none")
        self._check_ids("prompt", prompt_ids)
        # Earlier replies of a conversation end in eos, and prompts may be padded.
        control = self.tags.control_ids - {self.tags.pad, self.tags.eos}
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

    def _check_ids(self, name: str, token_ids: Sequence[int]) -> None:
        vocab_size = self.model.config.vocab_size
        for position, token_id in enumerate(token_ids):
            if not 0 <= token_id < vocab_size:
                raise ValueError(
                    f"{name}: expected ids from 0 to {vocab_size - 1}, "
                    f"got {token_id} at position {position}"
                )

    def _admit(self, events: list[Event]) -> None:
        while self.waiting and len(self.running) < self.config.max_requests:
            request = self.waiting[0]
            pages = -(-(request.prompt_len + request.remaining) // self.config.page_size)
            if sum(self._reserved.values()) + pages > self.allocator.num_pages:
                return
            self.waiting.popleft()
            self._reserved[request.request_id] = pages
            self._started[request.request_id] = time.perf_counter()
            request.start()
            self.running.append(request)
            self._announce(request, events)

    def _advance(self, request: Request, predicted: Predicted, events: list[Event]) -> None:
        if predicted.is_nan:
            request.finish("error", error="the model's logits are not numbers")
        elif request.phase is Phase.DENOISE:
            plan_round, num_rounds = request.rounds[-1], len(request.rounds)
            step_idx = plan_round.step_idx
            request.accept_denoised(predicted.writes)
            positions, token_ids = (list(column) for column in zip(*predicted.writes, strict=True))
            events.append(SpanUpdate(request.request_id, step_idx, positions, token_ids))
            if len(request.rounds) > num_rounds:  # a user's next round
                events.append(self._plan_ready(request))
        else:
            request.accept_tokens(predicted.token_ids)
            self._announce(request, events)

    def _retire(self, events: list[Event]) -> None:
        for request in [r for r in self.running if r.phase is Phase.DONE]:
            self.running.remove(request)
            del self._reserved[request.request_id]
            request.usage.seconds = time.perf_counter() - self._started.pop(request.request_id)
            events.append(Finished(request.request_id, self._output(request)))

    def _announce(self, request: Request, events: list[Event]) -> None:
        """Say so if the request has come to its spans."""
        if request.phase is Phase.DENOISE:
            events.append(self._plan_ready(request))

    def _plan_ready(self, request: Request) -> PlanReady:
        plan_round = request.rounds[-1]
        return PlanReady(
            request.request_id,
            len(request.rounds) - 1,
            [self._words(topic.token_ids) for topic in plan_round.topics],
            [span.content for span in plan_round.spans],
        )

    def _words(self, token_ids: Sequence[int]) -> str:
        return self.decode(token_ids).strip()

    def _output(self, request: Request) -> RequestOutput:
        assert request.finish_reason is not None
        answer = request.token_ids[request.prompt_len :]
        return RequestOutput(
            request_id=request.request_id,
            token_ids=answer,
            text=visible_text(answer, self.tags, self.decode),
            rounds=[self._round(request, plan_round) for plan_round in request.rounds],
            finish_reason=request.finish_reason,
            usage=request.usage,
            error=request.error,
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
