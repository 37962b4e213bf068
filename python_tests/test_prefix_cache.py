"""Pages that requests share: only where all that decides their content agrees."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from tiny_engine import (
    Case,
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
from pdiff_runtime.engine import Engine
from pdiff_runtime.engine.request import Work
from pdiff_runtime.engine.runner import Predicted

PAGE = 16
PROMPT = [1 + (idx * idx + 3 * idx) % 37 for idx in range(70)]
INVARIANT = {"batch_invariant": True}


def _params(**fields: object) -> GenerationParams:
    return GenerationParams(**{"max_tokens": 60, "seed": 3, **fields})


def _together(engine: Engine) -> dict[str, list[int]]:
    """Pages that each request holds."""
    return {r.request_id: r.pages.held() for r in engine.scheduler.running}


# --- prompts ---


@pytest.mark.parametrize("prompt_len", [1, 15, 16, 17, 31, 32, 33, 70])
@pytest.mark.parametrize("mode", ["ar", "planned", "diffusion"])
def test_the_second_request_takes_the_pages_of_the_first(
    tiny_model, tiny_tags, mode, prompt_len
):  # fmt: skip
    """All full pages; the row that predicts is computed in any case."""
    engine = make_engine(tiny_model, tiny_tags, **INVARIANT)
    case = Case(PROMPT[:prompt_len], _params(mode=mode))
    (first,), (second,) = answer(engine, [case]), answer(engine, [case])
    (expected,) = answer_alone(tiny_model, tiny_tags, [case], prefix_cache=False, **INVARIANT)
    needs_last_row = mode != "diffusion"
    assert first.usage.cached_tokens == 0
    assert second.usage.cached_tokens == (prompt_len - needs_last_row) // PAGE * PAGE
    assert first.token_ids == second.token_ids == expected.token_ids


def test_a_longer_answer_shares_what_was_written(tiny_model, tiny_tags):
    """A plan is shared like a prompt, by a request that repeats it."""
    engine = make_engine(tiny_model, tiny_tags, **INVARIANT)
    rounds = user_plan(tiny_tags, [3, 1, 2, 2])
    case = Case(PROMPT[:10], _params(max_tokens=80), rounds)
    (first,), (second,) = answer(engine, [case]), answer(engine, [case])
    assert second.usage.cached_tokens == (10 + 16) // PAGE * PAGE
    assert first.token_ids == second.token_ids


@pytest.mark.parametrize(
    ("prompt", "num_shared"),
    [
        ([*PROMPT[:69], 9], 64), ([*PROMPT[:63], 9, *PROMPT[64:]], 48), ([9, *PROMPT[1:]], 0),
        (PROMPT[:40], 32), ([*PROMPT, *PROMPT], 64), (PROMPT[7:], 0),
    ],
)  # fmt: skip
def test_pages_are_shared_up_to_the_first_difference(tiny_model, tiny_tags, prompt, num_shared):
    engine = make_engine(tiny_model, tiny_tags, **INVARIANT)
    answer(engine, [Case(PROMPT, _params())])
    case = Case(prompt, _params())
    (output,) = answer(engine, [case])
    (expected,) = answer_alone(tiny_model, tiny_tags, [case], prefix_cache=False, **INVARIANT)
    assert output.usage.cached_tokens == num_shared
    assert output.token_ids == expected.token_ids


def test_without_the_cache_nothing_is_shared(tiny_model, tiny_tags):
    engine = make_engine(tiny_model, tiny_tags, prefix_cache=False)
    outputs = [answer(engine, [Case(PROMPT, _params())])[0] for _ in range(2)]
    assert [output.usage.cached_tokens for output in outputs] == [0, 0]
    assert engine.allocator.num_cached == 0


def test_prompts_that_come_together_are_told_apart(tiny_model, tiny_tags):
    """Nobody has published yet; later ones of the same prompt keep their own pages."""
    engine = make_engine(tiny_model, tiny_tags, **INVARIANT)
    cases = [Case(PROMPT, _params(mode="ar", temperature=1.0, seed=seed)) for seed in range(4)]
    outputs = answer(engine, cases)
    expected = answer_alone(tiny_model, tiny_tags, cases, prefix_cache=False, **INVARIANT)
    assert [o.token_ids for o in outputs] == [o.token_ids for o in expected]
    assert {o.usage.cached_tokens for o in outputs} == {0}


def test_old_prefixes_make_room(tiny_model, tiny_tags):
    """Under pressure cached pages are taken back; answers stay right, and so do the books."""
    engine = make_engine(tiny_model, tiny_tags, kv_cache_tokens=10 * PAGE, **INVARIANT)
    cases = [Case([idx + 1] * 40, _params(max_tokens=30, mode="ar")) for idx in range(12)]
    expected = answer_alone(tiny_model, tiny_tags, cases, prefix_cache=False, **INVARIANT)
    for order in (range(12), reversed(range(12)), [0, 0, 5, 0, 11, 5]):
        for idx in order:
            (output,) = answer(engine, [cases[idx]])
            assert output.token_ids == expected[idx].token_ids
    assert engine.allocator.num_evictions > 0
    assert output.usage.cached_tokens == 32  # 5 came twice with one other in between


def test_who_waits_holds_no_cached_page(tiny_model, tiny_tags):
    """Its prefix may be evicted while others run, and is looked up again when there is room."""
    engine = make_engine(tiny_model, tiny_tags, kv_cache_tokens=9 * PAGE, **INVARIANT)
    case = Case(PROMPT, _params(mode="ar", max_tokens=40))
    (first,) = answer(engine, [case])
    assert engine.allocator.num_cached >= 4
    engine.add("runs", [9] * 60, _params(mode="ar", max_tokens=80))
    step(engine)
    engine.add("waits", case.prompt, case.params)
    waits = request_of(engine, "waits")
    num_waited = 0
    while not waits.is_running:
        num_waited += 1
        step(engine)  # checks the books: nobody waits with pages
    assert num_waited > 1
    assert drain(engine)["waits"].token_ids == first.token_ids


# --- spans: what requests write is scripted, their keys and values are the model's ---


class Script:
    """Makes spans come out as wanted, so that answers agree up to where they shall differ.

    Args:
        contents: ``request_id -> `` the tokens of all its spans, one after another.
    """

    def __init__(self, engine: Engine, contents: dict[str, list[int]]) -> None:
        self._run, self._contents = engine.runner.run, contents
        engine.runner.run = self.run

    def run(self, works: Sequence[Work]) -> list[Predicted]:
        predicted = self._run(works)
        for work, seen in zip(works, predicted, strict=True):
            request = work.request
            contents = iter(self._contents[request.request_id])
            wanted = {
                position: next(contents)
                for plan_round in request.rounds
                for span in plan_round.spans
                for position in range(*span.content)
            }
            for write in seen.writes:
                write.token_id = wanted[write.position]
        return predicted


ROUNDS = ([4, 5, 3], [6], [30])
"""A plan of 12 tokens, 30 of spans, a sync; 4, 14, a sync; 5, and 62 that never end in a test."""
NUM_WRITTEN = 2 * sum(map(sum, ROUNDS))


def _run_to_round(engine: Engine, request_id: str, num_rounds: int) -> None:
    """Step until the spans of a round are denoised, so all before it is final."""
    request = request_of(engine, request_id)
    while len(request.rounds) < num_rounds or request.phase != "denoise":
        step(engine)
    step(engine)


def _shared_after_preemption(model, tags, scripts, *, first=None, second=None, prompt_len=20):
    """How many pages of "a" the request "b" takes when it goes on after losing its own.

    Both are in their third round then. Checks that what it holds is what it would compute.
    """
    engine = make_engine(model, tags, **INVARIANT)
    Script(engine, scripts)
    rounds = user_plan(tags, *ROUNDS)
    for request_id, fields in (("a", first), ("b", second)):
        params = _params(max_tokens=140, **(fields or {}))
        engine.add(request_id, PROMPT[:prompt_len], params, rounds)
        _run_to_round(engine, request_id, 3)
    a, b = request_of(engine, "a"), request_of(engine, "b")
    before = _keys_and_values(engine, b, b.computed)
    preempt(engine, "b")
    step(engine)
    shared = [x == y for x, y in zip(a.pages.held(), b.pages.held(), strict=False)]
    num_shared = shared.index(False) if False in shared else len(shared)
    while b.phase != "denoise":
        step(engine)
    after = _keys_and_values(engine, b, b.computed)
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    drain(engine)
    return num_shared, a, b


def _keys_and_values(engine: Engine, request, end: int) -> list[torch.Tensor]:
    slots = torch.from_numpy(request.pages.slots(0, end))
    cache = engine.runner.cache
    return [tensor.flatten(0, 1)[slots] for tensor in (*cache.k, *cache.v)]


BASE = [20 + idx % 7 for idx in range(NUM_WRITTEN)]


def _changed(at: int) -> list[int]:
    return [*BASE[:at], 33, *BASE[at + 1 :]]


@pytest.mark.parametrize("isolate_spans", [True, False])
def test_equal_spans_are_shared(tiny_model, tiny_tags, isolate_spans):
    """All full pages that are final when the third round is open."""
    fields = {"isolate_spans": isolate_spans}
    num_shared, _, b = _shared_after_preemption(
        tiny_model, tiny_tags, {"a": BASE, "b": BASE}, first=fields, second=fields
    )
    assert b.rounds[2].lo == 87
    assert num_shared == 87 // PAGE


@pytest.mark.parametrize("isolate_spans", [True, False])
@pytest.mark.parametrize(
    ("at", "num_pages"),
    [
        (0, 2),  # the round begins at 32, so two pages hold prompt and plan alone
        (8, 2), (14, 2), (23, 2),  # any token of the round decides every page it touches
        (24, 4),  # the second round begins at 67
        (35, 4),
        (36, 5),  # the last token before the third round, which is behind the last full page
    ],
)  # fmt: skip
def test_a_page_with_a_part_of_a_span_needs_all_of_it(
    tiny_model, tiny_tags, isolate_spans, at, num_pages
):
    fields = {"isolate_spans": isolate_spans}
    num_shared, a, b = _shared_after_preemption(
        tiny_model, tiny_tags, {"a": BASE, "b": _changed(at)}, first=fields, second=fields
    )
    starts = [plan_round.lo for plan_round in b.rounds]
    assert [plan_round.lo for plan_round in a.rounds] == starts
    assert num_shared == num_pages, starts


@pytest.mark.parametrize("isolate_first", [True, False])
def test_isolated_and_joint_spans_are_not_shared(tiny_model, tiny_tags, isolate_first):
    num_shared, _, _ = _shared_after_preemption(
        tiny_model, tiny_tags, {"a": BASE, "b": BASE},
        first={"isolate_spans": isolate_first}, second={"isolate_spans": not isolate_first},
    )  # fmt: skip
    assert num_shared == 2


def test_keys_of_the_last_denoising_step_are_never_shared(tiny_model, tiny_tags):
    """A published cache is its request's own from its spans on."""
    num_shared, _, _ = _shared_after_preemption(
        tiny_model, tiny_tags, {"a": BASE, "b": BASE}, first={"kv_commit": "published"}
    )
    assert num_shared == 2


