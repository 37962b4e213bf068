"""What callers see: text, events and log-probabilities agree with each other and with the model."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from test_engine import full_logits
from tiny_engine import (
    Case,
    answer,
    drain,
    finished,
    letters,
    make_engine,
    request_of,
    step,
    user_plan,
)

from pdiff_runtime import LLM, GenerationParams
from pdiff_runtime.engine import (
    Engine,
    Event,
    Finished,
    PlanReady,
    RequestOutput,
    SpanDone,
    SpanUpdate,
    Text,
)
from pdiff_runtime.models import BUNDLED_MODEL
from pdiff_runtime.plan import visible_text

PROMPT = [1, 2, 3, 4, 5]
PLANS = {
    "equal": ([3, 3, 3],),  # spans that end in the same step
    "ragged": ([4, 1, 2],),
    "rounds": ([2, 3], [3, 1], [2]),
}


def _params(**fields: object) -> GenerationParams:
    return GenerationParams(**{"max_tokens": 90, "seed": 3, **fields})


def _case(tags, name: str, **fields: object) -> Case:
    """One request of a kind: a user's plan, or a mode."""
    if name in PLANS:
        return Case(PROMPT, _params(**fields), user_plan(tags, *PLANS[name]))
    return Case(PROMPT, _params(mode=name, **{"max_tokens": 40, **fields}))


def _events(engine: Engine, case: Case) -> list[Event]:
    engine.add("x", case.prompt, case.params, case.rounds, with_text=True)
    events = []
    while engine.has_work:
        events += step(engine)
    assert engine.allocator.num_free == engine.allocator.num_pages
    return events


def _check(output: RequestOutput, tags, params: GenerationParams) -> None:
    """What holds of every output, however it ended."""
    usage = output.usage
    assert tags.mask not in output.token_ids
    assert usage.plan_tokens + usage.span_tokens == len(output.token_ids) <= params.max_tokens
    assert usage.pad_tokens <= sum(map(sum, (r.lengths for r in output.rounds)))
    assert usage.num_forwards >= usage.critical_path
    if params.logprobs:
        assert len(output.logprobs) == len(output.token_ids)
    else:
        assert output.logprobs is None
    contents = _contents(output.token_ids, tags)
    lengths = list(itertools.chain.from_iterable(r.lengths for r in output.rounds))
    assert [len(content) for content in contents] == lengths
    texts = list(itertools.chain.from_iterable(r.spans for r in output.rounds))
    assert [visible_text(content, tags, letters) for content in contents] == texts
    assert all(len(r.spans) == len(r.lengths) <= max(len(r.topics), 1) for r in output.rounds)


def _contents(token_ids: Sequence[int], tags) -> list[list[int]]:
    """Tokens of each span, the last of which may lack its end."""
    contents: list[list[int]] = []
    is_inside = False
    for token_id in token_ids:
        if token_id == tags.async_start:
            contents.append([])
        elif is_inside and token_id != tags.async_end:
            contents[-1].append(token_id)
        is_inside = token_id == tags.async_start or (is_inside and token_id != tags.async_end)
    return contents


# --- stop strings ---


