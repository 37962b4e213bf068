"""Results do not depend on the schedule: rows, pages and company change when, never what."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
from conftest import TINY_TAGS
from tiny_engine import (
    Case,
    WorkLog,
    answer,
    answer_alone,
    drain,
    finished,
    make_engine,
    preempt,
    request_of,
    step,
    user_plan,
)

from pdiff_runtime import GenerationParams

INVARIANT = {"batch_invariant": True, "draft_plan": False}
"""Equal bits in any company; without drafts, which take a spare row, also equal decisions."""


def _params(**fields: object) -> GenerationParams:
    return GenerationParams(**{"max_tokens": 100, "seed": 3, **fields})


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    """Every mode, rule and cache policy, prompts of 1 to 60 tokens, two that begin alike."""

    def plan(*rounds):
        return user_plan(TINY_TAGS, *rounds)

    shared = [7, 3, 9, 11] * 9
    return [
        Case([5], _params(mode="ar", max_tokens=60, temperature=0.8)),
        Case([1, 2, 3], _params(max_tokens=120)),
        Case([4] * 21, _params(steps_ratio=0.4), plan([3, 1, 4], [2, 2])),
        Case([8, 9], _params(mode="diffusion", max_tokens=40, unmask="topk_margin")),
        Case([6, 5, 4] * 6, _params(isolate_spans=False), plan([2, 3], [4, 1])),
        Case([3] * 5, _params(kv_commit="published", steps_ratio=0.3), plan([3, 2], [4], [1, 1])),
        Case([*shared, 1], _params(temperature=0.7, top_p=0.9), plan([5], [1, 2, 3])),
        Case([*shared, 2], _params(unmask="maskgit_plus", alg_temp=0.5), plan([2, 2, 2, 2])),
        Case([10] * 60, _params(unmask="confidence_threshold", threshold=0.2), plan([6], [3])),
        Case([2, 30], _params(isolate_spans=False, kv_commit="published"), plan([1, 4, 2], [3])),
        Case([12] * 17, _params(mode="diffusion", max_tokens=50, steps_ratio=0.5, top_k=5)),
        Case([9, 8], _params(temperature=1.2, max_tokens=80, seed=11)),
        Case([31] * 33, _params(mode="ar", max_tokens=40)),
        Case([1, 1], _params(max_tokens=31), plan([3, 3, 3])),
        Case([22] * 40, _params(unmask="topk_margin", steps_ratio=0.2), plan([1, 7], [2], [2])),
    ]


@pytest.fixture(scope="module")
def alone(tiny_model, cases):
    """Each case by itself, with room for everything."""
    return answer_alone(tiny_model, TINY_TAGS, cases, **INVARIANT)


@pytest.fixture(scope="module")
def growing() -> list[Case]:
    """Long answers to short prompts: they are admitted early, and need pages late."""
    seeds = (1, 3, 7, 8, 9, 13)
    return [Case([s + 1, 2], _params(mode="ar", temperature=1.0, seed=s)) for s in seeds]


def _story(output):
    """What no schedule may change."""
    rounds = [(r.topics, r.lengths, r.spans) for r in output.rounds]
    usage = output.usage
    counts = usage.plan_tokens, usage.span_tokens, usage.pad_tokens, usage.critical_path
    return output.token_ids, output.finish_reason, output.text, rounds, counts


def _pages_needed(cases, page_size: int) -> list[int]:
    return [-(-(len(case.prompt) + case.params.max_tokens) // page_size) for case in cases]


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"max_batch_tokens": 1},
        {"max_batch_tokens": 7},
        {"max_batch_tokens": 40},
        {"max_requests": 3},
        {"max_requests": 1},
        {"prefix_cache": False},
        {"max_logits_rows": 1},
        {"run_ahead": True},
        {"run_ahead": True, "max_batch_tokens": 40, "kv_cache_tokens": 400},
        {"max_logits_rows": 5, "max_batch_tokens": 23},
        {"page_size": 1, "kv_cache_tokens": 300},
        {"page_size": 7, "kv_cache_tokens": 400, "max_batch_tokens": 30},
    ],
    ids=str,
)
def test_no_schedule_changes_a_result(tiny_model, tiny_tags, cases, alone, config):
    engine = make_engine(tiny_model, tiny_tags, **INVARIANT, **config)
    for expected, output in zip(alone, answer(engine, cases), strict=True):
        assert _story(output) == _story(expected)


@pytest.mark.parametrize("max_batch_tokens", [7, 2048])
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_half_of_the_pages_are_enough(
    tiny_model, tiny_tags, cases, alone, growing, max_batch_tokens, prefix_cache
):
    """Whoever loses its pages goes on from its tokens, and only time is lost."""
    config = {"prefix_cache": prefix_cache, "max_batch_tokens": max_batch_tokens, **INVARIANT}
    mixed = [case for pair in zip(growing, cases, strict=False) for case in pair]
    roomy = make_engine(tiny_model, tiny_tags, **config)
    expected, peak = answer(roomy, mixed), roomy.allocator.peak
    for num_pages in (peak // 2, max(_pages_needed(mixed, 16))):
        tight = make_engine(tiny_model, tiny_tags, kv_cache_tokens=16 * num_pages, **config)
        outputs = answer(tight, mixed)
        assert list(map(_story, outputs)) == list(map(_story, expected))
        assert [_story(output) for output in outputs[1::2]] == list(map(_story, alone))[
            : len(growing)
        ]
        assert sum(output.usage.num_preemptions for output in outputs) > 0
        assert tight.scheduler.num_preemptions == sum(o.usage.num_preemptions for o in outputs)


@pytest.mark.parametrize("isolate_spans", [True, False])
@pytest.mark.parametrize("max_batch_tokens", [7, 20, 40, 2048])
def test_preemption_at_any_moment_changes_nothing(
    tiny_model, tiny_tags, max_batch_tokens, isolate_spans
):
    """Prompt, plan and finished spans are computed again in chunks, each on the one before."""
    rounds = user_plan(tiny_tags, [2, 3, 1], [4, 2], [3])
    case = Case(list(range(1, 31)), _params(isolate_spans=isolate_spans), rounds)
    (expected,) = answer_alone(tiny_model, tiny_tags, [case], **INVARIANT)
    for num_steps in range(3, 40, 5):
        engine = make_engine(
            tiny_model, tiny_tags, max_batch_tokens=max_batch_tokens, prefix_cache=False,
            **INVARIANT,
        )  # fmt: skip
        engine.add("x", case.prompt, case.params, case.rounds)
        outputs = {}
        for _ in range(num_steps):
            outputs |= finished(step(engine))
        if engine.has_work:
            preempt(engine, "x")
            outputs |= drain(engine)
        assert _story(outputs["x"]) == _story(expected), f"preempted after {num_steps} steps"


def test_pages_that_changed_hands_are_not_written_again(tiny_model, tiny_tags):
    """The same rows as before preemption lie in other pages now."""
    cases = [Case([5] * 14, _params(mode="ar")), Case(list(range(1, 36)), _params(mode="ar"))]
    expected = answer_alone(tiny_model, tiny_tags, cases, **INVARIANT)
    engine = make_engine(tiny_model, tiny_tags, max_batch_tokens=16, **INVARIANT)
    outputs = {}
    engine.add("0", cases[0].prompt, cases[0].params)
    step(engine)
    engine.add("1", cases[1].prompt, cases[1].params)
    for _ in range(4):  # meanwhile the first one's next page is that which the second one held
        outputs |= finished(step(engine))
        preempt(engine, "1")
    outputs |= drain(engine)
    assert [_story(outputs[i]) for i in "01"] == list(map(_story, expected))


@pytest.mark.parametrize("run_ahead", [False, True])
def test_requests_may_come_at_any_time(tiny_model, tiny_tags, cases, alone, run_ahead):
    engine = make_engine(
        tiny_model, tiny_tags, kv_cache_tokens=500, run_ahead=run_ahead, **INVARIANT
    )
    outputs = {}
    for idx, case in enumerate(cases):
        engine.add(str(idx), case.prompt, case.params, case.rounds, priority=-(idx % 3))
        for _ in range(idx % 4):
            outputs |= finished(step(engine))
    outputs |= drain(engine)
    for idx, expected in enumerate(alone):
        assert _story(outputs[str(idx)]) == _story(expected)


@pytest.mark.parametrize("rounds", [([3], [3]), ([2, 3], [3, 1], [1, 1]), ([2], [2], [2])], ids=str)
@pytest.mark.parametrize("threshold", [0.0, 0.3])
@pytest.mark.parametrize("isolate_spans", [True, False])
def test_a_step_launched_ahead_may_be_for_nothing(
    tiny_model, tiny_tags, rounds, threshold, isolate_spans
):
    """Without a quota nobody knows that a round ends; the next one is as wide."""
    params = _params(
        unmask="confidence_threshold", threshold=threshold, isolate_spans=isolate_spans
    )
    case = Case([1] * 20, params, user_plan(tiny_tags, *rounds))
    (expected,) = answer_alone(tiny_model, tiny_tags, [case], **INVARIANT)
    engine = make_engine(tiny_model, tiny_tags, run_ahead=True, **INVARIANT)
    engine.add("x", case.prompt, case.params, case.rounds)
    for _ in range(3 * expected.usage.num_forwards):
        for output in finished(step(engine)).values():
            assert _story(output) == _story(expected)
    assert not engine.has_work


def test_drafts_take_spare_rows_only(tiny_model, tiny_tags):
    """With drafts the answers are the same, in fewer decisions where rows are spare."""
    cases = [
        Case([seed + 1, 2, 3], _params(max_tokens=80, temperature=1.2 * (seed % 3), seed=seed))
        for seed in range(12)
    ]
    alone = answer_alone(tiny_model, tiny_tags, cases, **INVARIANT)
    for max_batch_tokens in (1, 2048):
        engine = make_engine(
            tiny_model, tiny_tags, batch_invariant=True, max_batch_tokens=max_batch_tokens
        )
        outputs = answer(engine, cases)
        assert [o.token_ids for o in outputs] == [o.token_ids for o in alone]
        saved = [
            expected.usage.critical_path - output.usage.critical_path
            for expected, output in zip(alone, outputs, strict=True)
        ]
        assert min(saved) >= 0
        assert (max(saved) > 0) == (max_batch_tokens > 1)


# --- what requests cost ---


@pytest.mark.parametrize("config", [{}, {"max_batch_tokens": 5}, {"kv_cache_tokens": 320}], ids=str)
def test_the_costs_add_up(tiny_model, tiny_tags, cases, config):
    for output in answer(make_engine(tiny_model, tiny_tags, **config), cases):
        usage = output.usage
        assert usage.num_forwards >= usage.critical_path > 0
        assert usage.plan_tokens + usage.span_tokens == len(output.token_ids)
        assert 0 <= usage.pad_tokens <= usage.span_tokens
        assert usage.cached_tokens <= usage.prompt_tokens + usage.plan_tokens


def test_the_times_of_the_phases_add_up(tiny_model, tiny_tags, cases):
    for output in answer(make_engine(tiny_model, tiny_tags, max_requests=3), cases):
        seconds_in = output.usage.seconds_in
        assert min(seconds_in.values()) >= 0
        assert set(seconds_in) <= {"waiting", "prefill", "plan", "denoise", "commit"}
        assert sum(seconds_in.values()) == pytest.approx(output.usage.seconds, rel=1e-9, abs=0)


# --- who is served first ---


def _order_of_service(engine) -> list[str]:
    """Ids in the order of their first forward."""
    served: list[str] = []
    while engine.has_work:
        step(engine)
        for request in engine.scheduler.running:
            if request.request_id not in served:
                served.append(request.request_id)
    return served


def test_smaller_priorities_first_then_in_order(tiny_model, tiny_tags):
    engine = make_engine(tiny_model, tiny_tags, max_requests=1)
    params = _params(mode="ar", max_tokens=4)
    for request_id, priority in [("a", 0), ("b", 0), ("c", -1), ("d", 1), ("e", -1), ("f", 0)]:
        engine.add(request_id, [1, 2], params, priority=priority)
    assert _order_of_service(engine) == ["c", "e", "a", "b", "f", "d"]


def test_a_late_urgent_request_overtakes_the_queue(tiny_model, tiny_tags):
    engine = make_engine(tiny_model, tiny_tags, max_requests=1)
    params = _params(mode="ar", max_tokens=4)
    for request_id in "ab":
        engine.add(request_id, [1, 2], params)
    step(engine)  # "a" runs, and goes on
    engine.add("urgent", [3, 4], params, priority=-5)
    assert _order_of_service(engine) == ["a", "urgent", "b"]


def test_pages_go_to_the_urgent_request(tiny_model, tiny_tags):
    """Of two that do not fit together the one with the larger number loses its pages."""
    engine = make_engine(tiny_model, tiny_tags, kv_cache_tokens=96)
    params = _params(mode="ar", max_tokens=70)
    engine.add("early", [1, 2], params, priority=1)
    engine.add("urgent", [3, 4], params, priority=0)
    outputs = drain(engine)
    assert [len(output.token_ids) for output in outputs.values()] == [70, 70]
    assert outputs["urgent"].usage.num_preemptions == 0
    assert outputs["early"].usage.num_preemptions > 0


def test_the_preempted_goes_on_before_those_who_came_later(tiny_model, tiny_tags):
    engine = make_engine(tiny_model, tiny_tags, max_requests=1)
    params = _params(mode="ar", max_tokens=6)
    for request_id in "abc":
        engine.add(request_id, [1, 2], params)
    step(engine)
    preempt(engine, "a")
    assert [r.request_id for r in engine.scheduler.waiting] == ["a", "b", "c"]
    assert _order_of_service(engine) == ["a", "b", "c"]


# --- what a forward holds ---


def _rows(work) -> int:
    return sum(hi - lo for lo, hi, _, _ in work.context) + sum(s.hi - s.lo for s in work.spans)


def test_a_forward_is_filled_in_order(tiny_model, tiny_tags, monkeypatch):
    """Next tokens, then started spans, then chunks of prompts, whoever came first."""
    engine = make_engine(tiny_model, tiny_tags, max_batch_tokens=24, draft_plan=False)
    log = WorkLog(engine, monkeypatch)
    engine.add("spans", [1], _params(mode="diffusion", max_tokens=12))
    step(engine)
    engine.add("writer", [2], _params(mode="ar", max_tokens=30, seed=7, temperature=1.5))
    step(engine)
    engine.add("prompt", [3] * 60, _params(mode="ar", max_tokens=10), priority=-1)
    for _ in range(4):
        step(engine)
    for forward in log.forwards[2:]:
        assert list(forward)[:2] == ["writer", "spans"]
        assert [_rows(work) for work in forward.values()] == [1, 12, 11]


def test_a_chunk_is_what_fits(tiny_model, tiny_tags, monkeypatch):
    engine = make_engine(tiny_model, tiny_tags, max_batch_tokens=7, draft_plan=False)
    log = WorkLog(engine, monkeypatch)
    engine.add("x", [1] * 30, _params(mode="ar", max_tokens=1))
    drain(engine)
    assert [_rows(forward["x"]) for forward in log.forwards] == [7, 7, 7, 7, 2]


@pytest.mark.parametrize("isolate_spans", [True, False])
@pytest.mark.parametrize("max_batch_tokens", [1, 5, 12, 20, 33, 64])
def test_no_forward_is_too_long(
    tiny_model, tiny_tags, monkeypatch, max_batch_tokens, isolate_spans
):
    """Unless spans that belong together are longer: they run without other spans."""
    engine = make_engine(
        tiny_model, tiny_tags, max_batch_tokens=max_batch_tokens, kv_cache_tokens=700
    )
    log = WorkLog(engine, monkeypatch)
    for idx in range(6):
        params = _params(
            isolate_spans=isolate_spans, seed=idx, temperature=1.0, steps_ratio=0.4, max_tokens=150
        )
        rounds = user_plan(tiny_tags, [3, 1 + idx, 2], [9, 4])
        engine.add(str(idx), [idx + 1] * (1 + 7 * idx), params, rounds)
        engine.add(f"{idx}w", [idx + 1], dataclasses.replace(params, mode="ar", max_tokens=60))
    drain(engine)
    for forward in log.forwards:
        rows = sum(map(_rows, forward.values()))
        groups = list(itertools.chain.from_iterable(map(_groups, forward.values())))
        if rows > max_batch_tokens:
            assert len(groups) == 1
            assert groups[0] > max_batch_tokens


def _groups(work) -> list[int]:
    """Rows of each group of spans that cannot be cut: one span, or the joint ones of a round."""
    spans = [hi - lo for lo, hi, kind, _ in work.context if kind == "full"]
    opened = [span.hi - span.lo for span in work.spans]
    if work.request.params.isolate_spans:
        return [*spans, *opened]
    return [sum(group) for group in (spans, opened) if group]


def test_a_span_longer_than_a_forward_runs(tiny_model, tiny_tags, monkeypatch):
    engine = make_engine(tiny_model, tiny_tags, max_batch_tokens=8)
    log = WorkLog(engine, monkeypatch)
    for request_id in "ab":
        engine.add(request_id, [1], _params(mode="diffusion", max_tokens=40, steps_ratio=0.2))
    outputs = drain(engine)
    assert [outputs[i].finish_reason for i in "ab"] == ["stop", "stop"]
    spans = [[i for i, work in forward.items() if work.spans] for forward in log.forwards]
    assert [len(ids) for ids in spans if ids] == [1] * 14  # never both


@pytest.mark.parametrize(("max_batch_tokens", "most"), [(24, 1), (36, 2), (48, 3), (64, 3)])
def test_spans_come_in_waves_where_rows_are_short(
    tiny_model, tiny_tags, monkeypatch, max_batch_tokens, most
):
    """In reading order, and a wave's last spans end before the next wave."""
    engine = make_engine(tiny_model, tiny_tags, max_batch_tokens=max_batch_tokens)
    log = WorkLog(engine, monkeypatch)
    engine.add("x", [1], _params(), user_plan(tiny_tags, [8, 7, 6]))  # 18, 16 and 14 rows
    starts = [span.lo for span in request_of(engine, "x").open_round.spans]
    drain(engine)
    running = [[span.lo for span in forward["x"].spans] for forward in log.forwards]
    assert max(map(len, running)) == most
    assert all(each == sorted(each) for each in running)
    assert (
        sorted(starts, key=lambda lo: next(n for n, f in enumerate(running) if lo in f)) == starts
    )
    for lo, num_steps in zip(starts, (16, 14, 12), strict=True):
        where = [n for n, forward in enumerate(running) if lo in forward]
        assert where == list(range(where[0], where[0] + num_steps))  # started, it runs until full


