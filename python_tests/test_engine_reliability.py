"""Whatever happens to one request, the others get their answers and every page comes back."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Sequence

import pytest
import torch
from conftest import TINY_TAGS
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

from pdiff_runtime import EngineConfig, GenerationParams
from pdiff_runtime.engine import (
    BadLogitsError,
    DuplicateRequestError,
    Engine,
    OutOfMemoryError,
    OverloadedError,
    RequestTooLongError,
)
from pdiff_runtime.engine.request import Work
from pdiff_runtime.engine.runner import Predicted

hypothesis = pytest.importorskip("hypothesis")
stateful = pytest.importorskip("hypothesis.stateful")
st = pytest.importorskip("hypothesis.strategies")

INVARIANT = {"batch_invariant": True}
INT64_MAX = (1 << 63) - 1


def _params(**fields: object) -> GenerationParams:
    return GenerationParams(**{"max_tokens": 40, "seed": 3, **fields})


def _random_case(chooser: random.Random) -> Case:
    """A small request of any kind."""
    mode = chooser.choice(["planned", "planned", "planned", "ar", "diffusion"])
    rounds: list[list[int]] = []
    if mode == "planned" and chooser.random() < 0.7:
        numbers = [
            [chooser.randint(1, 5) for _ in range(chooser.randint(1, 3))]
            for _ in range(chooser.randint(1, 3))
        ]
        rounds = user_plan(TINY_TAGS, *numbers)
    params = _params(
        mode=mode, max_tokens=60, temperature=chooser.choice([0.0, 1.0]),
        seed=chooser.randint(0, 99), steps_ratio=chooser.choice([0.3, 1.0]),
        isolate_spans=chooser.random() < 0.7, logprobs=chooser.random() < 0.2,
        kv_commit=chooser.choice(["clean", "clean", "published"]),
        stop=chooser.choice([(), (), "ab", ["A", "xyz"]]), n=chooser.choice([1, 1, 1, 3]),
    )  # fmt: skip
    return Case([chooser.randint(1, 39) for _ in range(chooser.randint(1, 30))], params, rounds)


# --- cancelled requests ---


@pytest.mark.parametrize(
    "config",
    [{"max_batch_tokens": 64}, {"kv_cache_tokens": 256, "max_batch_tokens": 40, "run_ahead": True}],
    ids=str,
)
def test_thousands_of_cancelled_requests_leak_no_page(tiny_model, tiny_tags, config):
    """In every phase, alone and in batches, with n answers, with room and without."""
    chooser = random.Random(str(config))
    engine = make_engine(tiny_model, tiny_tags, max_requests=20, max_waiting=64, **config)
    phases: dict[str, int] = {}
    num_cancelled = num_finished = 0
    while num_cancelled < 2500:
        while engine.has_room(3) and len(engine.request_ids) < 24:
            case = _random_case(chooser)
            name = f"{num_cancelled} {num_finished} {len(engine.request_ids)}"
            engine.add(name, case.prompt, case.params, case.rounds, priority=chooser.randint(0, 2))
        for _ in range(chooser.randint(0, 3)):
            num_finished += len(finished(engine.step()))
        running = [request.request_id for request in engine.scheduler.running]
        ids = chooser.choice([running, engine.request_ids]) or engine.request_ids
        victims = chooser.sample(ids, min(len(ids), chooser.randint(1, 12)))
        for victim in victims:
            phase = request_of(engine, victim).phase
            phases[phase] = phases.get(phase, 0) + 1
        outputs = finished(engine.abort(victims))
        assert sorted(outputs) == sorted(victims)
        assert {output.finish_reason for output in outputs.values()} == {"abort"}
        num_cancelled += len(victims)
        engine.check_integrity()
    engine.abort(engine.request_ids)
    engine.check_integrity()
    assert not engine.has_work
    assert engine.allocator.num_free == engine.allocator.num_pages
    assert min(phases[p] for p in ("waiting", "prefill", "plan", "denoise", "commit")) > 5, phases
    assert num_finished > 10


# --- logits that are no numbers ---


def _poison(engine: Engine, monkeypatch, is_bad) -> None:
    """Put NaN into the logits of the rows whose request ``is_bad``."""
    write_next, denoise, logits = (
        engine.runner._write_next, engine.runner._denoise, engine.runner._logits
    )  # fmt: skip
    bad_rows: set[int] = set()

    def with_rows(function, rows_of):
        def call(hidden, items, *args):
            bad_rows.update(row for item in items if is_bad(item.request) for row in rows_of(item))
            return function(hidden, items, *args)

        return call

    def poisoned(hidden, rows):
        result = logits(hidden, rows)
        for idx, row in enumerate(rows):
            if row in bad_rows:
                result[idx, 3] = float("nan")
        bad_rows.clear()
        return result

    runner = engine.runner
    monkeypatch.setattr(runner, "_write_next", with_rows(write_next, lambda item: [item.row]))
    monkeypatch.setattr(
        runner, "_denoise",
        with_rows(denoise, lambda item: [item.row_shift + p - 1 for p in item.span.masked]),
    )  # fmt: skip
    monkeypatch.setattr(runner, "_logits", poisoned)


MIX = [
    ("ar", [1, 2, 3], ()),
    ("planned", [4] * 20, ([3, 2], [4])),
    ("diffusion", [5, 6], ()),
    ("planned", [7] * 35, ([2, 2, 2],)),
    ("planned", [8, 9], ()),
]


@pytest.fixture(scope="module")
def mix() -> list[Case]:
    return [
        Case(prompt, _params(mode=mode, temperature=0.8, max_tokens=70, logprobs=True),
             user_plan(TINY_TAGS, *rounds) if rounds else ())
        for mode, prompt, rounds in MIX
    ]  # fmt: skip


@pytest.fixture(scope="module")
def alone(tiny_model, mix):
    return answer_alone(tiny_model, TINY_TAGS, mix, **INVARIANT)


@pytest.mark.parametrize("bad", range(len(MIX)))
@pytest.mark.parametrize("after", [0, 6, 15])
def test_bad_logits_fail_one_request(tiny_model, tiny_tags, monkeypatch, mix, alone, bad, after):
    """Neighbours keep every bit; its pages are wiped, and no later request finds them."""
    engine = make_engine(tiny_model, tiny_tags, **INVARIANT)
    _poison(
        engine, monkeypatch,
        lambda r: r.request_id == str(bad) and r.usage.num_forwards >= after,
    )  # fmt: skip
    for idx, case in enumerate(mix):
        engine.add(str(idx), case.prompt, case.params, case.rounds)
    victim, outputs = request_of(engine, str(bad)), {}
    run, private = engine.runner.run, []

    def watched(works):
        private[:] = victim.pages.private()
        return run(works)

    engine.runner.run = watched
    while str(bad) not in outputs:
        outputs |= finished(step(engine))
    if outputs[str(bad)].finish_reason != "error":  # it was done before
        assert alone[bad].usage.num_forwards <= after + 1
        return
    assert isinstance(outputs[str(bad)].error, BadLogitsError)
    assert private
    for tensor in (*engine.runner.cache.k, *engine.runner.cache.v):
        assert not tensor[private].any()
    monkeypatch.undo()
    outputs |= drain(engine)
    for idx, expected in enumerate(alone):
        if idx != bad:
            assert outputs[str(idx)].token_ids == expected.token_ids
            assert outputs[str(idx)].logprobs == expected.logprobs
    (again,) = answer(engine, [mix[bad]])
    assert (again.token_ids, again.logprobs) == (alone[bad].token_ids, alone[bad].logprobs)


def test_what_was_never_numbers_is_never_cached(tiny_model, tiny_tags, monkeypatch):
    """A prompt that fails at its first token leaves nothing to be found."""
    engine = make_engine(tiny_model, tiny_tags, max_batch_tokens=20)
    _poison(engine, monkeypatch, lambda r: r.request_id == "bad")
    prompt = list(range(1, 38)) * 2
    engine.add("bad", prompt, _params(mode="ar"))
    assert drain(engine)["bad"].finish_reason == "error"
    assert engine.allocator.num_cached == 0
    engine.add("good", prompt, _params(mode="ar"))
    good = drain(engine)["good"]
    assert good.usage.cached_tokens == 0
    assert good.finish_reason in ("stop", "length")


def test_bad_keys_of_finished_spans_are_never_cached(tiny_model, tiny_tags):
    """A commit in chunks has no logits that would show what it wrote, until its last one."""
    engine = make_engine(tiny_model, tiny_tags, max_batch_tokens=12)
    case = Case([1] * 20, _params(max_tokens=100), user_plan(tiny_tags, [5, 5, 5], [5]))
    engine.add("x", case.prompt, case.params, case.rounds)
    request = request_of(engine, "x")
    while request.phase != "commit":
        step(engine)
    num_cached = engine.allocator.num_cached
    norm = engine.model.model.layers[0].input_layernorm
    weight = norm.weight.clone()
    try:
        norm.weight.fill_(float("nan"))
        step(engine)  # a chunk of the commit
        assert request.phase == "commit"
    finally:
        norm.weight.copy_(weight)
    outputs = drain(engine)
    assert outputs["x"].finish_reason == "error"
    assert engine.allocator.num_cached == num_cached


# --- memory ---


class _ShortOfMemory:
    """A runner that fails for the batches that ``is_short``; what the others do is real."""

    def __init__(self, engine: Engine, error: Exception, is_short) -> None:
        self.run, self.error, self.is_short = engine.runner.run, error, is_short
        self.batches: list[list[str]] = []
        engine.runner.run = self

    def __call__(self, works: Sequence[Work]) -> list[Predicted]:
        self.batches.append([work.request.request_id for work in works])
        if self.is_short(works):
            raise self.error
        return self.run(works)


MEMORY_ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8589934592 bytes"),
    MemoryError(),
]


@pytest.mark.parametrize("error", MEMORY_ERRORS, ids=lambda error: type(error).__name__)
def test_short_of_memory_once_halves_the_batch(tiny_model, tiny_tags, mix, alone, error):
    engine = make_engine(tiny_model, tiny_tags, **INVARIANT)
    short_at = {0, 7, 20}
    runner = _ShortOfMemory(engine, error, lambda works: len(runner.batches) - 1 in short_at)
    outputs = answer(engine, mix)
    assert [(o.token_ids, o.logprobs) for o in outputs] == [
        (o.token_ids, o.logprobs) for o in alone
    ]
    assert [o.finish_reason for o in outputs] == [o.finish_reason for o in alone]
    first, *halves = runner.batches[:3]
    assert halves == [first[:3], first[3:]]


def test_half_a_batch_may_be_too_much_as_well(tiny_model, tiny_tags, mix, alone):
    """Then the request with most rows of that half fails, and the rest of it tries again."""
    engine = make_engine(tiny_model, tiny_tags, **INVARIANT)
    _ShortOfMemory(
        engine, MEMORY_ERRORS[0], lambda works: any(w.request.request_id == "3" for w in works)
    )
    outputs = answer(engine, mix)
    assert outputs[3].finish_reason == "error"
    assert isinstance(outputs[3].error, OutOfMemoryError)
    assert "CUDA out of memory" in str(outputs[3].error)
    for idx, expected in enumerate(alone):
        if idx != 3:
            assert outputs[idx].token_ids == expected.token_ids
            assert outputs[idx].logprobs == expected.logprobs


@pytest.mark.parametrize("num_requests", [1, 2, 3, 8])
def test_no_memory_at_all_fails_all_and_ends(tiny_model, tiny_tags, num_requests):
    engine = make_engine(tiny_model, tiny_tags)
    _ShortOfMemory(engine, MEMORY_ERRORS[0], lambda works: True)
    outputs = answer(engine, [Case([idx + 1] * 5, _params()) for idx in range(num_requests)])
    assert {output.finish_reason for output in outputs} == {"error"}
    assert all(isinstance(output.error, OutOfMemoryError) for output in outputs)
    assert not engine.has_work


def test_short_of_memory_while_others_are_preempted(tiny_model, tiny_tags):
    """Spans that were started, and pages that were taken, stay as they are for the next try."""
    cases = [_without_samples(_random_case(random.Random(seed))) for seed in range(16)]
    expected = answer_alone(tiny_model, tiny_tags, cases, **INVARIANT)
    engine = make_engine(tiny_model, tiny_tags, kv_cache_tokens=256, **INVARIANT)
    chooser = random.Random(1)
    runner = _ShortOfMemory(
        engine, MEMORY_ERRORS[1],
        lambda works: len(works) > 1 and len(runner.batches) % 5 == 0 and len(works) > 3,
    )  # fmt: skip
    for idx, case in enumerate(cases):
        engine.add(str(idx), case.prompt, case.params, case.rounds)
    outputs = {}
    while engine.has_work:
        outputs |= finished(step(engine))
        losers = [request for request in engine.scheduler.running if not request.is_pinned]
        if losers and chooser.random() < 0.2:
            preempt(engine, chooser.choice(losers).request_id)
    for idx, each in enumerate(expected):
        assert outputs[str(idx)].token_ids == each.token_ids


def _without_samples(case: Case) -> Case:
    fields = {name: getattr(case.params, name) for name in case.params.__dataclass_fields__}
    return Case(case.prompt, GenerationParams(**{**fields, "n": 1}), case.rounds)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("a kernel was lost"), ValueError("odd"), KeyboardInterrupt("stop")],
    ids=repr,
)
def test_other_errors_are_the_callers(tiny_model, tiny_tags, mix, alone, error):
    """They leave the step; whoever catches them can end all requests and go on."""
    engine = make_engine(tiny_model, tiny_tags, **INVARIANT)
    runner = _ShortOfMemory(engine, error, lambda works: len(runner.batches) == 9)
    for idx, case in enumerate(mix):
        engine.add(str(idx), case.prompt, case.params, case.rounds)
    with pytest.raises(type(error), match=str(error)):
        drain(engine)
    engine.abort(engine.request_ids)
    engine.check_integrity()
    assert not engine.has_work
    assert engine.allocator.num_free == engine.allocator.num_pages
    assert [o.token_ids for o in answer(engine, mix)] == [o.token_ids for o in alone]


def test_an_error_within_half_a_batch_is_the_callers_too(tiny_model, tiny_tags, mix):
    engine = make_engine(tiny_model, tiny_tags)
    run, calls = engine.runner.run, []

    def fail(works):
        calls.append(len(works))
        if len(calls) == 4:
            raise MEMORY_ERRORS[0]
        if len(calls) == 6:
            raise RuntimeError("a kernel was lost")
        return run(works)

    engine.runner.run = fail
    for idx, case in enumerate(mix):
        engine.add(str(idx), case.prompt, case.params, case.rounds)
    with pytest.raises(RuntimeError, match="a kernel was lost"):
        drain(engine)
    engine.abort(engine.request_ids)
    engine.check_integrity()
    assert engine.allocator.num_free == engine.allocator.num_pages


def test_what_happened_before_an_error_is_told_after_it(tiny_model, tiny_tags):
    engine = make_engine(tiny_model, tiny_tags)
    _ShortOfMemory(engine, RuntimeError("a kernel was lost"), lambda works: True)
    engine.add("late", [1, 2], _params(), timeout_s=1e-9)
    engine.add("other", [3, 4], _params())
    with pytest.raises(RuntimeError, match="a kernel was lost"):
        engine.step()
    assert engine.request_ids == ["other"]
    outputs = finished(engine.abort(["other"]))
    assert [outputs[name].finish_reason for name in ("late", "other")] == ["deadline", "abort"]


@pytest.mark.parametrize("seed", range(12))
def test_a_decoder_that_fails_costs_the_request_it_is_called_for(tiny_model, tiny_tags, seed):
    """Whoever catches what it raises can end all requests, one by one; every page comes back."""
    chooser = random.Random(seed)
    engine = make_engine(tiny_model, tiny_tags, run_ahead=seed % 2 == 0)
    decode, share = engine.decode, chooser.choice([0.03, 0.3, 1.0])

    def broken(token_ids):
        if chooser.random() < share:
            raise LookupError("no such token")
        return decode(token_ids)

    for idx in range(8):
        case = _random_case(chooser)
        engine.add(str(idx), case.prompt, case.params, case.rounds, with_text=idx % 2 == 0)
    engine.decode = broken
    for request in (*engine.scheduler.waiting, *engine.scheduler.running):
        if request.reader is not None:
            request.reader._decode = broken
    with pytest.raises(LookupError):
        drain(engine)
    while engine.has_work:
        num_open = len(engine.request_ids)
        with contextlib.suppress(LookupError):
            engine.abort(engine.request_ids)
        assert len(engine.request_ids) < num_open
        engine.check_integrity()
    assert engine.allocator.num_free == engine.allocator.num_pages


# --- any order of calls ---


class EngineMachine(stateful.RuleBasedStateMachine):
    """Any calls in any order: the books are right after each, and everybody gets an end."""

    model = None

    @stateful.initialize(
        page_size=st.sampled_from([1, 3, 16]), num_tokens=st.integers(70, 200),
        max_batch_tokens=st.sampled_from([1, 5, 33, 500]), max_requests=st.integers(1, 5),
        max_waiting=st.integers(1, 4), prefix_cache=st.booleans(), draft_plan=st.booleans(),
        max_logits_rows=st.sampled_from([1, 4, 500]),
    )  # fmt: skip
    def start(self, page_size, num_tokens, **config):
        self.engine = make_engine(
            self.model, TINY_TAGS, page_size=page_size, kv_cache_tokens=num_tokens, **config
        )
        self.num_added = 0
        self.open: set[str] = set()

    def _take(self, events):
        for request_id, output in finished(events).items():
            self.open.remove(request_id)
            assert TINY_TAGS.mask not in output.token_ids
            assert output.finish_reason != "error"
            usage = output.usage
            assert usage.plan_tokens + usage.span_tokens == len(output.token_ids)

    @stateful.rule(
        seed=st.integers(0, 200), priority=st.integers(-1, 1),
        timeout_s=st.sampled_from([None, None, 100.0, 1e-9]), with_text=st.booleans(),
    )  # fmt: skip
    def submit(self, seed, priority, timeout_s, with_text):
        case = _random_case(random.Random(seed))
        self.num_added += 1
        before = self.engine.request_ids
        try:
            ids = self.engine.add(
                f"r{self.num_added}", case.prompt, case.params, case.rounds,
                priority=priority, timeout_s=timeout_s, with_text=with_text,
            )  # fmt: skip
        except (OverloadedError, RequestTooLongError):
            assert self.engine.request_ids == before
        else:
            assert len(ids) == case.params.n
            self.open.update(ids)

    @stateful.rule(count=st.integers(1, 6))
    def step(self, count):
        for _ in range(count):
            self._take(self.engine.step())

    @stateful.precondition(lambda self: self.open)
    @stateful.rule(data=st.data())
    def abort(self, data):
        ids = data.draw(st.lists(st.sampled_from(sorted(self.open)), max_size=3))
        events = self.engine.abort([*ids, "unknown"])
        assert set(finished(events)) == set(ids)
        self._take(events)

    @stateful.precondition(lambda self: self.open)
    @stateful.rule(data=st.data())
    def be_late(self, data):
        late = data.draw(st.sampled_from(sorted(self.open)))
        request_of(self.engine, late).deadline = 0.0
        events = self.engine.step()
        assert finished(events)[late].finish_reason == "deadline"
        self._take(events)

    @stateful.precondition(lambda self: self.open)
    @stateful.rule(data=st.data())
    def lose_pages(self, data):
        running = [r.request_id for r in self.engine.scheduler.running if not r.is_pinned]
        if running:
            preempt(self.engine, data.draw(st.sampled_from(running)))

    @stateful.rule()
    def drain(self):
        for _ in range(5000):
            if not self.engine.has_work:
                break
            self._take(self.engine.step())
        assert not self.open
        assert self.engine.allocator.num_free == self.engine.allocator.num_pages

    @stateful.invariant()
    def books_are_right(self):
        if hasattr(self, "engine"):
            self.engine.check_integrity()
            assert set(self.engine.request_ids) == self.open
            assert self.engine.has_work == bool(self.open)
            assert len(self.engine.scheduler.running) <= self.engine.config.max_requests

    def teardown(self):
        if hasattr(self, "engine"):
            self.drain()


def test_any_order_of_calls(tiny_model):
    EngineMachine.model = tiny_model
    settings = hypothesis.settings(
        max_examples=60, stateful_step_count=25, deadline=None, derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    stateful.run_state_machine_as_test(EngineMachine, settings=settings)


# --- wrong arguments ---


@pytest.fixture
def busy(tiny_model, tiny_tags) -> Engine:
    """An engine in which one request runs."""
    engine = make_engine(tiny_model, tiny_tags, kv_cache_tokens=320, max_waiting=2)
    engine.add("busy", [1, 2], _params(mode="ar"))
    step(engine)
    return engine


def _is_unharmed(engine: Engine) -> bool:
    """Nothing was queued by the refused call, and the request that ran finishes as ever."""
    assert engine.request_ids == ["busy"]
    engine.check_integrity()
    output = drain(engine)["busy"]
    (expected,) = answer(engine, [Case([1, 2], _params(mode="ar"))])
    return output.token_ids == expected.token_ids and not engine.has_work


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "prompt: expected at least one token"),
        ([1, 58], "prompt: expected ids from 0 to 57, got 58 at position 1"),
        ([-1], "got -1 at position 0"),
        ([1 << 63], "got 9223372036854775808 at position 0"),
        ([-(1 << 70)], "prompt: expected ids"),
        *[([1, 2, i], f"control token {i} at position 2") for i in (50, 51, 52, 53, 54, 55)],
    ],
)
def test_bad_prompts_are_refused(busy, prompt, message):
    with pytest.raises(ValueError, match=message):
        busy.add("x", prompt, _params())
    assert _is_unharmed(busy)


@pytest.mark.parametrize("prompt", [[1.5], [float("nan")], ["1"], [None], "ab", None, 5, [[1]]])
def test_prompts_of_other_types_are_refused(busy, prompt):
    with pytest.raises((ValueError, TypeError)):
        busy.add("x", prompt, _params())
    assert _is_unharmed(busy)


def test_pads_and_ends_are_part_of_conversations(busy):
    busy.add("x", [56, 56, 1, 57, 2], _params())
    assert drain(busy)["x"].finish_reason in ("stop", "length")


@pytest.mark.parametrize(
    ("prompt_len", "max_tokens", "limit"),
    [
        (300, 21, "kv_cache_tokens hold 320"), (1, 320, "kv_cache_tokens hold 320"),
        (500, 13, "the model's positions hold 512"), (1, 1 << 20, "positions hold 512"),
    ],
)  # fmt: skip
def test_what_could_never_fit_is_refused_before_it_waits(busy, prompt_len, max_tokens, limit):
    params = _params(max_tokens=max_tokens)
    with pytest.raises(RequestTooLongError, match=limit):
        busy.check([1] * prompt_len, params)
    with pytest.raises(
        RequestTooLongError, match=f"need {prompt_len + max_tokens} tokens, .*{limit}"
    ):
        busy.add("x", [1] * prompt_len, params)
    assert _is_unharmed(busy)


def test_what_just_fits_is_taken(tiny_model, tiny_tags):
    """With a page for every token, for each kind of request."""
    engine = make_engine(tiny_model, tiny_tags, kv_cache_tokens=320)
    for mode in ("ar", "planned", "diffusion"):
        (output,) = answer(engine, [Case([1] * 240, _params(mode=mode, max_tokens=80))])
        assert output.finish_reason in ("stop", "length")
    rounds = user_plan(tiny_tags, [3, 3], [20])
    for kv_commit in ("clean", "published"):
        case = Case([1] * 240, _params(max_tokens=80, kv_commit=kv_commit), rounds)
        assert answer(engine, [case])[0].finish_reason == "stop"


@pytest.mark.parametrize(
    "fields",
    [
        {"priority": 0.5}, {"priority": "1"}, {"priority": None}, {"priority": True},
        {"priority": 1 << 31}, {"priority": -(1 << 63)}, {"priority": float("nan")},
        {"timeout_s": 0}, {"timeout_s": -1.0}, {"timeout_s": float("nan")},
        {"timeout_s": float("inf")}, {"timeout_s": "1"}, {"timeout_s": True},
    ],
    ids=str,
)  # fmt: skip
def test_bad_arguments_are_named(busy, fields):
    (name,) = fields
    with pytest.raises(ValueError, match=f"{name}: expected"):
        busy.add("x", [1], _params(), **fields)
    assert _is_unharmed(busy)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("n", value) for value in (0, -1, 129, 1.0, "2", None, True, INT64_MAX + 1)],
        ("n", float("nan")),
        *[("stop", value) for value in ("", [""], [1], 5, None, ["a"] * 17, "x" * 1025, [b"a"])],
        *[("logprobs", value) for value in (1, None, "yes")],
        *[("max_tokens", value) for value in (-1, 1.5, float("nan"), INT64_MAX + 1, None)],
        *[("temperature", value) for value in (float("inf"), "0", -0.1, True)],
        *[("seed", value) for value in (1.0, INT64_MAX + 1, float("nan"))],
        *[("top_p", value) for value in (float("nan"), None, "1")],
        *[("threshold", value) for value in (float("nan"), -0.1)],
        *[("steps_ratio", value) for value in (float("nan"), -1.0, None)],
        *[("use_grammar", value) for value in (0, None)],
    ],
)
def test_bad_parameters_are_named(field, value):
    with pytest.raises(ValueError, match=f"{field}: expected"):
        GenerationParams(**{field: value})


@pytest.mark.parametrize("name", EngineConfig.__dataclass_fields__)
@pytest.mark.parametrize("value", [-1, 0, 1 << 63, 1.5, float("nan"), "1", []])
def test_bad_sizes_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name}: expected"):
        EngineConfig(**{name: value})


def test_a_topic_needs_two_tokens():
    with pytest.raises(ValueError, match="max_topic_tokens: expected >= 2"):
        EngineConfig(max_topic_tokens=1)


def test_ids_are_used_once(tiny_model, tiny_tags):
    engine = make_engine(tiny_model, tiny_tags)
    one, three = _params(mode="ar"), _params(mode="ar", n=3)
    engine.add("a", [1], one)
    engine.add("b", [1], three)
    for request_id, params in [("a", one), ("a", three), ("b/0", one), ("b/2", one), ("b", three)]:
        with pytest.raises(DuplicateRequestError, match="is already there"):
            engine.add(request_id, [1], params)
    engine.add("c/1", [1], one)
    with pytest.raises(DuplicateRequestError, match="'c/1' is already there"):
        engine.add("c", [1], three)
    assert engine.request_ids == ["a", "b/0", "b/1", "b/2", "c/1"]
    drain(engine)
    engine.add("a", [1], one)  # free again
    assert drain(engine)["a"].finish_reason in ("stop", "length")


def test_all_answers_to_a_prompt_are_queued_or_none(tiny_model, tiny_tags):
    engine = make_engine(tiny_model, tiny_tags)
    plan = user_plan(tiny_tags, [3])  # without room for its span, so an answer is over at once
    calls = itertools.count()
    engine.decode = lambda token_ids: str(next(calls))
    engine.add("one", [1], _params(max_tokens=4), plan, with_text=True)
    drain(engine)
    calls = iter([""] * next(calls))
    with pytest.raises(StopIteration):
        engine.add("many", [1], _params(max_tokens=4, n=8), plan, with_text=True)
    assert not engine.has_work
    engine.check_integrity()


def test_a_full_queue_refuses(tiny_model, tiny_tags):
    engine = make_engine(tiny_model, tiny_tags, max_requests=1, max_waiting=3)
    params = _params(mode="ar")
    engine.add("runs", [1], params)
    step(engine)
    engine.add("big", [1], _params(mode="ar", n=5))  # into an empty queue anything goes
    with pytest.raises(OverloadedError, match="max_waiting: 3 requests wait already"):
        engine.add("late", [1], params)
    engine.check_integrity()
    assert len(engine.request_ids) == 6
    engine.abort([f"big/{idx}" for idx in range(3)])
    assert engine.has_room(1)
    assert not engine.has_room(2)
    with pytest.raises(OverloadedError):
        engine.add("two", [1], _params(mode="ar", n=2))
    engine.add("late", [1], params)
    assert sorted(drain(engine)) == ["big/3", "big/4", "late", "runs"]


@pytest.mark.parametrize(
    ("rounds", "max_tokens", "message"),
    [
        ([[50, 7, 41, 51, 57]], 3, "max_tokens: the plan alone has 4 tokens, got 3"),
        ([[50, 7, 41, 51, 54], [50, 7, 41, 51, 57]], 8, "the plan alone has 9 tokens, got 8"),
        ([[57]], 40, "plan: round 1: expected a topic, got none"),
        ([[]], 40, "plan: round 1: expected a topic, got none"),
        ([[50, 7, 51, 57]], 40, "plan: round 1"),
        ([[50, 7, 41, 51, 54], [50, 57]], 40, "plan: round 2"),
        ([[50, 7, 41, 51, 58]], 40, "plan: expected ids from 0 to 57, got 58"),
        ([[50, 7, 41, 51, 1 << 64]], 40, "plan: expected ids"),
        ([[50, 7, 41, 51]], 40, "plan: round 1: .*sync or eos"),
        ([[50, 7, 41, 51, 8]], 40, "plan: round 1: .*sync or eos"),
    ],
)
def test_bad_plans_are_refused(busy, rounds, max_tokens, message):
    with pytest.raises(ValueError, match=message):
        busy.add("x", [1], _params(max_tokens=max_tokens), rounds)
    assert _is_unharmed(busy)


@pytest.mark.parametrize("mode", ["ar", "diffusion"])
def test_only_planned_answers_have_plans(busy, tiny_tags, mode):
    with pytest.raises(ValueError, match="plan"):
        busy.add("x", [1], _params(mode=mode), user_plan(tiny_tags, [2]))
    assert _is_unharmed(busy)


def test_a_plan_that_just_fits_has_no_spans(tiny_model, tiny_tags):
    """Its spans are dropped, and so is what a sync would have opened."""
    engine = make_engine(tiny_model, tiny_tags)
    for numbers, num_tokens in (([[3]], 4), ([[3, 2]], 8), ([[3], [2]], 9)):
        rounds = user_plan(tiny_tags, *numbers)
        assert sum(map(len, rounds)) - 1 == num_tokens
        (output,) = answer(engine, [Case([1], _params(max_tokens=num_tokens), rounds)])
        assert output.finish_reason == "length"
        assert len(output.token_ids) <= num_tokens
