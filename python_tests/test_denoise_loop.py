"""Denoising steps launched before the last one's results are read change nothing but the time."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from pdiff_runtime import LLM, Decoder, EngineConfig, GenerationParams
from pdiff_runtime.bench.models import TAGS, planning_model, random_prompt
from pdiff_runtime.denoise import num_unmask
from pdiff_runtime.engine import BadLogitsError, Finished, SpanUpdate
from pdiff_runtime.models import ModelConfig

PROMPT = [1, 2, 3, 4, 5]
TWO_ROUNDS = ([([7, 8], 8), ([9], 4), ([7], 6)], [([3], 4), ([2], 10)])
RULES = {
    "entropy": {},
    "few steps": {"steps_ratio": 0.4},
    "margin": {"unmask": "topk_margin", "temperature": 0.7},
    "filters": {"unmask": "maskgit_plus", "temperature": 0.9, "top_p": 0.8, "top_k": 20},
    "shuffled": {"alg_temp": 0.5},
    "threshold": {"unmask": "confidence_threshold", "threshold": 0.3},
    "joint": {"isolate_spans": False},
    "joint, threshold": {
        "isolate_spans": False, "unmask": "confidence_threshold", "threshold": 0.3,
    },
    "published": {"kv_commit": "published"},
    "published, threshold": {
        "kv_commit": "published", "unmask": "confidence_threshold", "threshold": 0.3,
    },
}  # fmt: skip


def engine_of(model, tags, **config) -> LLM:
    return LLM(model, tags=tags, config=EngineConfig(page_size=16, **config))


@pytest.fixture
def plain(tiny_model, tiny_tags) -> LLM:
    return engine_of(tiny_model, tiny_tags, run_ahead=False)


@pytest.fixture
def ahead(tiny_model, tiny_tags) -> LLM:
    return engine_of(tiny_model, tiny_tags, run_ahead=True)


def count_calls(monkeypatch, loop) -> dict[str, int]:
    counts = {"start": 0, "launch": 0}
    for name in counts:
        function = getattr(loop, name)

        def counted(*args, function=function, name=name):
            counts[name] += 1
            return function(*args)

        monkeypatch.setattr(loop, name, counted)
    return counts


@pytest.mark.parametrize("rule", RULES)
def test_answers_and_their_cost_are_the_same(plain, ahead, rule, monkeypatch):
    counts = count_calls(monkeypatch, ahead.engine._loop)
    params = GenerationParams(
        plan=TWO_ROUNDS, max_tokens=100, seed=3, record_steps=True, **RULES[rule]
    )
    (expected,), (actual,) = plain.generate([PROMPT], params), ahead.generate([PROMPT], params)
    assert actual.token_ids == expected.token_ids
    assert actual.rounds == expected.rounds
    for field in ("num_forwards", "critical_path", "span_tokens"):
        assert getattr(actual.usage, field) == getattr(expected.usage, field)
    assert counts["start"] > 0
    if rule != "published, threshold":  # which step freezes a span is not known ahead
        assert counts["launch"] > counts["start"]
    ahead.engine.check_integrity()


def test_requests_share_a_loop(plain, ahead, monkeypatch):
    counts = count_calls(monkeypatch, ahead.engine._loop)
    prompts = [[i, 2, 3] for i in range(1, 7)]
    params = [
        GenerationParams(
            plan=[[([7], 10 + 2 * i), ([8], 20)]],
            max_tokens=80,
            seed=i,
            temperature=2.0 * (i % 2),
            top_k=3 if i == 3 else None,
            alg_temp=0.5 if i == 4 else 0.0,
        )
        for i in range(6)
    ]
    expected = [output.token_ids for output in plain.generate(prompts, params)]
    assert [output.token_ids for output in ahead.generate(prompts, params)] == expected
    assert counts["launch"] > counts["start"] > 0


def test_a_quota_is_computed_once(plain, ahead, monkeypatch):
    quotas = []

    def counted(*args):
        quotas.append(num_unmask(*args))
        return quotas[-1]

    monkeypatch.setattr("pdiff_runtime.denoise.rules.num_unmask", counted)
    for llm in (plain, ahead):
        quotas.clear()
        params = GenerationParams(plan=[[([7], 30), ([8], 30)]], max_tokens=100, steps_ratio=0.4)
        (output,) = llm.generate([PROMPT], params)
        assert len(quotas) == 2 * output.rounds[0].num_steps
        assert sum(quotas) == 60


def test_what_needs_more_than_tokens_takes_the_other_way(ahead, monkeypatch):
    counts = count_calls(monkeypatch, ahead.engine._loop)
    params = GenerationParams(plan=TWO_ROUNDS, max_tokens=100, logprobs=True)
    (output,) = ahead.generate([PROMPT], params)
    assert counts["launch"] == 0
    assert any(logprob is not None for logprob in output.logprobs)


def test_a_newcomer_and_an_abort_meet_a_step_under_way(plain, ahead):
    params = GenerationParams(plan=[[([7], 30), ([8], 30)]], max_tokens=100)
    later = GenerationParams(max_tokens=50, seed=1)
    (alone,) = plain.generate([PROMPT], params)
    (newcomer,) = plain.generate([[9, 8]], later)
    engine, rounds = ahead.engine, ahead.encode_plan(params.plan)
    engine.add("stays", PROMPT, params, rounds)
    engine.add("goes", [6, 6, 6], params, rounds)
    outputs = {}
    for step in range(200):
        if step == 5:
            assert engine._ahead is not None
            (event,) = (e for e in engine.abort(["goes"]) if isinstance(e, Finished))
            assert event.output.finish_reason == "abort"
        if step == 8:
            assert engine._ahead is not None
            engine.add("comes", [9, 8], later)
        for event in engine.step():
            assert event.request_id != "goes" or step < 5
            if isinstance(event, Finished):
                outputs[event.request_id] = event.output
        engine.check_integrity()
        if not engine.has_work:
            break
    assert outputs["stays"].token_ids == alone.token_ids
    assert outputs["comes"].token_ids == newcomer.token_ids
    assert outputs.keys() == {"stays", "comes"}


def test_an_error_while_a_step_is_under_way_costs_nobody_a_token(plain, ahead):
    params = GenerationParams(
        mode="diffusion", max_tokens=40, unmask="confidence_threshold", threshold=0.9,
        seed=1, temperature=1.0, record_steps=True,
    )  # fmt: skip
    (alone,) = plain.generate([PROMPT], params)
    engine, decode = ahead.engine, ahead.engine.decode
    engine.add("goes", [6, 6, 6], dataclasses.replace(params, max_tokens=6))
    engine.add("stays", PROMPT, params)
    engine.decode = lambda token_ids: {}[0]  # for the span that is full first
    with pytest.raises(KeyError):
        list(iter(engine.step, None))
    engine.decode = decode
    engine.abort(["goes"])
    outputs = []
    while engine.has_work:
        outputs += [e.output for e in engine.step() if isinstance(e, Finished)]
        engine.check_integrity()
    assert [output.token_ids for output in outputs] == [alone.token_ids]
    assert outputs[0].rounds[0].history == alone.rounds[0].history


def test_updates_tell_each_step(ahead):
    params = GenerationParams(plan=[[([7], 12)]], max_tokens=40)
    updates = [e for e in ahead.stream(PROMPT, params) if isinstance(e, SpanUpdate)]
    assert [update.step_idx for update in updates] == list(range(12))
    assert [len(update.positions) for update in updates] == [1] * 12


def test_bad_logits_end_the_request(tiny_model, tiny_tags, ahead, monkeypatch):
    logits = tiny_model.logits
    calls = iter(range(1000))

    def broken(*args):
        return logits(*args) * (float("nan") if next(calls) >= 4 else 1.0)

    params = GenerationParams(plan=[[([7], 12)]], max_tokens=40)
    monkeypatch.setattr(tiny_model, "logits", broken)
    (output,) = ahead.generate([PROMPT], params)
    assert isinstance(output.error, BadLogitsError)
    monkeypatch.undo()
    assert ahead.engine.allocator.num_free == ahead.engine.allocator.num_pages
    assert ahead.generate([PROMPT], params)[0].finish_reason == "stop"


def test_out_of_memory_takes_the_other_way(plain, ahead, monkeypatch):
    params = GenerationParams(plan=TWO_ROUNDS, max_tokens=100)
    (expected,) = plain.generate([PROMPT], params)
    launch, calls = ahead.engine._loop.launch, iter(range(1000))

    def short_of_memory(*args):
        if next(calls) in (1, 3, 6):
            raise torch.OutOfMemoryError("none left")
        return launch(*args)

    monkeypatch.setattr(ahead.engine._loop, "launch", short_of_memory)
    assert ahead.generate([PROMPT], params)[0].token_ids == expected.token_ids


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_captured_cuda_steps_write_what_eager_ones_do():
    config = ModelConfig(
        vocab_size=640, hidden_size=256, num_layers=2, num_heads_q=4, num_heads_kv=2, head_dim=64,
        intermediate_size=512,
    )  # fmt: skip
    model: Decoder = planning_model(config, number=4, device="cuda")
    invariant = EngineConfig(max_topics=4, batch_invariant=True)
    outputs = []
    for run_ahead in (False, True, True):
        llm = LLM(model, tags=TAGS, config=dataclasses.replace(invariant, run_ahead=run_ahead))
        params = GenerationParams(max_tokens=400, steps_ratio=1.0, seed=0)
        outputs.append(
            [o.token_ids for o in llm.generate([random_prompt(40, i) for i in range(3)], params)]
        )
    assert outputs[0] == outputs[1] == outputs[2]