@pytest.mark.parametrize("name", ["ar", "planned", "diffusion"])
def test_a_stop_string_ends_the_answer(tiny_model, tiny_tags, name):
    case = _case(tiny_tags, name, temperature=0.9)
    (whole,) = answer(make_engine(tiny_model, tiny_tags), [case])
    for at in range(0, len(whole.text) - 3, 4):
        stop = whole.text[at : at + 3]
        stopped = _case(tiny_tags, name, temperature=0.9, stop=stop, logprobs=True)
        (output,) = answer(make_engine(tiny_model, tiny_tags), [stopped])
        assert output.text == whole.text.split(stop)[0]
        assert output.token_ids == whole.token_ids[: len(output.token_ids)]
        assert output.finish_reason == "stop"
        assert stop in visible_text(output.token_ids, tiny_tags, letters)
        assert stop not in visible_text(output.token_ids[:-1], tiny_tags, letters)
        _check(output, tiny_tags, stopped.params)


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("isolate_spans", [True, False])
@pytest.mark.parametrize("steps_ratio", [1.0, 0.3])
@pytest.mark.parametrize("run_ahead", [False, True])
def test_a_stop_string_cancels_the_spans_behind_it(
    tiny_model, tiny_tags, name, isolate_spans, steps_ratio, run_ahead
):
    """It counts once all before it is filled, in whichever step that is."""
    fields = {"isolate_spans": isolate_spans, "steps_ratio": steps_ratio, "temperature": 0.9}
    (whole,) = answer(make_engine(tiny_model, tiny_tags), [_case(tiny_tags, name, **fields)])
    for at in range(0, len(whole.text) - 2, 2):
        stop = whole.text[at : at + 2]
        case = _case(tiny_tags, name, **fields, stop=[stop])
        (output,) = answer(make_engine(tiny_model, tiny_tags, run_ahead=run_ahead), [case])
        assert output.text == whole.text.split(stop)[0]
        assert output.finish_reason == "stop"
        assert output.token_ids == whole.token_ids[: len(output.token_ids)]
        assert output.usage.num_forwards <= whole.usage.num_forwards
        # Alone and with room, every forward waits for the one before.
        assert output.usage.critical_path == output.usage.num_forwards
        _check(output, tiny_tags, case.params)


def test_a_stop_string_saves_the_rest(tiny_model, tiny_tags):
    (whole,) = answer(make_engine(tiny_model, tiny_tags), [_case(tiny_tags, "rounds")])
    case = _case(tiny_tags, "rounds", stop=whole.text[3:5])
    (output,) = answer(make_engine(tiny_model, tiny_tags), [case])
    assert len(output.rounds) == 1
    assert output.usage.num_forwards < whole.usage.num_forwards / 2


def test_a_stop_string_that_never_comes_changes_nothing(tiny_model, tiny_tags):
    for name in (*PLANS, "ar", "planned", "diffusion"):
        (whole,) = answer(make_engine(tiny_model, tiny_tags), [_case(tiny_tags, name)])
        case = _case(tiny_tags, name, stop=["?", "never"])
        (output,) = answer(make_engine(tiny_model, tiny_tags), [case])
        assert (output.token_ids, output.text) == (whole.token_ids, whole.text)
        assert output.finish_reason == whole.finish_reason


# --- events ---


@pytest.mark.parametrize("name", [*PLANS, "ar", "planned", "diffusion"])
@pytest.mark.parametrize("with_stop", [False, True])
@pytest.mark.parametrize("run_ahead", [False, True])
def test_texts_make_up_the_answer(tiny_model, tiny_tags, name, with_stop, run_ahead):
    fields = {"temperature": 0.9}
    if with_stop:
        (whole,) = answer(make_engine(tiny_model, tiny_tags), [_case(tiny_tags, name, **fields)])
        middle = len(whole.text) // 2
        fields["stop"] = whole.text[middle : middle + 2]
    engine = make_engine(tiny_model, tiny_tags, run_ahead=run_ahead)
    events = _events(engine, _case(tiny_tags, name, **fields))
    texts = [event.text for event in events if isinstance(event, Text)]
    assert "".join(texts) == events[-1].output.text
    assert all(texts)
    assert len(texts) > 1
    assert isinstance(events[-1], Finished)
    assert {event.request_id for event in events} == {"x"}


@pytest.mark.parametrize("stop", [(), "never"])
def test_texts_come_only_where_they_are_wanted(tiny_model, tiny_tags, stop):
    engine = make_engine(tiny_model, tiny_tags)
    engine.add("x", PROMPT, _params(mode="ar", stop=stop), with_text=False)
    events = []
    while engine.has_work:
        events += step(engine)
    assert not any(isinstance(event, Text) for event in events)


