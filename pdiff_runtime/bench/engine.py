"""Whole answers: how long they take alone, and how many come in a second together."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
import unittest.mock
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ParamSpec, TypeVar

from pdiff_runtime import LLM, ops
from pdiff_runtime.engine import (
    Engine,
    Finished,
    GenerationParams,
    PlanReady,
    RequestOutput,
    SpanDone,
)

P = ParamSpec("P")
R = TypeVar("R")


@dataclasses.dataclass
class Served:
    """Requests that were submitted at one moment and answered together.

    Attributes:
        seconds: From then to the last answer.
        outputs: In the order of the prompts.
        to_plan, to_span, to_end: Seconds from then to each request's first plan, first full span,
            and end; requests without such a moment are left out.
        step_ms: Of each step.
        scheduling: Share of the steps' time outside the forward: choosing, paging, keeping books.
        overhead: That, and what a forward spends outside the model, its logits and ``unmask_``:
            building tensors, reading results.
    """

    seconds: float = 0.0
    outputs: list[RequestOutput] = dataclasses.field(default_factory=list)
    to_plan: list[float] = dataclasses.field(default_factory=list)
    to_span: list[float] = dataclasses.field(default_factory=list)
    to_end: list[float] = dataclasses.field(default_factory=list)
    step_ms: list[float] = dataclasses.field(default_factory=list)
    scheduling: float = 0.0
    overhead: float = 0.0

    @property
    def num_tokens(self) -> int:
        """Tokens written, control tokens of spans and pads included."""
        return sum(len(output.token_ids) for output in self.outputs)

    def record(self) -> dict[str, Any]:
        """Its numbers as JSON."""
        usages = [output.usage for output in self.outputs]
        return {
            "num_requests": len(self.outputs),
            "seconds": round(self.seconds, 4),
            "requests_per_s": round(len(self.outputs) / self.seconds, 3),
            "tokens_per_s": round(self.num_tokens / self.seconds, 1),
            "ms_to_plan": _median_ms(self.to_plan),
            "ms_to_span": _median_ms(self.to_span),
            "ms_to_end": _median_ms(self.to_end),
            "critical_path": statistics.mean(usage.critical_path for usage in usages),
            "num_steps": len(self.step_ms),
            "step_ms": round(statistics.median(self.step_ms), 3),
            "scheduling": round(self.scheduling, 4),
            "overhead": round(self.overhead, 4),
        }


def serve(llm: LLM, prompts: Sequence[Sequence[int]], params: Sequence[GenerationParams]) -> Served:
    """Submit all prompts now, and step until the last one is answered."""
    engine, served = llm.engine, Served()
    outputs: dict[str, RequestOutput] = {}
    llm.acquire()
    try:
        with _inner_time(engine) as (forward, inner):
            start = time.perf_counter()
            ids = [
                engine.add(f"bench-{idx}", *each)[0]
                for idx, each in enumerate(zip(prompts, params, strict=True))
            ]
            planned, filled = set(), set()
            while engine.has_work:
                before = time.perf_counter()
                events = engine.step()
                now = time.perf_counter()
                served.step_ms.append(1e3 * (now - before))
                for event in events:
                    if isinstance(event, PlanReady) and event.request_id not in planned:
                        planned.add(event.request_id)
                        served.to_plan.append(now - start)
                    elif isinstance(event, SpanDone) and event.request_id not in filled:
                        filled.add(event.request_id)
                        served.to_span.append(now - start)
                    elif isinstance(event, Finished):
                        outputs[event.request_id] = event.output
                        served.to_end.append(now - start)
            served.seconds = time.perf_counter() - start
    finally:
        engine.forget_all()
        llm.release()
    served.outputs = [outputs[request_id] for request_id in ids]
    total = sum(served.step_ms) / 1e3
    served.scheduling = 1.0 - forward.seconds / total
    served.overhead = 1.0 - inner.seconds / total
    return served


def one_by_one(
    llm: LLM, prompts: Sequence[Sequence[int]], params: Sequence[GenerationParams]
) -> float:
    """Seconds to answer the prompts one after another."""
    return sum(serve(llm, [p], [q]).seconds for p, q in zip(prompts, params, strict=True))


HEADINGS = (
    ("at", "once", "num_requests", "d"),
    ("", "req/s", "requests_per_s", ".2f"),
    ("", "tok/s", "tokens_per_s", ".0f"),
    ("plan", "ms", "ms_to_plan", ".1f"),
    ("span", "ms", "ms_to_span", ".1f"),
    ("answer", "ms", "ms_to_end", ".1f"),
    ("", "path", "critical_path", ".1f"),
    ("", "steps", "num_steps", "d"),
    ("step", "ms", "step_ms", ".2f"),
    ("sched-", "uling", "scheduling", ".1%"),
    ("over-", "head", "overhead", ".1%"),
)
"""Columns of the tables: title in two lines, key of :meth:`Served.record`, format."""


def heading() -> list[str]:
    """The first two lines of a table, which fits a terminal."""
    tops, titles, _, _ = zip(*HEADINGS, strict=True)
    return [_in_columns(tops), _in_columns(titles)]


def line(record: dict[str, Any]) -> str:
    """A record as a line of the table."""
    fields = [(record[key], form) for *_, key, form in HEADINGS]
    return _in_columns(["-" if value is None else format(value, form) for value, form in fields])


def _in_columns(cells: Sequence[str]) -> str:
    return " ".join(f"{cell:>6}" for cell in cells)


class _Stopwatch:
    """Seconds spent inside the functions it wraps."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def of(self, function: Callable[P, R]) -> Callable[P, R]:
        def timed(*args: P.args, **kwargs: P.kwargs) -> R:
            before = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - before

        return timed


@contextlib.contextmanager
def _inner_time(engine: Engine) -> Iterator[tuple[_Stopwatch, _Stopwatch]]:
    """Time forwards, and in them the model, its logits and ``unmask_`` apart from all else."""
    forward, inner, runner, model = _Stopwatch(), _Stopwatch(), engine.runner, engine.runner.model
    with (
        unittest.mock.patch.object(runner, "run", forward.of(runner.run)),
        unittest.mock.patch.object(model, "forward", inner.of(model.forward)),
        unittest.mock.patch.object(model, "logits", inner.of(model.logits)),
        unittest.mock.patch.object(ops, "unmask_", inner.of(ops.unmask_)),
    ):
        yield forward, inner


def _median_ms(seconds: Sequence[float]) -> float | None:
    return round(1e3 * statistics.median(seconds), 3) if seconds else None
