"""``pdiff generate``: an answer as it comes into being, as plain text, or as JSON."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from pdiff_runtime.engine import (
    LLM,
    Event,
    Finished,
    GenerationParams,
    PlanReady,
    RequestOutput,
    SpanUpdate,
)
from pdiff_runtime.engine.params import UserRound
from pdiff_runtime.plan import ControlTokens
from pdiff_runtime.plan.visible import visible_parts
from pdiff_runtime.serve.live import LiveRound
from pdiff_runtime.serve.options import SPINNER


def parse_plan(text: str) -> list[UserRound]:
    """A user's plan in JSON: ``[[topic, length], ...]``, or a list of such rounds.

    Raises:
        ValueError: It is not that.
    """
    try:
        rounds = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"plan: not valid JSON ({error})") from error
    if _is_round(rounds):
        rounds = [rounds]
    if not (isinstance(rounds, list) and rounds and all(map(_is_round, rounds))):
        raise ValueError(
            'plan: expected [["topic", length], ...] or a list of such rounds, '
            f"got {json.dumps(rounds)}"
        )
    return rounds


def _is_round(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(e, list) and len(e) == 2 and isinstance(e[0], str) for e in value)
    )


def num_forwards_ar(output: RequestOutput, tags: ControlTokens) -> int:
    """Forwards that mode "ar" would need for the same visible tokens and the end of the text."""
    return sum(map(len, visible_parts(output.token_ids, tags))) + 1


def as_json(output: RequestOutput, prompt: str, tags: ControlTokens) -> str:
    """One line with all there is to know about an answer."""
    rounds = [dataclasses.asdict(plan_round) for plan_round in output.rounds]
    for plan_round in rounds:
        del plan_round["history"]
    usage = dataclasses.asdict(output.usage)
    seconds = usage.pop("seconds")
    usage["num_forwards_ar"] = num_forwards_ar(output, tags)
    fields = {
        "prompt": prompt,
        "text": output.text,
        "finish_reason": output.finish_reason,
        "rounds": rounds,
        "usage": usage,
        "seconds": round(seconds, 6),
        "token_ids": output.token_ids,
    }
    if output.error is not None:
        fields["error"] = str(output.error)
    return json.dumps(fields, ensure_ascii=False)


def summary(output: RequestOutput, tags: ControlTokens, seconds: float) -> str:
    """What the answer cost, beside what it would cost token by token."""
    num_forwards = output.usage.num_forwards
    num_denoise = sum(plan_round.num_steps for plan_round in output.rounds)
    num_plan = num_forwards - num_denoise
    if num_denoise and num_plan:
        text = f"{num_plan} plan + {num_denoise} denoise = {num_forwards} forwards"
    elif num_denoise:
        text = f"{num_denoise} denoising forwards"
    else:
        text = f"{num_forwards} forwards, one token each" if num_forwards > 1 else "1 forward"
    text += f" in {seconds:.2f} s"
    if num_denoise:
        text += f"; autoregressive would need {num_forwards_ar(output, tags)} forwards"
    return text


def complaint(output: RequestOutput, max_tokens: int) -> str | None:
    """What the user should know about how the answer ended."""
    if output.finish_reason == "length":
        return f"cut: the answer needs more than max_tokens={max_tokens}"
    if output.finish_reason != "stop":
        return f"{output.finish_reason}: {output.error}"
    return None


def watch(
    llm: LLM, prompt: str, params: GenerationParams, console: Console, *, pace: float
) -> RequestOutput:
    """Answer one prompt on a terminal.

    Args:
        pace: Least time in seconds that a denoising step stays on the screen; it is not part of
            the time reported.
    """
    shown = (PlanReady, SpanUpdate, Finished)
    clock = Stopwatch(e for e in llm.stream(prompt, params) if isinstance(e, shown))
    with console.status("writing" if params.mode == "ar" else "planning", spinner=SPINNER):
        event = next(clock)
    while isinstance(event, PlanReady):
        event = _watch_round(llm, event, clock, console, pace)
    assert isinstance(event, Finished)
    output = event.output
    console.print()
    console.print(Text(output.text))
    console.print()
    if (note := complaint(output, params.max_tokens)) is not None:
        console.print(Text(note, style="yellow"))
    console.print(Text(summary(output, llm.tags, clock.seconds), style="dim"))
    return output


def _watch_round(
    llm: LLM, plan: PlanReady, clock: Stopwatch, console: Console, pace: float
) -> Event:
    """Show a plan and its spans until another kind of event comes; that one is returned."""
    if plan.topics:
        lengths = [str(hi - lo) for lo, hi in plan.bounds]
        lengths += ["cut"] * (len(plan.topics) - len(lengths))
        topics = [
            Text.assemble((topic, "bold"), (f" {length}", "dim"))
            for topic, length in zip(plan.topics, lengths, strict=True)
        ]
        console.print(Text.assemble(("plan  ", "dim"), Text(", ").join(topics)))
    assert llm.tokenizer is not None
    view = LiveRound(plan, llm.tokenizer.decode, llm.tags.pad, console)
    with Live(view, console=console, auto_refresh=False) as live:
        while True:
            shown = time.perf_counter()
            event = next(clock)
            if not isinstance(event, SpanUpdate):
                view.finish()
                live.refresh()
                return event
            view.update(event)
            time.sleep(max(0.0, shown + pace - time.perf_counter()))
            live.refresh()


class Stopwatch(Iterator[Event]):
    """Events, and the seconds spent waiting for them."""

    def __init__(self, events: Iterator[Event]) -> None:
        self.events = events
        self.seconds = 0.0

    def __next__(self) -> Event:
        started = time.perf_counter()
        try:
            return next(self.events)
        finally:
            self.seconds += time.perf_counter() - started