@pytest.mark.parametrize("isolate_spans", [True, False])
def test_a_published_cache_leaves_the_context_alone(tiny_model, tiny_tags, isolate_spans):
    engine = make_engine(tiny_model, tiny_tags)
    params = _params(kv_commit="published", isolate_spans=isolate_spans, max_tokens=140)
    engine.add("x", PROMPT[:20], params, user_plan(tiny_tags, *ROUNDS))
    first = request_of(engine, "x").rounds[0].lo
    drain(engine)
    assert engine.allocator.num_cached == first // PAGE


# --- several answers to one prompt ---


@pytest.mark.parametrize("mode", ["ar", "planned", "diffusion"])
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_each_of_n_answers_is_that_of_its_seed(tiny_model, tiny_tags, mode, prefix_cache):
    params = _params(mode=mode, temperature=1.0, seed=40, n=5)
    engine = make_engine(tiny_model, tiny_tags, prefix_cache=prefix_cache, **INVARIANT)
    ids = engine.add("x", PROMPT, params)
    assert ids == [f"x/{idx}" for idx in range(5)]
    outputs = drain(engine)
    singles = [Case(PROMPT, _params(mode=mode, temperature=1.0, seed=40 + idx)) for idx in range(5)]
    expected = answer_alone(tiny_model, tiny_tags, singles, **INVARIANT)
    assert [outputs[each].token_ids for each in ids] == [o.token_ids for o in expected]
    assert [outputs[each].request_id for each in ids] == ids
    assert len({tuple(outputs[each].token_ids) for each in ids}) > 1