@pytest.mark.parametrize("name", [*PLANS, "diffusion"])
@pytest.mark.parametrize("config", [{}, {"max_batch_tokens": 10}, {"run_ahead": True}], ids=str)
def test_the_story_of_a_round(tiny_model, tiny_tags, name, config):
    """Its plan, then its steps, each span's end; what was said is what the output holds."""
    case = _case(tiny_tags, name, record_steps=True, temperature=0.5)
    events = _events(make_engine(tiny_model, tiny_tags, **config), case)
    output = events[-1].output
    ids = [*PROMPT, *output.token_ids]
    round_idx, bounds, steps, done = -1, [], [], {}
    for event in events:
        if isinstance(event, PlanReady):
            round_idx += 1
            assert event.round_idx == round_idx
            assert event.topics == output.rounds[round_idx].topics
            bounds, step_idx = event.bounds, 0
            assert [hi - lo for lo, hi in bounds] == output.rounds[round_idx].lengths
            steps.append([])
        elif isinstance(event, SpanUpdate):
            assert event.step_idx == step_idx
            step_idx += 1
            assert event.positions == sorted(event.positions) or len(bounds) > 1
            assert all(any(lo <= p < hi for lo, hi in bounds) for p in event.positions)
            assert [ids[p] for p in event.positions] == event.token_ids
            steps[-1].append(list(zip(event.positions, event.token_ids, strict=True)))
        elif isinstance(event, SpanDone):
            assert event.round_idx == round_idx
            assert (round_idx, event.span_idx) not in done
            done[round_idx, event.span_idx] = event.text
            lo, hi = bounds[event.span_idx]
            written = {position for each in steps[-1] for position, _ in each}
            assert set(range(lo, hi)) <= written
    assert steps == [r.history for r in output.rounds]
    assert [len(each) for each in steps] == [r.num_steps for r in output.rounds]
    assert done == {
        (r, s): text for r, each in enumerate(output.rounds) for s, text in enumerate(each.spans)
    }
    positions = [position for each in steps for writes in each for position, _ in writes]
    assert len(set(positions)) == len(positions) == sum(sum(r.lengths) for r in output.rounds)


def test_an_empty_span_is_done_too(tiny_model, tiny_tags):
    """A small ``length_scale`` leaves spans without a token."""
    case = Case(PROMPT, _params(length_scale=0.5), user_plan(tiny_tags, [4, 1, 6], [1]))
    events = _events(make_engine(tiny_model, tiny_tags), case)
    assert [r.lengths for r in events[-1].output.rounds] == [[2, 0, 3], [0]]
    done = [(e.round_idx, e.span_idx) for e in events if isinstance(e, SpanDone)]
    assert sorted(done) == [(0, 0), (0, 1), (0, 2), (1, 0)]


@pytest.mark.parametrize("isolate_spans", [True, False])
@pytest.mark.parametrize("rounds", [([4, 1, 6], [5]), ([1, 1], [5]), ([1, 5], [1], [5])], ids=str)
def test_an_empty_span_changes_nothing_of_a_published_cache(
    tiny_model, tiny_tags, isolate_spans, rounds
):
    """Its two tags are read like others, so they need keys and values of their own."""
    params = _params(kv_commit="published", length_scale=0.5, isolate_spans=isolate_spans)
    case = Case(PROMPT, params, user_plan(tiny_tags, *rounds))
    answers = []
    for garbage, prefix_cache in itertools.product([0.0, 3.0, -9.0], [False, True]):
        engine = make_engine(tiny_model, tiny_tags, prefix_cache=prefix_cache, garbage=garbage)
        engine.add("x", case.prompt, case.params, case.rounds)
        engine.check_integrity()  # nothing is computed that was not forwarded
        answers.append(drain(engine)["x"].token_ids)
    assert answers == [answers[0]] * 6


# --- log-probabilities ---