def test_spans_come_in_waves_where_pages_are_short(tiny_model, tiny_tags):
    """While another request holds them; those of finished spans serve the next wave."""
    case = Case([1] * 2, _params(max_tokens=120), user_plan(tiny_tags, [1], [15, 15, 15]))
    other = Case([5] * 30, _params(mode="ar", max_tokens=100))
    expected = answer_alone(tiny_model, tiny_tags, [case, other], **INVARIANT)
    engine = make_engine(tiny_model, tiny_tags, kv_cache_tokens=9 * 16, **INVARIANT)
    assert [_story(output) for output in answer(engine, [case, other])] == list(
        map(_story, expected)
    )


def test_later_requests_do_not_take_rows_that_spans_wait_for(tiny_model, tiny_tags, monkeypatch):
    engine = make_engine(tiny_model, tiny_tags, max_batch_tokens=32)
    log = WorkLog(engine, monkeypatch)
    engine.add("a", [1], _params(mode="diffusion", max_tokens=20, steps_ratio=0.5))
    step(engine)
    engine.add("b", [2], _params(mode="diffusion", max_tokens=24, steps_ratio=0.5))
    engine.add("c", [3], _params(mode="diffusion", max_tokens=6))
    drain(engine)
    starts = {i: next(n for n, f in enumerate(log.forwards) if i in f and f[i].spans) for i in "bc"}
    assert starts["b"] <= starts["c"]


