"""The engine behind an event loop: streams, cancellation, drain, overload, death."""

from __future__ import annotations

import asyncio
import contextlib
import gc

import pytest

from pdiff_runtime import LLM, AsyncEngine, EngineConfig, GenerationParams
from pdiff_runtime.engine import (
    DuplicateRequestError,
    EngineDeadError,
    Finished,
    OverloadedError,
    PlanReady,
    SpanUpdate,
)

PROMPTS = [[i, 2, 3] for i in range(1, 13)]
LONG = GenerationParams(mode="ar", max_tokens=400, temperature=2.0, seed=1)
STEPS = 300
SLOW = GenerationParams(mode="diffusion", max_tokens=STEPS + 2)  # a token per step


@pytest.fixture
def llm(tiny_model, tiny_tags) -> LLM:
    return LLM(tiny_model, tags=tiny_tags, config=EngineConfig(page_size=16))


def run(llm, body):
    """Run ``body(engine)`` to its end; afterwards nothing may be left."""

    async def main():
        async with AsyncEngine(llm) as engine:
            return await asyncio.wait_for(body(engine), 60)

    result = asyncio.run(main())
    assert not llm.engine.has_work
    assert llm.engine.allocator.num_free == llm.engine.allocator.num_pages
    llm.engine.check_integrity()
    return result


def test_answers_are_those_of_generate(llm):
    params = [GenerationParams(max_tokens=60, seed=i, temperature=0.5 * (i % 3)) for i in range(12)]
    expected = [output.token_ids for output in llm.generate(PROMPTS, params)]

    async def body(engine):
        tasks = map(engine.generate, PROMPTS, params)
        return [output.token_ids for (output,) in await asyncio.gather(*tasks)]

    assert run(llm, body) == expected


def test_several_answers_come_in_order(llm):
    params = GenerationParams(max_tokens=40, n=12, seed=3, temperature=1.0)
    expected = [output.token_ids for output in llm.generate([PROMPTS[0]], params)]

    async def body(engine):
        return await engine.generate(PROMPTS[0], params, request_id="many")

    outputs = run(llm, body)
    assert [output.request_id for output in outputs] == [f"many/{i}" for i in range(12)]
    assert [output.token_ids for output in outputs] == expected


def test_a_stream_tells_the_story(llm):
    async def body(engine):
        params = GenerationParams(plan=[[([7], 8), ([9], 4)]], max_tokens=40)
        return [event async for event in engine.stream(PROMPTS[0], params, request_id="a")]

    events = run(llm, body)
    assert {event.request_id for event in events} == {"a"}
    assert isinstance(events[0], PlanReady)
    assert sum(isinstance(event, SpanUpdate) for event in events) == 8
    assert isinstance(events[-1], Finished)


@pytest.mark.parametrize("how", ["close", "forget", "cancel"])
def test_who_leaves_gives_the_pages_back(llm, how):
    async def read_a_little(engine, entered):
        async for _ in engine.stream(PROMPTS[0], SLOW, request_id="left"):
            entered.set()
            if how == "forget":
                return
            await asyncio.sleep(0 if how == "close" else 60)

    async def body(engine):
        if how == "close":
            async with contextlib.aclosing(engine.stream(PROMPTS[0], SLOW)) as events:
                await anext(events)
        else:
            entered = asyncio.Event()
            task = asyncio.create_task(read_a_little(engine, entered))
            await entered.wait()
            if how == "cancel":
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            gc.collect()
        while engine.health().num_running:
            await asyncio.sleep(0.001)
        assert engine.health().num_free_pages == engine.health().num_pages
        return engine.health().num_steps

    assert run(llm, body) < STEPS // 2


def test_abort_ends_a_stream_with_what_it_has(llm):
    async def body(engine):
        task = asyncio.create_task(engine.generate(PROMPTS[0], LONG, request_id="a"))
        while engine.health().num_steps < 5:
            await asyncio.sleep(0.001)
        assert engine.abort("a")
        assert not engine.abort("b")
        (output,) = await task
        assert not engine.abort("a")
        return output

    output = run(llm, body)
    assert output.finish_reason == "abort"
    assert 4 <= len(output.token_ids) < 400


def test_a_deadline_ends_a_request(llm):
    async def body(engine):
        return await engine.generate(PROMPTS[0], LONG, timeout_s=0.02)

    (output,) = run(llm, body)
    assert output.finish_reason == "deadline"


def test_draining_lets_requests_finish_and_takes_no_more(llm):
    async def body(engine):
        params = GenerationParams(max_tokens=60)
        tasks = [asyncio.create_task(engine.generate(p, params)) for p in PROMPTS]
        await asyncio.sleep(0)
        assert await engine.drain()
        assert engine.health().state == "draining"
        with pytest.raises(OverloadedError, match="draining"):
            await engine.generate(PROMPTS[0])
        return [task.result()[0].finish_reason for task in tasks]

    assert set(run(llm, body)) <= {"stop", "length"}


def test_draining_gives_up_in_time(llm):
    async def body(engine):
        task = asyncio.create_task(engine.generate(PROMPTS[0], LONG))
        await asyncio.sleep(0)
        assert not await engine.drain(timeout_s=0.001)
        return task

    task = run(llm, body)  # leaving the block aborts it
    assert task.cancelled() or task.result()[0].finish_reason == "abort"


def test_leaving_the_block_ends_every_stream(llm):
    async def main():
        async with AsyncEngine(llm) as engine:
            tasks = [asyncio.create_task(engine.generate(p, LONG)) for p in PROMPTS]
            while engine.health().num_running < len(PROMPTS):
                await asyncio.sleep(0.001)
        assert engine.health().state == "stopped"
        outputs = await asyncio.wait_for(asyncio.gather(*tasks), 10)
        with pytest.raises(OverloadedError):
            await engine.generate(PROMPTS[0])
        return outputs

    assert {output.finish_reason for (output,) in asyncio.run(main())} == {"abort"}
    assert not llm.engine.has_work
    assert llm.generate([PROMPTS[0]], GenerationParams(max_tokens=5))