@pytest.mark.parametrize("temperature", [0.0, 1.3])
@pytest.mark.parametrize("mode", ["ar", "planned"])
def test_logprobs_of_tokens_written_one_by_one(tiny_model, tiny_tags, mode, temperature):
    """Those of the model itself: before temperature, filters, and what the grammar bans."""
    params = _params(mode=mode, logprobs=True, temperature=temperature, top_p=0.9, max_tokens=60)
    (output,) = answer(make_engine(tiny_model, tiny_tags), [Case(PROMPT, params)])
    assert output.rounds == []
    ids = [*PROMPT, *output.token_ids]
    expected = full_logits(tiny_model, ids, tiny_tags).log_softmax(-1)
    chosen = expected[len(PROMPT) - 1 : -1].gather(1, torch.tensor(output.token_ids)[:, None])
    assert output.logprobs == pytest.approx(chosen[:, 0].tolist(), abs=1e-3)


@pytest.mark.parametrize("name", [*PLANS, "diffusion"])
@pytest.mark.parametrize("isolate_spans", [True, False])
@pytest.mark.parametrize("unmask", ["entropy", "topk_margin", "confidence_threshold"])
def test_logprobs_of_denoised_tokens(tiny_model, tiny_tags, name, isolate_spans, unmask):
    """Of the step that wrote them: each step is forwarded again, without a cache."""
    case = _case(
        tiny_tags, name, logprobs=True, record_steps=True, isolate_spans=isolate_spans,
        unmask=unmask, threshold=0.4, temperature=0.7,
    )  # fmt: skip
    (output,) = answer(make_engine(tiny_model, tiny_tags), [case])
    final, num_checked = [*PROMPT, *output.token_ids], 0
    logprobs = [None] * len(PROMPT) + output.logprobs
    end = len(PROMPT)
    for plan_round in output.rounds:
        written = {position for writes in plan_round.history for position, _ in writes}
        end = max(written) + 2  # its closing tag
        ids = [tiny_tags.mask if p in written else final[p] for p in range(end)]
        for writes in plan_round.history:
            logits = full_logits(tiny_model, ids, tiny_tags, isolate_spans)
            expected = logits.log_softmax(-1)
            for position, token_id in writes:
                at = expected[position - 1, token_id].item()
                assert logprobs[position] == pytest.approx(at, abs=1e-3)
                num_checked += 1
            for position, token_id in writes:
                ids[position] = token_id
    has_logprob = [logprob is not None for logprob in output.logprobs]
    assert sum(has_logprob) == num_checked == sum(sum(r.lengths) for r in output.rounds)
    for token_id, chosen in zip(output.token_ids, has_logprob, strict=True):
        if token_id in (tiny_tags.async_start, tiny_tags.async_end, tiny_tags.sync):
            assert not chosen  # nor does a user's plan, its sync included


def test_a_plan_of_the_models_own_has_logprobs(tiny_model, tiny_tags):
    """All but the tags of spans; with drafts too."""
    seen = 0
    for seed in range(30):
        params = _params(logprobs=True, temperature=2.5, seed=seed, max_tokens=70)
        (output,) = answer(make_engine(tiny_model, tiny_tags), [Case([seed + 1], params)])
        tags = (tiny_tags.async_start, tiny_tags.async_end)
        for token_id, logprob in zip(output.token_ids, output.logprobs, strict=True):
            assert (logprob is None) == (token_id in tags)
        seen += bool(output.rounds and output.rounds[0].lengths)
    assert seen > 0


@pytest.mark.parametrize("mode", ["ar", "planned", "diffusion"])
def test_asking_for_logprobs_changes_nothing_else(tiny_model, tiny_tags, mode):
    plain, asked = (
        _case(tiny_tags, mode, temperature=1.0, logprobs=logprobs) for logprobs in (False, True)
    )
    company = [Case([9, 8], _params(mode=mode, seed=1)), Case([7], _params(seed=2))]
    (first, *_), (second, *_) = (
        answer(make_engine(tiny_model, tiny_tags), [case, *company]) for case in (plain, asked)
    )
    assert first.token_ids == second.token_ids
    assert first.logprobs is None
    assert all(logprob is None or logprob <= 0 for logprob in second.logprobs)