@pytest.mark.parametrize("isolate_spans", [True, False])
def test_started_spans_do_not_wait_for_later_requests(tiny_model, tiny_tags, isolate_spans):
    """A stream of short requests must not keep a batch's worth of spans from going on."""
    engine = make_engine(tiny_model, tiny_tags, max_batch_tokens=20, draft_plan=False)
    params = _params(mode="diffusion", max_tokens=20, isolate_spans=isolate_spans)
    engine.add("first", [1], params)
    num_added = 0
    while "first" in engine.request_ids and engine.num_steps < 200:
        if len(engine.request_ids) < 3:
            num_added += 1
            engine.add(f"later {num_added}", [2], _params(mode="ar", max_tokens=8))
        step(engine)
    assert engine.num_steps < 2 * 18 + 5  # 18 tokens, one per step
    drain(engine)


def test_rows_are_not_given_to_spans_without_pages(tiny_model, tiny_tags):
    """Spans that wait for the pages of a published cache do not stop its request."""
    config = {"page_size": 4, "kv_cache_tokens": 48, "max_batch_tokens": 18, **INVARIANT}
    wide = Case([1], _params(max_tokens=31), user_plan(tiny_tags, [1], [8]))
    pinned = Case([2, 3], _params(mode="ar", max_tokens=30, kv_commit="published"))
    expected = answer_alone(tiny_model, tiny_tags, [wide, pinned], **INVARIANT)
    outputs = answer(make_engine(tiny_model, tiny_tags, **config), [wide, pinned])
    assert list(map(_story, outputs)) == list(map(_story, expected))


