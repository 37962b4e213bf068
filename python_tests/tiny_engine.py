"""Engines over small random models: readable tokens, user plans, dirty pages, checked books."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from pdiff_runtime import ControlTokens, Decoder, EngineConfig, GenerationParams
from pdiff_runtime.engine import Engine, Event, Finished, RequestOutput
from pdiff_runtime.engine.request import Request, Work

MAX_STEPS = 20_000
GARBAGE = 7.0
"""What lies in a page before its first rows: large enough to show, and no NaN, which masked keys
may not be either."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One request; ``rounds`` are the token ids of a user's plan."""

    prompt: Sequence[int]
    params: GenerationParams
    rounds: Sequence[Sequence[int]] = ()


class DirtyAllocator:
    """Hands out pages full of garbage, as a cache that is in use for long would.

    Attributes:
        peak: Most pages that were held at once.
    """

    def __init__(self, engine: Engine, garbage: float) -> None:
        self._engine, self._allocator = engine, engine.allocator
        self._garbage = garbage
        self.peak = 0

    def __getattr__(self, name: str) -> object:
        return getattr(self._allocator, name)

    def allocate(self, count: int) -> list[int]:
        pages = self._allocator.allocate(count)
        cache = self._engine.runner.cache
        for tensor in (*cache.k, *cache.v):
            tensor[pages] = self._garbage
        self.peak = max(self.peak, self._allocator.num_pages - self._allocator.num_free)
        return pages


def letters(token_ids: Sequence[int]) -> str:
    """One character per token: a to z, A to Z, then Greek."""
    alphabet = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    return "".join(alphabet[i] if i < 52 else chr(0x3B1 + i - 52) for i in token_ids)


def make_engine(
    model: Decoder, tags: ControlTokens, *, garbage: float = GARBAGE, **config: object
) -> Engine:
    """An engine with pages of 16 tokens, all of them dirty, that decodes to :func:`letters`."""
    config = {"page_size": 16, "kv_cache_tokens": 8192, **config}
    engine = Engine(model, tags, EngineConfig(**config), letters)
    engine.allocator = engine.scheduler.allocator = DirtyAllocator(engine, garbage)
    return engine


def user_plan(tags: ControlTokens, *rounds: Sequence[int]) -> list[list[int]]:
    """Rounds of a plan, each a list of its topics' numbers; topic i is called by token i + 1."""
    plan = []
    for numbers in rounds:
        tokens: list[int] = []
        for idx, number in enumerate(numbers):
            digits = [tags.digits[int(digit)] for digit in str(number)]
            tokens += [tags.topic_start, idx + 1, *digits, tags.topic_end]
        plan.append([*tokens, tags.sync])
    plan[-1][-1] = tags.eos
    return plan


def request_of(engine: Engine, request_id: str) -> Request:
    """A request that waits or runs."""
    scheduler = engine.scheduler
    return next(r for r in (*scheduler.waiting, *scheduler.running) if r.request_id == request_id)


def preempt(engine: Engine, request_id: str) -> None:
    """Take a running request's pages, as the scheduler does when they are short."""
    request = request_of(engine, request_id)
    engine.scheduler.remove([request])
    request.preempt()
    engine.scheduler.add(request)


def step(engine: Engine) -> list[Event]:
    """One step, and the books are right after it."""
    events = engine.step()
    engine.check_integrity()
    return events


def drain(engine: Engine) -> dict[str, RequestOutput]:
    """Step until nobody is left; every page is free then."""
    outputs: dict[str, RequestOutput] = {}
    for _ in range(MAX_STEPS):
        if not engine.has_work:
            break
        outputs |= finished(step(engine))
    assert not engine.has_work, "the engine does not get on"
    assert engine.allocator.num_free == engine.allocator.num_pages
    return outputs


def finished(events: Iterable[Event]) -> dict[str, RequestOutput]:
    """The outputs among events."""
    return {event.request_id: event.output for event in events if isinstance(event, Finished)}


def answer(engine: Engine, cases: Sequence[Case]) -> list[RequestOutput]:
    """All cases together, in their order."""
    for idx, case in enumerate(cases):
        engine.add(str(idx), case.prompt, case.params, case.rounds)
    outputs = drain(engine)
    return [outputs[str(idx)] for idx in range(len(cases))]


def answer_alone(model: Decoder, tags: ControlTokens, cases: Sequence[Case], **config: object
                 ) -> list[RequestOutput]:  # fmt: skip
    """Each case in an engine of its own."""
    return [answer(make_engine(model, tags, **config), [case])[0] for case in cases]


class WorkLog:
    """Records what every forward of an engine did.

    Attributes:
        forwards: Per forward, ``request_id -> work``; works are as they were scheduled.
    """

    def __init__(self, engine: Engine, monkeypatch: object) -> None:
        self.forwards: list[dict[str, Work]] = []
        run = engine.runner.run

        def logged(works: Sequence[Work]) -> object:
            copies = [dataclasses.replace(w, context=[*w.context], spans=[*w.spans]) for w in works]
            self.forwards.append({work.request.request_id: work for work in copies})
            return run(works)

        monkeypatch.setattr(engine.runner, "run", logged)
