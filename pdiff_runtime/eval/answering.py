"""Answers to many prompts, a batch at a time; none is tried twice."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence

from pdiff_runtime.engine import LLM, GenerationError, GenerationParams, RequestOutput, Usage
from pdiff_runtime.engine.llm import Prompt
from pdiff_runtime.engine.progress import Bar


def answer(
    llm: LLM,
    prompts: Sequence[Prompt],
    params: Sequence[GenerationParams],
    *,
    batch: int = 1,
    progress: bool = False,
) -> tuple[list[RequestOutput], float]:
    """Answer prompts, ``batch`` of them at a time.

    Args:
        llm: The model.
        prompts: What to answer.
        params: One for each prompt, with ``n`` 1.
        batch: Prompts that are answered together; with 1 an answer's seconds are its latency.
        progress: Show a bar on stderr.

    Returns:
        One output for each prompt, and the seconds on the wall that all of them took. A prompt
        that the engine refuses has an output too, with finish reason "error".

    Raises:
        ValueError: A ``batch`` below 1, an ``n`` above 1, or no prompt that the engine takes.
    """
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise ValueError(f"batch: expected an integer >= 1, got {batch!r}")
    if any(each.n != 1 for each in params):
        raise ValueError(f"params: expected n=1, got {max(each.n for each in params)}")
    todo = iter(zip(prompts, params, strict=True))
    outputs: list[RequestOutput] = []
    refusals: list[ValueError] = []
    seconds = 0.0
    with Bar(len(prompts), progress) as bar:
        while requests := list(itertools.islice(todo, batch)):
            started = time.perf_counter()
            for outcome in _outcomes(llm, requests):
                if isinstance(outcome, ValueError):
                    refusals.append(outcome)
                    outcome = _refused(outcome)
                outputs.append(outcome)
                bar.advance(len(outcome.token_ids))
            seconds += time.perf_counter() - started
    if refusals and len(refusals) == len(outputs):
        raise refusals[0]
    return outputs, seconds


def _outcomes(
    llm: LLM, requests: list[tuple[Prompt, GenerationParams]]
) -> list[RequestOutput | ValueError]:
    """Outputs of one batch, and why prompts were refused: one would keep all from being run."""
    refusals = [_refusal(llm, *request) for request in requests]
    taken = [each for each, refusal in zip(requests, refusals, strict=True) if refusal is None]
    prompts, params = [prompt for prompt, _ in taken], [each for _, each in taken]
    outputs = iter(llm.generate(prompts, params))
    return [refusal or next(outputs) for refusal in refusals]


def _refusal(llm: LLM, prompt: Prompt, params: GenerationParams) -> ValueError | None:
    try:
        llm.engine.check(*llm.encode_request(prompt, params))
    except ValueError as error:
        return error
    return None


def _refused(error: ValueError) -> RequestOutput:
    return RequestOutput(
        request_id="", token_ids=[], text="", rounds=[], finish_reason="error", usage=Usage(),
        error=GenerationError(str(error)),
    )  # fmt: skip


def has_answer(output: RequestOutput) -> bool:
    """Whether there is an answer, be it cut by ``max_tokens``."""
    return output.finish_reason in ("stop", "length")


def topics_of(output: RequestOutput) -> list[str]:
    """Topics of all rounds; none where the answer has no plan."""
    return [topic for plan_round in output.rounds for topic in plan_round.topics]