# --- who gets which pages ---


def test_the_first_request_always_gets_on(
    tiny_model, tiny_tags, cases, growing, monkeypatch
):  # fmt: skip
    """Whatever the others hold, it takes part in every forward from its admission on."""
    mixed = [*growing, *(case for case in cases if case.params.kv_commit != "published")]
    engine = make_engine(tiny_model, tiny_tags, kv_cache_tokens=176, prefix_cache=False)
    log = WorkLog(engine, monkeypatch)
    for idx, case in enumerate(mixed):
        engine.add(str(idx), case.prompt, case.params, case.rounds)
    while engine.has_work:
        first = engine.scheduler.running[0] if engine.scheduler.running else None
        step(engine)
        if first is not None:
            assert first.request_id in log.forwards[-1]
    assert len(log.forwards) == engine.num_steps
    assert engine.scheduler.num_preemptions > 0


def _two_rounds_beside_another(tiny_model, tiny_tags, *, num_pages: int, numbers, max_tokens: int):
    """A request that opens its second round while another one holds pages."""
    engine = make_engine(
        tiny_model, tiny_tags, kv_cache_tokens=16 * num_pages, prefix_cache=False, **INVARIANT
    )
    rounds = user_plan(tiny_tags, [1], numbers)
    engine.add("x", [1] * 2, _params(max_tokens=max_tokens), rounds)
    engine.add("other", [5] * 30, _params(mode="ar", max_tokens=34))
    x, other = request_of(engine, "x"), request_of(engine, "other")
    while len(x.rounds) < 2 or x.phase != "denoise":
        assert other.usage.num_preemptions == 0
        step(engine)
    return engine, x, other