def test_a_full_queue_refuses(tiny_model, tiny_tags):
    config = EngineConfig(page_size=16, max_requests=1, max_waiting=2)
    llm = LLM(tiny_model, tags=tiny_tags, config=config)

    async def body(engine):
        tasks = (engine.generate(prompt, LONG) for prompt in PROMPTS)
        return await asyncio.gather(*tasks, return_exceptions=True)

    results = run(llm, body)
    refused = [result for result in results if isinstance(result, OverloadedError)]
    # Two wait and, if a step comes between, one runs.
    assert len(refused) >= len(PROMPTS) - 3
    assert all(isinstance(r, list) for r in results if r not in refused)


def test_bad_requests_are_refused_and_harm_nobody(llm):
    async def body(engine):
        other = asyncio.create_task(engine.generate(PROMPTS[0], LONG, request_id="a"))
        await asyncio.sleep(0)
        for prompt, kwargs, error, message in (
            ([], {}, ValueError, "prompt: expected at least one token"),
            ([99], {}, ValueError, "expected ids from 0 to 57"),
            ([55], {}, ValueError, "control token 55"),
            (PROMPTS[0], {"request_id": "a"}, DuplicateRequestError, "'a' is already there"),
            (PROMPTS[0], {"request_id": 5}, ValueError, "request_id: expected str, got 5"),
            (PROMPTS[0], {"timeout_s": 0}, ValueError, "timeout_s: expected"),
            (PROMPTS[0], {"params": {"n": 2}}, ValueError, "params: expected GenerationParams"),
            (PROMPTS[0], {"priority": 1 << 63}, ValueError, "priority: expected"),
            ([1] * 500, {"params": LONG}, ValueError, "the model's positions hold 512"),
        ):
            with pytest.raises(error, match=message):
                await engine.generate(prompt, **kwargs)
        (output,) = await other
        return output.finish_reason

    assert run(llm, body) in ("stop", "length")


def test_a_failing_step_kills_the_engine_and_says_so(llm, monkeypatch, caplog):
    def broken(works):
        raise ZeroDivisionError("a bug")

    async def main():
        async with AsyncEngine(llm) as engine:
            monkeypatch.setattr(llm.engine.runner, "run", broken)
            with pytest.raises(EngineDeadError, match="a bug"):
                await engine.generate(PROMPTS[0])
            assert engine.health().state == "dead"
            assert isinstance(engine.health().error, ZeroDivisionError)
            with pytest.raises(EngineDeadError, match="dead since"):
                await engine.generate(PROMPTS[0])

    asyncio.run(main())
    assert "the engine is dead" in caplog.text
    monkeypatch.undo()
    assert not llm.engine.has_work
    assert llm.generate([PROMPTS[0]], GenerationParams(max_tokens=5))


def test_an_error_while_the_engine_stops_ends_every_stream(llm):
    decode = llm.engine.decode

    async def main():
        async with AsyncEngine(llm) as engine:
            tasks = [asyncio.create_task(engine.generate(p, LONG)) for p in PROMPTS]
            while engine.health().num_running < len(PROMPTS):
                await asyncio.sleep(0.001)
            llm.engine.decode = lambda token_ids: {}[0]  # called for the answers that are cut off
        return await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)

    results = asyncio.run(main())
    assert {type(result) for result in results} == {EngineDeadError}
    llm.engine.decode = decode
    assert not llm.engine.has_work
    assert llm.engine.allocator.num_free == llm.engine.allocator.num_pages
    assert llm.generate([PROMPTS[0]], GenerationParams(max_tokens=5))


def test_leaving_the_block_may_be_cancelled(llm):
    async def main():
        engine = await AsyncEngine(llm).__aenter__()
        task = asyncio.create_task(engine.generate(PROMPTS[0], SLOW))
        while engine.health().num_running == 0:
            await asyncio.sleep(0.001)
        leaving = asyncio.create_task(engine.__aexit__(None, None, None))
        await asyncio.sleep(0)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        (output,) = await asyncio.wait_for(task, 10)
        return output.finish_reason

    assert asyncio.run(main()) == "abort"
    assert llm.generate([PROMPTS[0]], GenerationParams(max_tokens=5))


def test_the_model_serves_one_master(llm):
    async def main():
        async with AsyncEngine(llm) as engine:
            with pytest.raises(RuntimeError, match="another generate"):
                llm.generate([PROMPTS[0]])
            with pytest.raises(RuntimeError, match="another generate"):
                await AsyncEngine(llm).__aenter__()
            with pytest.raises(RuntimeError, match="started once"):
                await engine.__aenter__()

    asyncio.run(main())
    assert llm.generate([PROMPTS[0]], GenerationParams(max_tokens=5))


def test_not_started_takes_nothing(llm):
    async def main():
        with pytest.raises(OverloadedError, match="not running"):
            await AsyncEngine(llm).generate(PROMPTS[0])

    asyncio.run(main())


def test_without_a_thread_the_model_stays_free(llm, monkeypatch):
    def no_thread(thread):
        raise RuntimeError("can't start new thread")

    engine = AsyncEngine(llm)
    with monkeypatch.context() as patch:
        patch.setattr("threading.Thread.start", no_thread)
        with pytest.raises(RuntimeError, match="new thread"):
            asyncio.run(engine.__aenter__())
    assert llm.generate([PROMPTS[0]])[0].token_ids
    assert engine.health().state == "stopped"