def test_seeds_begin_again_behind_the_largest(tiny_model, tiny_tags):
    engine = make_engine(tiny_model, tiny_tags)
    params = _params(mode="ar", temperature=1.0, seed=(1 << 63) - 1, n=2)
    ids = engine.add("x", PROMPT, params)
    outputs = drain(engine)
    (expected,) = answer(engine, [Case(PROMPT, _params(mode="ar", temperature=1.0, seed=0))])
    assert outputs[ids[1]].token_ids == expected.token_ids


def test_n_answers_hold_the_prompt_once(tiny_model, tiny_tags):
    engine = make_engine(tiny_model, tiny_tags)
    params = _params(mode="ar", temperature=0.8, n=6, max_tokens=20)
    ids = engine.add("x", [*PROMPT, *PROMPT], params)
    step(engine)
    assert list(_together(engine)) == ids[:1]  # the others wait for its pages
    step(engine)
    held = _together(engine)
    assert list(held) == ids
    assert {tuple(pages[:8]) for pages in held.values()} == {tuple(held[ids[0]][:8])}  # 140 tokens
    assert len({page for pages in held.values() for page in pages}) == 8 + 6
    outputs = drain(engine)
    assert [outputs[each].usage.cached_tokens for each in ids] == [0, *[128] * 5]