def test_a_first_span_takes_pages_from_others(tiny_model, tiny_tags):
    engine, x, other = _two_rounds_beside_another(
        tiny_model, tiny_tags, num_pages=4, numbers=[15], max_tokens=60
    )
    assert x.open_round.spans[0].is_started
    assert x.pages.num_pages == 3
    assert other.usage.num_preemptions == 1
    drain(engine)


def test_further_spans_wait_for_pages(tiny_model, tiny_tags):
    engine, x, other = _two_rounds_beside_another(
        tiny_model, tiny_tags, num_pages=9, numbers=[15, 15, 15], max_tokens=120
    )
    assert [span.is_started for span in x.open_round.spans] == [True, True, False]
    assert x.pages.num_pages == 6  # of 8 for all three
    drain(engine)
    assert other.usage.num_preemptions == 0


def test_a_published_cache_is_never_taken(tiny_model, tiny_tags, cases, growing):
    """It cannot be computed again."""
    mixed = [*growing[:3], *cases, *growing[3:], *cases]
    engine = make_engine(tiny_model, tiny_tags, kv_cache_tokens=320)
    outputs = answer(engine, mixed)
    assert engine.scheduler.num_preemptions > 0
    for case, output in zip(mixed, outputs, strict=True):
        if case.params.kv_commit == "published":
            assert output.usage.num_preemptions == 0


