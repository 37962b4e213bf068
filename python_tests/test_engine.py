"""Whole generations: against an uncached oracle, alone and in company, within every budget."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from pdiff_runtime import LLM, EngineConfig, GenerationParams, SpanLayout, ops
from pdiff_runtime.denoise import num_steps, num_unmask
from pdiff_runtime.engine import BadLogitsError, Finished, PlanReady, SpanUpdate
from pdiff_runtime.models.attention import PackedAttention
from pdiff_runtime.plan import PlanGrammar, parse_plan

PROMPT = [1, 2, 3, 4, 5]
TWO_ROUNDS = ([([7, 8], 8), ([9], 4), ([7], 6)], [([3], 4), ([2], 10)])


@pytest.fixture
def llm(tiny_model, tiny_tags) -> LLM:
    return LLM(tiny_model, tags=tiny_tags, config=EngineConfig(page_size=16))


def full_logits(model, token_ids, tags, isolate_spans=True):
    """Logits of every row from one uncached forward over the whole sequence."""
    layout = SpanLayout.from_tokens(token_ids, tags, isolate_spans)
    config = model.config
    plan = ops.AttentionPlan.pack(
        [layout], num_heads_q=config.num_heads_q, num_heads_kv=config.num_heads_kv,
        head_dim=config.head_dim,
    )  # fmt: skip
    attend = PackedAttention(plan, model.cos, model.sin, torch.arange(len(token_ids)))
    with torch.no_grad():
        return model.logits(model(torch.tensor(token_ids), attend))


def oracle(model, tags, prompt, rounds, *, max_tokens, steps_ratio=1.0, isolate_spans=True):
    """Planned generation without any cache: the published algorithm over whole sequences."""
    ids = list(prompt)
    banned = [tags.topic_start, tags.topic_end, tags.async_start, tags.async_end, tags.sync,
              tags.mask, tags.eos]  # fmt: skip
    grammar = PlanGrammar(tags, model.config.vocab_size, max_topics=64)
    rounds = [list(r) for r in rounds]
    while True:
        start = len(ids)
        if rounds:
            *plan, closing = rounds.pop(0)
            ids += plan
        else:
            state = grammar.start(max_tokens - (len(ids) - len(prompt)) + 1)
            while state.is_finished is None:
                logits = full_logits(model, ids, tags, isolate_spans)[-1]
                logits[~state.allowed_mask()] = float("-inf")
                ids.append(int(logits.argmax()))
                state.advance(ids[-1])
            closing = ids.pop()
        bounds, is_cut = [], False
        for topic in parse_plan(ids[start:], tags):
            length = topic.number * model.config.length_unit
            room = max_tokens - (len(ids) - len(prompt)) - 2
            if room < length:
                is_cut = True
                if room < 1:
                    break
                length = room
            bounds.append((len(ids) + 1, len(ids) + 1 + length))
            ids += [tags.async_start, *[tags.mask] * length, tags.async_end]
            if is_cut:
                break
        steps = num_steps(max((hi - lo for lo, hi in bounds), default=0), steps_ratio)
        for step_idx in range(steps):
            probs = full_logits(model, ids, tags, isolate_spans).double()
            probs[:, banned] = float("-inf")
            probs = probs.softmax(-1)
            confidence = torch.special.entr(probs).sum(-1).neg()
            for lo, hi in bounds:
                masked = [p for p in range(lo, hi) if ids[p] == tags.mask]
                best = sorted(masked, key=lambda p: (-confidence[p - 1].item(), p))
                for p in best[: num_unmask(len(masked), step_idx, steps)]:
                    ids[p] = int(probs[p - 1].argmax())
        if closing == tags.eos or is_cut or not bounds:
            return ids[len(prompt) :]
        ids.append(tags.sync)
        if len(ids) - len(prompt) >= max_tokens:
            return ids[len(prompt) :]


@pytest.mark.parametrize("isolate_spans", [True, False])
@pytest.mark.parametrize("steps_ratio", [1.0, 0.4])
def test_clean_cache_equals_no_cache(llm, isolate_spans, steps_ratio):
    params = GenerationParams(
        plan=TWO_ROUNDS, max_tokens=100, steps_ratio=steps_ratio, isolate_spans=isolate_spans
    )
    (output,) = llm.generate([PROMPT], params)
    expected = oracle(
        llm.model, llm.tags, PROMPT, llm.encode_plan(TWO_ROUNDS), max_tokens=100,
        steps_ratio=steps_ratio, isolate_spans=isolate_spans,
    )  # fmt: skip
    assert output.token_ids == expected
    assert output.finish_reason == "stop"
    assert [r.lengths for r in output.rounds] == [[8, 4, 6], [4, 10]]


def test_published_commit_differs_from_no_cache(llm):
    """The control of the test above: stale keys do change the second round."""
    params = GenerationParams(
        plan=TWO_ROUNDS, max_tokens=100, steps_ratio=0.1, kv_commit="published"
    )
    (output,) = llm.generate([PROMPT], params)
    expected = oracle(
        llm.model, llm.tags, PROMPT, llm.encode_plan(TWO_ROUNDS), max_tokens=100, steps_ratio=0.1
    )
    first_round = expected.index(llm.tags.sync)
    assert output.token_ids[:first_round] == expected[:first_round]
    assert output.token_ids != expected


@pytest.mark.parametrize("kv_commit", ["clean", "published"])
def test_an_engine_made_in_inference_mode_runs_without(tiny_model, tiny_tags, kv_commit):
    params = GenerationParams(plan=TWO_ROUNDS, max_tokens=100, kv_commit=kv_commit)
    outputs = []
    for is_inference in (False, True):
        with torch.inference_mode(is_inference):
            llm = LLM(tiny_model, tags=tiny_tags, config=EngineConfig(page_size=16))
        outputs.append(llm.generate([PROMPT], params)[0].token_ids)
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("prompt", [[1], [2, 9, 30], [5, 6, 7, 8, 11, 12], [33] * 20])
def test_own_plans_equal_no_cache(llm, prompt):
    params = GenerationParams(max_tokens=90, steps_ratio=0.5)
    (output,) = llm.generate([prompt], params)
    expected = oracle(llm.model, llm.tags, prompt, [], max_tokens=90, steps_ratio=0.5)
    assert output.token_ids == expected


def test_company_changes_nothing(llm):
    prompts = [[i, i + 1, *range(1, 1 + 3 * i)] for i in range(1, 9)]
    params = [
        GenerationParams(
            mode=mode, max_tokens=40 + 3 * i, unmask=unmask, threshold=0.2, seed=i,
            temperature=0.7 * (i % 2), top_p=0.9, steps_ratio=0.5,
        )
        for i, (mode, unmask) in enumerate(
            [("planned", "entropy"), ("ar", "entropy"), ("diffusion", "topk_margin"),
             ("planned", "confidence_threshold"), ("planned", "maskgit_plus"),
             ("diffusion", "confidence_threshold"), ("ar", "entropy"), ("planned", "entropy")]
        )
    ]  # fmt: skip
    together = llm.generate(prompts, params)
    for prompt, each, output in zip(prompts, params, together, strict=True):
        (alone,) = llm.generate([prompt], each)
        assert alone.token_ids == output.token_ids
        assert alone.usage.num_forwards == output.usage.num_forwards


def test_requests_that_do_not_fit_wait(tiny_model, tiny_tags, llm):
    small = LLM(
        tiny_model, tags=tiny_tags,
        config=EngineConfig(page_size=16, kv_cache_tokens=128, max_requests=3),
    )  # fmt: skip
    prompts = [[i, 2, 3] for i in range(1, 8)]
    params = GenerationParams(max_tokens=60, steps_ratio=0.5)
    roomy, tight = llm.generate(prompts, params), small.generate(prompts, params)
    assert [o.token_ids for o in roomy] == [o.token_ids for o in tight]
    assert small.engine.allocator.num_free == small.engine.allocator.num_pages


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 4, 5, 6, 8, 11, 15, 22, 37])
@pytest.mark.parametrize("mode", ["planned", "ar", "diffusion"])
def test_no_budget_is_exceeded(llm, mode, max_tokens):
    for seed in range(6):
        params = GenerationParams(mode=mode, max_tokens=max_tokens, temperature=1.5, seed=seed)
        (output,) = llm.generate([PROMPT], params)
        assert len(output.token_ids) <= max_tokens
        assert llm.tags.mask not in output.token_ids
        assert output.finish_reason in ("stop", "length")
        usage = output.usage
        assert usage.plan_tokens + usage.span_tokens == len(output.token_ids)
    assert llm.engine.allocator.num_free == llm.engine.allocator.num_pages


def test_a_budget_below_the_plan_shortens_and_drops_spans(llm):
    plan = [[([7], 8), ([8], 8), ([9], 8)]]
    plan_len = len(llm.encode_plan(plan)[0]) - 1
    (output,) = llm.generate([PROMPT], GenerationParams(plan=plan, max_tokens=plan_len + 15))
    assert output.rounds[0].lengths == [8, 3]
    assert output.finish_reason == "length"
    with pytest.raises(ValueError, match=f"max_tokens: the plan alone has {plan_len} tokens"):
        llm.generate([PROMPT], GenerationParams(plan=plan, max_tokens=plan_len - 1))


def test_ar_mode_writes_no_control_token(llm, tiny_tags):
    control = {50, 51, 52, 53, 54, 55, 56, 57}
    for seed in range(5):
        params = GenerationParams(mode="ar", max_tokens=30, temperature=2.0, seed=seed)
        (output,) = llm.generate([PROMPT], params)
        assert not control & set(output.token_ids)
        assert output.rounds == []


def test_diffusion_mode_is_one_span(llm, tiny_tags):
    (output,) = llm.generate([PROMPT], GenerationParams(mode="diffusion", max_tokens=22))
    assert output.rounds[0].lengths == [20]
    assert output.usage.num_forwards == 20
    assert output.token_ids[0] == tiny_tags.async_start


def test_finished_spans_leave_and_history_tells_all(llm):
    params = GenerationParams(plan=[[([7], 2), ([8], 12)]], max_tokens=60, record_steps=True)
    (output,) = llm.generate([PROMPT], params)
    (only,) = output.rounds
    assert only.num_steps == len(only.history) == 12
    assert [len(writes) for writes in only.history] == [2, 2] + [1] * 10
    filled = dict(pair for writes in only.history for pair in writes)
    answer = [*PROMPT, *output.token_ids]
    assert all(answer[position] == token_id for position, token_id in filled.items())


def test_threshold_writes_all_that_are_sure(llm):
    params = GenerationParams(
        plan=[[([7], 12)]], max_tokens=60, unmask="confidence_threshold", threshold=0.0
    )
    (output,) = llm.generate([PROMPT], params)
    assert output.rounds[0].num_steps == 1
    params = GenerationParams(
        plan=[[([7], 12)]], max_tokens=60, unmask="confidence_threshold", threshold=1.0
    )
    (output,) = llm.generate([PROMPT], params)
    assert output.rounds[0].num_steps == 12


def test_length_scale_replaces_the_unit(llm):
    plan = [[([7], 4), ([8], 6)]]  # numbers 2 and 3
    params = GenerationParams(plan=plan, max_tokens=60, length_scale=1.5)
    (output,) = llm.generate([PROMPT], params)
    assert output.rounds[0].lengths == [3, 4]
    params = GenerationParams(plan=plan, max_tokens=60, length_scale=0.4)
    (output,) = llm.generate([PROMPT], params)
    assert output.rounds[0].lengths == [0, 1]


def test_sampling_depends_on_the_seed_alone(llm):
    def run(seed: int) -> list[int]:
        params = GenerationParams(max_tokens=60, temperature=1.0, seed=seed)
        return llm.generate([PROMPT], params)[0].token_ids

    assert run(3) == run(3)
    assert len({tuple(run(seed)) for seed in range(5)}) > 1


def test_events_tell_the_story(llm):
    params = GenerationParams(plan=TWO_ROUNDS, max_tokens=100)
    events = list(llm.stream(PROMPT, params))
    plans = [event for event in events if isinstance(event, PlanReady)]
    assert [len(plan.bounds) for plan in plans] == [3, 2]
    assert isinstance(events[-1], Finished)
    ids = [*PROMPT, *events[-1].output.token_ids]
    for event in events:
        if isinstance(event, SpanUpdate):
            assert [ids[p] for p in event.positions] == event.token_ids


def test_bad_logits_fail_the_request_not_the_engine(llm, tiny_tags):
    broken = copy.deepcopy(llm.model)
    broken.model.norm.weight[:] = float("nan")
    bad = LLM(broken, tags=tiny_tags)
    for mode in ("planned", "ar", "diffusion"):
        (output,) = bad.generate([PROMPT], GenerationParams(mode=mode, max_tokens=20))
        assert output.finish_reason == "error"
        assert isinstance(output.error, BadLogitsError)
    assert not bad.engine.has_work
    assert bad.engine.allocator.num_free == bad.engine.allocator.num_pages


def test_without_the_grammar_a_bad_plan_is_a_finish_reason(llm):
    reasons = set()
    for seed in range(20):
        params = GenerationParams(max_tokens=40, temperature=3.0, seed=seed, use_grammar=False)
        reasons.add(llm.generate([PROMPT], params)[0].finish_reason)
    assert "invalid_plan" in reasons


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "prompt: expected at least one token"),
        ([1, 99], "expected ids from 0 to 57, got 99 at position 1"),
        ([1, -1], "got -1 at position 1"),
        ([1, 55], "control token 55 at position 1"),
        ("text", "expected token ids where there is no tokenizer"),
        (None, "prompt: expected text, a conversation or token ids, got None"),
        ([1, "a"], "prompt: expected text, a conversation or token ids"),
        ([1] * 600, "the model's positions hold 512"),
    ],
)
def test_bad_prompts_are_refused(llm, prompt, message):
    with pytest.raises(ValueError, match=message):
        llm.generate([PROMPT, prompt], GenerationParams(max_tokens=20))
    assert not llm.engine.has_work


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mode", "x"), ("max_tokens", 0), ("max_tokens", 1 << 63), ("temperature", -1.0),
        ("temperature", float("nan")), ("top_p", 0.0), ("top_p", 1.5), ("top_k", -1),
        ("top_k", 1 << 31),
        ("seed", -1), ("seed", 1 << 63), ("unmask", "best"), ("steps_ratio", 0.0),
        ("steps_ratio", float("inf")), ("threshold", 2.0), ("length_scale", 0.0),
        ("kv_commit", "dirty"), ("isolate_spans", "no"), ("unmask", []),
        ("plan", []), ("max_tokens", True), ("alg_temp", -0.1),
    ],
)  # fmt: skip
def test_bad_parameters_are_named(field, value):
    with pytest.raises(ValueError, match=f"{field}: expected"):
        GenerationParams(**{field: value})


def test_a_threshold_rule_needs_a_threshold():
    with pytest.raises(ValueError, match="threshold: 'confidence_threshold' needs one"):
        GenerationParams(unmask="confidence_threshold")


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ([[1, 2, 3]], "must end in sync or eos"),
        ([[([7], 3)]], "a multiple of 2"),
        ([[([], 4)]], "a topic needs words"),
        ([[("words", 4)]], "must be token ids"),
        ([[7.5]], r"expected \(topic, length\)"),
        ([[50, 7, 51, 57]], r"plan: round 1: token_ids\[2\]: .*got 51 \(topic_end\)"),
        (5, "plan: expected a list of rounds"),
        ([5], r"plan: expected rounds of \(topic, length\)"),
        ([[(None, 8)]], "a topic needs words"),
        ([[([7, 44], 8)]], "must not end in a digit"),
        ([[50, 7, 41, 51, 54], [50, 7, 57]], "plan: round 2"),
        ([[57]], "plan: round 1: expected a topic, got none"),
        ([[50, 99, 41, 51, 57]], "plan: expected ids from 0 to 57, got 99"),
    ],
)
def test_bad_plans_are_refused(llm, plan, message):
    with pytest.raises(ValueError, match=message):
        llm.generate([PROMPT], GenerationParams(plan=plan, max_tokens=50))


def test_drafting_the_plan_changes_forwards_and_nothing_else(tiny_model, tiny_tags, llm):
    plain = LLM(tiny_model, tags=tiny_tags, config=EngineConfig(draft_plan=False))
    saved = 0
    for seed in range(12):
        params = GenerationParams(max_tokens=80, temperature=1.2 * (seed % 3), seed=seed)
        prompt = [seed + 1, 2, 3]
        (drafted,), (stepwise,) = llm.generate([prompt], params), plain.generate([prompt], params)
        assert drafted.token_ids == stepwise.token_ids
        saved += stepwise.usage.num_forwards - drafted.usage.num_forwards
    assert saved > 0


def test_a_second_round_without_room_ends_in_length(llm):
    first = len(llm.encode_plan(TWO_ROUNDS)[0]) + 18 + 6  # plan and sync, contents, tags
    (output,) = llm.generate([PROMPT], GenerationParams(plan=TWO_ROUNDS, max_tokens=first + 3))
    assert output.finish_reason == "length"
    assert len(output.rounds) == 1
    assert len(output.token_ids) <= first + 3


def test_an_interrupted_call_leaves_nothing_behind(llm, monkeypatch):
    expected = llm.generate([PROMPT])[0].token_ids
    calls = iter(range(3))

    def interrupted(works):
        next(calls)
        return run(works)

    run = llm.engine.runner.run
    monkeypatch.setattr(llm.engine.runner, "run", interrupted)
    with pytest.raises(StopIteration):
        llm.generate([PROMPT, [4, 4]])
    monkeypatch.undo()
    assert not llm.engine.has_work
    assert llm.engine.allocator.num_free == llm.engine.allocator.num_pages
    assert llm.generate([PROMPT])[0].token_ids == expected


@pytest.mark.parametrize("num_decoded", range(0, 12, 3))
def test_a_decoder_that_fails_leaves_nothing_behind(llm, num_decoded):
    params = GenerationParams(plan=TWO_ROUNDS, max_tokens=100)
    expected = llm.generate([PROMPT], params)[0].token_ids
    decode, calls = llm.engine.decode, iter(range(num_decoded))

    def broken(token_ids):
        next(calls)
        return decode(token_ids)

    for call in (lambda: llm.generate([PROMPT, [4, 4]], params), lambda: [*llm.stream([4, 4])]):
        calls = iter(range(num_decoded))
        llm.engine.decode = broken
        with pytest.raises((StopIteration, RuntimeError), match=r"^$|raised StopIteration"):
            call()
        llm.engine.decode = decode
        assert not llm.engine.has_work
        assert llm.engine.allocator.num_free == llm.engine.allocator.num_pages
        llm.engine.check_integrity()
    assert llm.generate([PROMPT], params)[0].token_ids == expected


def test_one_call_at_a_time(llm):
    stream = llm.stream(PROMPT, GenerationParams(plan=TWO_ROUNDS, max_tokens=100))
    next(stream)
    with pytest.raises(RuntimeError, match="another generate or stream is under way"):
        llm.generate([PROMPT])
    stream.close()
    assert not llm.engine.has_work
    events = list(llm.stream([4, 4]))
    assert len({event.request_id for event in events}) == 1


def test_ids_may_be_an_array(llm):
    (as_list,), (as_tensor,) = llm.generate([PROMPT]), llm.generate(torch.tensor(PROMPT))
    (of_numpy,) = llm.generate(list(np.array(PROMPT)))
    assert as_list.token_ids == as_tensor.token_ids == of_numpy.token_ids


@pytest.mark.parametrize("prompts", [None, 5, b"abc", {"role": "user"}])
def test_prompts_of_other_types_are_refused(llm, prompts):
    with pytest.raises(ValueError, match="prompts: expected"):
        llm.generate(prompts)


@pytest.mark.parametrize("params", [5, [5], {"mode": "ar"}, [None]], ids=str)
def test_parameters_of_other_types_are_refused(llm, params):
    with pytest.raises(ValueError, match="params: expected"):
        llm.generate([PROMPT], params)
    with pytest.raises(ValueError, match="params: expected GenerationParams, got"):
        next(llm.stream(PROMPT, params))
    assert not llm.engine.has_work


def test_autocast_of_the_caller_changes_nothing(llm):
    expected = llm.generate(PROMPT)[0].token_ids
    with torch.autocast("cpu", torch.bfloat16):
        assert llm.generate(PROMPT)[0].token_ids == expected


@pytest.mark.parametrize("name", ["tags", "tokenizer", "config"])
def test_arguments_of_other_types_are_refused(tiny_model, tiny_tags, name):
    with pytest.raises(ValueError, match=f"{name}: expected [A-Z].*, got {{}}"):
        LLM(tiny_model, **{"tags": tiny_tags, name: {}})


@pytest.mark.parametrize(
    "config", [{}, {"run_ahead": True}, {"batch_invariant": True}, {"pack_weights": False}], ids=str
)
@pytest.mark.parametrize("mode", ["planned", "ar", "diffusion", "fast_dllm", "skeleton"])
def test_no_tensor_is_made_on_the_default_device(mode, config):
    """Each is made where the model is: with another default device nothing changes."""
    logprobs = "run_ahead" not in config
    params = GenerationParams(mode=mode, max_tokens=40, seed=3, temperature=0.7, logprobs=logprobs)
    answers = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            llm = LLM(config=EngineConfig(kv_cache_tokens=1024, **config))
            answers.append(llm.generate(["Tell me about Peru: capital, exports."], params)[0])
    assert answers[0].token_ids == answers[1].token_ids
    assert answers[0].logprobs == answers[1].logprobs