@pytest.mark.parametrize("end", ["abort", "deadline", "bad logits"])
def test_others_do_not_wait_for_a_leader_that_failed(tiny_model, tiny_tags, monkeypatch, end):
    engine = make_engine(tiny_model, tiny_tags, max_batch_tokens=16)
    ids = engine.add("x", PROMPT, _params(mode="ar", temperature=1.0, n=3))
    step(engine)
    assert not request_of(engine, ids[0]).has_predicted
    outputs = {}
    if end == "abort":
        outputs |= finished(engine.abort(ids[:1]))
    elif end == "deadline":
        request_of(engine, ids[0]).deadline = 0.0
    else:
        run = engine.runner.run

        def fail(works):
            predicted = run(works)
            for work, seen in zip(works, predicted, strict=True):
                seen.is_nan |= work.request.request_id == ids[0]
            return predicted

        monkeypatch.setattr(engine.runner, "run", fail)
    outputs |= drain(engine)
    reasons = {"abort": "abort", "deadline": "deadline", "bad logits": "error"}
    assert outputs[ids[0]].finish_reason == reasons[end]
    for each in ids[1:]:
        assert outputs[each].finish_reason in ("stop", "length")
        assert outputs[each].usage.cached_tokens == 0


def test_n_answers_finish_where_pages_are_short(tiny_model, tiny_tags):
    params = _params(mode="ar", n=8, temperature=0.3, max_tokens=60)
    roomy = make_engine(tiny_model, tiny_tags, **INVARIANT)
    roomy.add("x", PROMPT, params)
    expected = drain(roomy)
    tight = make_engine(tiny_model, tiny_tags, kv_cache_tokens=14 * PAGE, **INVARIANT)
    tight.add("x", PROMPT, params)
    outputs = drain(tight)
    assert {i: o.token_ids for i, o in outputs.items()} == {
        i: o.token_ids for i, o in expected.items()
    }
    assert sum(output.usage.num_preemptions for output in outputs.values()) > 0