# --- several answers ---


def test_answers_of_one_prompt_follow_one_another(tiny_model, tiny_tags):
    llm = LLM(tiny_model, tags=tiny_tags)
    params = [_params(mode="ar", temperature=1.0, n=n, seed=10 * n) for n in (1, 3, 2)]
    outputs = llm.generate([PROMPT, [6, 7], [8]], params)
    assert [output.usage.prompt_tokens for output in outputs] == [5, 2, 2, 2, 1, 1]
    for output, (prompt, n, seed) in zip(
        outputs,
        [(PROMPT, 1, 10), ([6, 7], 3, 30), ([6, 7], 3, 31), ([6, 7], 3, 32), ([8], 2, 20),
         ([8], 2, 21)],
        strict=True,
    ):  # fmt: skip
        assert n > 0
        (alone,) = llm.generate([prompt], _params(mode="ar", temperature=1.0, seed=seed))
        assert output.token_ids == alone.token_ids


# --- ends from outside ---


class _Clock:
    """Stands in for the engine's `time`, and moves by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> _Clock:
    clock = _Clock()
    monkeypatch.setattr("pdiff_runtime.engine.engine.time", clock)
    return clock


@pytest.mark.parametrize("name", [*PLANS, "ar", "planned", "diffusion"])
def test_a_deadline_ends_with_what_is_there(tiny_model, tiny_tags, clock, name):
    (whole,) = answer(make_engine(tiny_model, tiny_tags), [_case(tiny_tags, name)])
    texts = []
    for num_steps in (0, 1, 3, 7, 10):
        case = _case(tiny_tags, name, logprobs=True)
        engine = make_engine(tiny_model, tiny_tags)
        engine.add("x", case.prompt, case.params, case.rounds, timeout_s=5.0, with_text=True)
        events = []
        for _ in range(num_steps):
            events += step(engine)
        clock.now += 5.0
        if engine.has_work:
            events += step(engine)
        assert not engine.has_work
        assert engine.num_steps <= num_steps
        output = finished(events)["x"]
        if output.finish_reason == "deadline":
            assert whole.text.startswith(output.text)
            assert output.token_ids == whole.token_ids[: len(output.token_ids)]
            assert "".join(e.text for e in events if isinstance(e, Text)) == output.text
            assert output.usage.critical_path == output.usage.num_forwards == num_steps
        _check(output, tiny_tags, case.params)
        assert engine.allocator.num_free == engine.allocator.num_pages
        texts.append(output.text)
    assert texts == sorted(texts, key=len)
    assert texts[0] == ""
    assert texts[-1] != ""


def test_a_deadline_counts_from_submission(tiny_model, tiny_tags, clock):
    """Also for those that wait; others go on."""
    engine = make_engine(tiny_model, tiny_tags, max_requests=1)
    engine.add("runs", PROMPT, _params(mode="ar"))
    engine.add("waits", PROMPT, _params(mode="ar"), timeout_s=2.0)
    step(engine)
    clock.now += 1.9
    assert finished(step(engine)) == {}
    clock.now += 0.2
    assert finished(step(engine))["waits"].finish_reason == "deadline"
    assert drain(engine)["runs"].finish_reason in ("stop", "length")


def test_a_tiny_timeout_is_a_deadline(tiny_model, tiny_tags):
    engine = make_engine(tiny_model, tiny_tags)
    engine.add("x", PROMPT, _params(), timeout_s=1e-9)
    output = drain(engine)["x"]
    assert (output.finish_reason, output.token_ids, output.text) == ("deadline", [], "")
    assert engine.num_steps == 0


@pytest.mark.parametrize("phase", ["waiting", "prefill", "plan", "denoise", "commit"])
@pytest.mark.parametrize("end", ["abort", "deadline"])
def test_a_request_may_end_in_any_phase(tiny_model, tiny_tags, phase, end):
    engine = make_engine(tiny_model, tiny_tags, max_requests=2, max_batch_tokens=8)
    params = _params(logprobs=True, max_tokens=60)
    if phase == "plan":
        case = Case([1] * 20, params)
    else:
        case = Case([1] * 20, params, user_plan(tiny_tags, [3, 2, 1], [2]))
    company = Case([3] * 6, _params(mode="ar", max_tokens=30))
    (expected,) = answer(make_engine(tiny_model, tiny_tags), [company])
    engine.add("other", company.prompt, company.params)
    if phase == "waiting":
        engine.add("third", company.prompt, company.params)
    engine.add("x", case.prompt, case.params, case.rounds)
    x, others = request_of(engine, "x"), {}
    for _ in range(100):
        if x.phase == phase and engine.num_steps > 2:
            break
        others |= finished(step(engine))
    assert x.phase == phase
    if end == "abort":
        outputs = finished(engine.abort(["x", "unknown", "x"]))
        engine.check_integrity()
    else:
        x.deadline = 0.0
        outputs = finished(step(engine))
    assert outputs["x"].finish_reason == end
    assert outputs["x"].error is None
    _check(outputs["x"], tiny_tags, case.params)
    others |= drain(engine)
    assert others["other"].token_ids == expected.token_ids


@pytest.mark.parametrize("name", [*PLANS, "ar", "planned", "diffusion"])
def test_an_aborted_request_that_waits_has_no_text(tiny_model, tiny_tags, name):
    engine = make_engine(tiny_model, tiny_tags)
    case = _case(tiny_tags, name, logprobs=True)
    engine.add("x", case.prompt, case.params, case.rounds)
    output = finished(engine.abort(["x"]))["x"]
    assert (output.finish_reason, output.text) == ("abort", "")
    assert output.usage.num_forwards == output.usage.critical_path == 0
    _check(output, tiny_tags, case.params)
    assert not engine.has_work


# --- the bundled model, with text that is text ---


@pytest.fixture(scope="module")
def bundled() -> LLM:
    if not (BUNDLED_MODEL / "model.safetensors").is_file():
        pytest.skip("this installation has no bundled model")
    return LLM(dtype=torch.float32)


QUESTION = "Tell me about the Comoros: currency, languages, capital, exports"


@pytest.mark.parametrize("mode", ["planned", "ar", "diffusion"])
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_stream_says_what_generate_returns(bundled, mode, temperature):
    params = GenerationParams(mode=mode, max_tokens=90, temperature=temperature, seed=2)
    (whole,) = bundled.generate(QUESTION, params)
    events = list(bundled.stream(QUESTION, params))
    texts = [event.text for event in events if isinstance(event, Text)]
    assert events[-1].output.token_ids == whole.token_ids
    assert "".join(texts) == events[-1].output.text == whole.text
    assert len(texts) > 1
    done = {(e.round_idx, e.span_idx): e.text for e in events if isinstance(e, SpanDone)}
    spans = {(r, s): t for r, each in enumerate(whole.rounds) for s, t in enumerate(each.spans)}
    assert done == spans
    assert (mode == "ar") == (not spans)


@pytest.mark.parametrize("mode", ["planned", "ar", "diffusion"])
def test_stop_strings_in_real_text(bundled, mode):
    params = {"mode": mode, "max_tokens": 60, "seed": 2, "temperature": 1.0}
    (whole,) = bundled.generate(QUESTION, GenerationParams(**params))
    words = [word for word in whole.text.split() if len(word) > 2]
    for stop in (words[1], words[-1], f"{words[2][1:]} {words[3][:1]}", ". ", "\n"):
        stopped = GenerationParams(**params, stop=[stop])
        events = list(bundled.stream(QUESTION, stopped))
        output = events[-1].output
        assert output.text == whole.text.split(stop)[0]
        assert "".join(e.text for e in events if isinstance(e, Text)) == output.text