@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("isolate_spans", [True, False])
@pytest.mark.parametrize("rounds", [([9, 2, 5, 1, 8],), ([4, 2], [1, 9, 3])], ids=str)
def test_open_spans_hold_little_more_than_they_need(
    tiny_model, tiny_tags, page_size, isolate_spans, rounds
):
    engine = make_engine(tiny_model, tiny_tags, page_size=page_size, kv_cache_tokens=400)
    params = _params(max_tokens=150, isolate_spans=isolate_spans)
    engine.add("x", [1] * 11, params, user_plan(tiny_tags, *rounds))
    request = request_of(engine, "x")
    num_checked = 0
    while engine.has_work:
        step(engine)
        if request.is_done or request.phase != "denoise":
            continue
        num_held, least = _held_and_needed(request, page_size)
        assert num_held <= least
        num_checked += 1
    assert num_checked > 5


def _held_and_needed(request, page_size: int) -> tuple[int, int]:
    """Pages a request holds, and the most it may: one per open span and one for the context more
    than its tokens fill."""
    spans = request.open_round.spans
    is_last = len(request.rounds) == request.num_announced and not request._user_rounds
    if request.params.isolate_spans and is_last:
        spans = [span for span in spans if span.masked]
    num_tokens = request.open_round.lo + sum(span.hi - span.lo for span in spans)
    return len(request.pages.held()), math.ceil(num_tokens / page_size) + len(spans) + 1


def test_pages_of_finished_spans_come_back(tiny_model, tiny_tags):
    engine = make_engine(tiny_model, tiny_tags, page_size=4)
    engine.add("x", [1], _params(max_tokens=120), user_plan(tiny_tags, [8, 20, 12]))
    request = request_of(engine, "x")
    held = []
    while engine.has_work:
        step(engine)
        if not request.is_done:
            held.append(len(request.pages.held()))
    assert sorted(held, reverse=True) == held  # 16, 40 and 24 tokens
    assert held[0] - held[16] >= 16 // 4
    assert held[0] - held[24] >= (16 + 24) // 4


def test_the_preempted_takes_no_pages_for_finished_spans(tiny_model, tiny_tags):
    engine = make_engine(tiny_model, tiny_tags, page_size=4)
    engine.add("x", [1], _params(max_tokens=120), user_plan(tiny_tags, [4, 4, 4, 16]))
    request = request_of(engine, "x")
    for _ in range(12):
        step(engine)
    assert [bool(span.masked) for span in request.open_round.spans] == [False] * 3 + [True]
    before = len(request.pages.held())
    preempt(engine, "x")
    step(engine)
    assert request.is_running
    assert len(request.pages.held()) <= before
    drain(engine)
