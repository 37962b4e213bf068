"""Every decoding mode against a plain rendering of it: dense masks, one request, no pages."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from conftest import TINY_TAGS, spread_model
from tiny_engine import (
    Case,
    answer,
    answer_alone,
    drain,
    finished,
    make_engine,
    preempt,
    step,
    user_plan,
)
from torch import Tensor

from pdiff_runtime import ControlTokens, Decoder, GenerationParams
from pdiff_runtime.denoise import PUBLISHED_RULES, RULES, Progress, num_steps, num_unmask
from pdiff_runtime.engine import PlanReady, SpanDone, Text
from pdiff_runtime.engine.span import Span
from pdiff_runtime.models import ModelConfig
from pdiff_runtime.models.attention import rotate
from pdiff_runtime.plan.control_tokens import MISSING

TAGS = TINY_TAGS
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
NO_PLAN_TAGS = ControlTokens(
    topic_start=MISSING, topic_end=MISSING, async_start=MISSING, async_end=MISSING, sync=MISSING,
    mask=TAGS.mask, pad=MISSING, eos=TAGS.eos, digits=(),
)  # fmt: skip


def model_with(**fields: object) -> Decoder:
    config = ModelConfig(
        vocab_size=58, hidden_size=32, num_layers=2, num_heads_q=4, num_heads_kv=2, head_dim=16,
        intermediate_size=48, max_position=512, length_unit=2, **fields,
    )  # fmt: skip
    return spread_model(config, 8.0)


@pytest.fixture(scope="module")
def two_way() -> Decoder:
    """As Dream: prompt and answer see each other, logits are shifted."""
    return model_with(full_attention=True)


@pytest.fixture(scope="module")
def unshifted() -> Decoder:
    """As LLaDA: row p predicts position p."""
    return model_with(full_attention=True, logits_shift=0)


def favour(monkeypatch: pytest.MonkeyPatch, model: Decoder, token_id: int, amount: float) -> None:
    """Add to a token's logits, wherever they are made."""
    make_logits = model.logits

    def favouring(hidden, *project):
        logits = make_logits(hidden, *project)
        logits[:, token_id] += amount
        return logits

    monkeypatch.setattr(model, "logits", favouring)


class DenseModel:
    """A decoder over one sequence whose keys and values stay where they are until rewritten."""

    def __init__(self, model: Decoder, num_tokens: int) -> None:
        config = model.config
        self.model = model
        shape = (num_tokens, config.num_heads_kv, config.head_dim)
        self.cache = [(torch.zeros(shape), torch.zeros(shape)) for _ in range(config.num_layers)]

    def logits(self, token_ids: list[int], rows: list[int], visible: Tensor) -> Tensor:
        """Of some rows, ``[rows, vocab_size]``; ``visible`` is ``[rows, num_tokens]`` bool."""
        at = torch.tensor(rows)
        cos, sin = self.model.cos[at], self.model.sin[at]

        def attend(layer_idx, q, k, v):
            keys, values = self.cache[layer_idx]
            keys[at], values[at] = rotate(k, cos, sin), v
            group = q.shape[1] // keys.shape[1]
            k_all, v_all = (t.repeat_interleave(group, dim=1) for t in (keys, values))
            scores = torch.einsum("qhd,khd->hqk", rotate(q, cos, sin), k_all) / q.shape[-1] ** 0.5
            weights = scores.masked_fill(~visible[None], -torch.inf).softmax(-1)
            return torch.einsum("hqk,khd->qhd", weights, v_all)

        hidden = self.model(torch.tensor([token_ids[row] for row in rows]), attend)
        return self.model.logits(hidden)


def write(token_ids, logits, candidates, banned, params, step_idx, num_planned_steps):
    """One step over the candidates of a span; row i of the logits predicts candidate i."""
    logits[:, list(banned)] = -torch.inf
    probs = logits.softmax(-1)
    best, token = probs.max(-1)
    if params.unmask in ("entropy", "entropy_budget"):
        confidence = torch.special.xlogy(probs, probs).sum(-1)
    else:
        confidence = best
    order = confidence.argsort(descending=True, stable=True).tolist()
    limit = params.threshold
    if params.unmask == "confidence_threshold":
        chosen = [i for rank, i in enumerate(order) if rank == 0 or best[i] >= limit]
    elif params.unmask == "factor":
        sure = itertools.takewhile(lambda each: (each[0] + 2) * (1 - best[each[1]]) < limit,
                                   itertools.islice(enumerate(order), 1, None))  # fmt: skip
        chosen = [order[0], *(i for _, i in sure)]
    elif params.unmask == "entropy_budget":
        spent = itertools.accumulate((-confidence[i].item() for i in order), initial=0.0)
        chosen = [i for i, before in zip(order, spent, strict=False) if before <= limit]
    else:
        chosen = order[: num_unmask(len(candidates), step_idx, num_planned_steps)]
    for i in chosen:
        token_ids[candidates[i]] = int(token[i])


def fill(model: Decoder, tags: ControlTokens, params: GenerationParams) -> tuple[list[int], int]:
    """A one-span answer by blocks, and its steps; mode "diffusion" is one block without cache."""
    params = params.resolved()
    config, shift = model.config, model.config.logits_shift
    if config.full_attention:
        token_ids = [*PROMPT, *[tags.mask] * params.max_tokens]
        span, content = (0, len(token_ids)), (len(PROMPT), len(token_ids))
        banned = (tags.control_ids | {tags.mask}) - {tags.pad, tags.eos}
    else:
        token_ids = [*PROMPT, tags.async_start, *[tags.mask] * (params.max_tokens - 2)]
        token_ids.append(tags.async_end)
        span, content = (len(PROMPT), len(token_ids)), (len(PROMPT) + 1, len(token_ids) - 1)
        banned = tags.banned_in_span
    dense, num = DenseModel(model, len(token_ids)), len(token_ids)
    if span[0]:
        causal = torch.ones(span[0], num, dtype=torch.bool).tril()
        dense.logits(token_ids, list(range(span[0])), causal)
    is_blocked = params.mode == "fast_dllm"
    block_len = params.block_len if is_blocked else content[1] - content[0]
    num_steps_run = 0
    for lo in range(*content, block_len):
        hi = min(lo + block_len, content[1])
        planned = params.num_steps or num_steps(
            min(block_len, content[1] - content[0]), params.steps_ratio
        )
        for step_idx in itertools.count():
            candidates = [p for p in range(lo, hi) if token_ids[p] == tags.mask]
            if not candidates:
                break
            first, last = span
            if is_blocked and step_idx > 0 and params.block_cache != "off":
                first, last = lo - shift, hi if params.block_cache == "dual" else span[1]
            rows = list(range(first, last))
            logits = dense.logits(token_ids, rows, torch.ones(len(rows), num, dtype=torch.bool))
            logits = logits[[p - shift - first for p in candidates]]
            write(token_ids, logits, candidates, banned, params, step_idx, planned)
            num_steps_run += 1
            known = token_ids[content[0] : next(
                (p for p in range(*content) if token_ids[p] == tags.mask), content[1]
            )]  # fmt: skip
            if config.full_attention and tags.eos in known:
                return known[: known.index(tags.eos)], num_steps_run
    return token_ids[len(PROMPT) :], num_steps_run


ONE_SPAN = [
    GenerationParams(mode="diffusion", max_tokens=24),
    GenerationParams(mode="diffusion", max_tokens=24, num_steps=5),
    GenerationParams(mode="diffusion", max_tokens=24, unmask="maskgit_plus", steps_ratio=0.3),
    GenerationParams(mode="diffusion", max_tokens=24, unmask="confidence_threshold", threshold=0.5),
    GenerationParams(mode="diffusion", max_tokens=24, unmask="factor", threshold=1.2),
    GenerationParams(mode="diffusion", max_tokens=24, unmask="entropy_budget", threshold=3.0),
    *(
        GenerationParams(mode="fast_dllm", max_tokens=25, block_len=8, block_cache=cache, **rule)
        for cache in ("off", "prefix", "dual")
        for rule in (
            {"threshold": 0.4},
            {"unmask": "entropy", "num_steps": 3},
            {"unmask": "maskgit_plus", "steps_ratio": 0.5},
            {"unmask": "factor", "threshold": 1.5},
            {"unmask": "entropy_budget", "threshold": 2.0},
        )
    ),
]


def name_of(params: GenerationParams) -> str:
    changed = [
        f"{field.name}={getattr(params, field.name)}"
        for field in dataclasses.fields(params)
        if getattr(params, field.name) != field.default
    ]
    return " ".join(changed)


@pytest.mark.parametrize("params", ONE_SPAN, ids=name_of)
@pytest.mark.parametrize("kind", ["tagged", "two-way", "unshifted"])
def test_one_span_modes_agree_with_a_plain_rendering(params, kind, request, tiny_model):
    model = tiny_model if kind == "tagged" else request.getfixturevalue(kind.replace("-", "_"))
    tags = TAGS if kind == "tagged" else NO_PLAN_TAGS
    expected, num_steps_run = fill(model, tags, params)
    [output] = answer_alone(model, tags, [Case(PROMPT, params)])
    assert output.token_ids == expected
    assert output.rounds[0].num_steps == num_steps_run == output.usage.critical_path
    is_whole = kind == "tagged" or len(expected) < params.max_tokens
    assert output.finish_reason == ("stop" if is_whole else "length")


def branches(model: Decoder, numbers: list[int]) -> list[list[int]]:
    """Contents of skeleton branches: causal behind prompt and plan, alone, up to the first pad."""
    *plan, _ = user_plan(TAGS, numbers)[0]
    context = [*PROMPT, *plan]
    lo, contents = len(context), []
    for number in numbers:
        length = number * model.config.length_unit
        token_ids = [*context, *[TAGS.pad] * (lo - len(context)), TAGS.async_start]
        for _ in range(length):
            num = len(token_ids)
            visible = torch.ones(num, num, dtype=torch.bool).tril()
            visible[lo:, len(context) : lo] = False  # the siblings
            logits = DenseModel(model, num).logits(token_ids, list(range(num)), visible)[-1]
            logits[list(TAGS.banned_in_span)] = -torch.inf
            token_ids.append(int(logits.argmax()))
            if token_ids[-1] == TAGS.pad:
                break
        content = token_ids[lo + 1 :]
        contents.append([*content, *[TAGS.pad] * (length - len(content))])
        lo += length + 2
    return contents


@pytest.mark.parametrize("pad_bias", [0.0, 12.0], ids=["", "many pads"])
def test_skeleton_branches_are_written_token_by_token(tiny_model, pad_bias, monkeypatch):
    numbers = [3, 1, 5]
    favour(monkeypatch, tiny_model, TAGS.pad, pad_bias)
    expected = branches(tiny_model, numbers)
    assert any(TAGS.pad in content for content in expected) == (pad_bias > 0)
    params = GenerationParams(mode="skeleton", max_tokens=100)
    [output] = answer_alone(tiny_model, TAGS, [Case(PROMPT, params, user_plan(TAGS, numbers))])
    starts = np.flatnonzero(np.array(output.token_ids) == TAGS.async_start) + 1
    contents = [
        output.token_ids[start : start + 2 * number]
        for start, number in zip(starts, numbers, strict=True)
    ]
    assert contents == expected
    longest = max(next((i + 1 for i, t in enumerate(c) if t == TAGS.pad), len(c)) for c in expected)
    assert output.rounds[0].num_steps == longest


MIXED = [
    Case(PROMPT, GenerationParams(max_tokens=60, steps_ratio=0.5), user_plan(TAGS, [3, 2], [2])),
    Case(PROMPT[:5], GenerationParams(max_tokens=60, isolate_spans=False, length_scale=3.0),
         user_plan(TAGS, [2, 3])),
    Case(PROMPT, GenerationParams(max_tokens=60, mode="skeleton"), user_plan(TAGS, [3, 2], [2])),
    Case(PROMPT, GenerationParams(mode="ar", max_tokens=12, temperature=0.7, top_k=9, seed=5)),
    Case(PROMPT[2:], GenerationParams(mode="diffusion", max_tokens=20, unmask="origin", seed=3)),
    Case(PROMPT, GenerationParams(mode="diffusion", max_tokens=20, alg_temp=0.4, seed=4)),
    Case(PROMPT, GenerationParams(mode="fast_dllm", max_tokens=30, block_len=9)),
    Case(PROMPT, GenerationParams(mode="fast_dllm", max_tokens=30, block_len=7,
                                  block_cache="dual", unmask="topk_margin")),
    Case(PROMPT, GenerationParams(mode="fast_dllm", max_tokens=30, block_len=7, threshold=0.2,
                                  block_cache="off", temperature=0.9, top_p=0.8, seed=8)),
    Case(PROMPT, GenerationParams(max_tokens=60, unmask="factor", threshold=1.5),
         user_plan(TAGS, [3, 2], [2])),
    Case(PROMPT, GenerationParams(max_tokens=60, unmask="entropy_budget", threshold=4.0,
                                  temperature=0.5, seed=1), user_plan(TAGS, [4])),
    Case(PROMPT, GenerationParams(max_tokens=60, kv_commit="published"),
         user_plan(TAGS, [3, 2], [2])),
    Case(PROMPT, GenerationParams(max_tokens=60, compat="published", temperature=0.8, seed=9),
         user_plan(TAGS, [3, 2], [2])),
    Case(PROMPT, GenerationParams(max_tokens=50, compat="published", temperature=0, threshold=0.6,
                                  unmask="confidence_threshold", steps_ratio=0.5),
         user_plan(TAGS, [3, 2], [2])),
]  # fmt: skip


@pytest.mark.parametrize("config", [{}, {"max_batch_tokens": 40}, {"run_ahead": True}], ids=str)
def test_all_modes_in_one_batch_are_each_as_alone(tiny_model, config):
    alone = answer_alone(tiny_model, TAGS, MIXED)
    together = answer(make_engine(tiny_model, TAGS, **config), MIXED)
    for one, other in zip(alone, together, strict=True):
        assert one.token_ids == other.token_ids
        assert one.finish_reason == other.finish_reason


def test_requests_that_lose_their_pages_answer_the_same(tiny_model):
    """Those that could not be computed again keep theirs."""
    alone = answer_alone(tiny_model, TAGS, MIXED)
    engine = make_engine(tiny_model, TAGS)
    for idx, case in enumerate(MIXED):
        engine.add(str(idx), case.prompt, case.params, case.rounds)
    outputs = {}
    for step_idx in range(200):
        outputs |= finished(step(engine))
        running = [r for r in engine.scheduler.running if not r.is_pinned]
        if running and step_idx % 3 == 2:
            preempt(engine, running[step_idx % len(running)].request_id)
        if not engine.has_work:
            break
    assert sum(output.usage.num_preemptions for output in outputs.values()) > 5
    for idx, expected in enumerate(alone):
        assert outputs[str(idx)].token_ids == expected.token_ids


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_a_block_cache_is_not_taken(tiny_model, cache):
    """Its keys and values are those of an earlier step, which nothing could compute again."""
    params = GenerationParams(
        mode="fast_dllm", max_tokens=60, block_len=20, block_cache=cache, threshold=1.0
    )
    [alone] = answer_alone(tiny_model, TAGS, [Case(PROMPT, params)])
    engine = make_engine(tiny_model, TAGS, kv_cache_tokens=7 * 16)
    engine.add("grows", PROMPT, GenerationParams(mode="ar", max_tokens=60), priority=0)
    engine.add("blocks", PROMPT, params, priority=1)
    outputs = drain(engine)
    assert outputs["blocks"].token_ids == alone.token_ids
    assert outputs["blocks"].usage.num_preemptions == 0
    assert len(outputs["grows"].token_ids) > 3 * 16  # it has waited for pages


def test_half_a_pool_serves_all_modes(tiny_model):
    alone = answer_alone(tiny_model, TAGS, MIXED)
    engine = make_engine(tiny_model, TAGS, kv_cache_tokens=256)
    for output, expected in zip(answer(engine, MIXED), alone, strict=True):
        assert output.token_ids == expected.token_ids


def test_random_order_is_the_seeds(tiny_model):
    """Order "origin": another seed writes in another order, as many as the schedule says."""

    def first_step(seed: int) -> list[tuple[int, int]]:
        params = GenerationParams(
            mode="diffusion", max_tokens=22, unmask="origin", num_steps=4, seed=seed,
            record_steps=True,
        )  # fmt: skip
        [output] = answer_alone(tiny_model, TAGS, [Case(PROMPT, params)])
        return output.rounds[0].history[0]

    steps = [first_step(seed) for seed in range(4)]
    assert first_step(0) == steps[0]
    assert {len(writes) for writes in steps} == {num_unmask(20, 0, 4)}
    assert len({tuple(position for position, _ in writes) for writes in steps}) > 1


def test_an_answer_ends_at_its_first_eos(two_way, monkeypatch):
    """Once everything before it is known, nothing more is computed, and nothing behind it told."""
    favour(monkeypatch, two_way, TAGS.eos, 5.0)
    for mode in ("diffusion", "fast_dllm"):
        params = GenerationParams(mode=mode, max_tokens=40, block_len=5, threshold=0.3)
        expected, num_steps_run = fill(two_way, NO_PLAN_TAGS, params)
        [output] = answer_alone(two_way, NO_PLAN_TAGS, [Case(PROMPT, params)])
        assert output.token_ids == expected
        assert TAGS.eos not in output.token_ids
        assert len(output.token_ids) < 40
        assert output.finish_reason == "stop"
        assert output.usage.span_tokens == len(output.token_ids)
        assert output.rounds[0].num_steps == num_steps_run


def test_what_a_model_can_not_do_is_refused(tiny_model, unshifted):
    plain = dataclasses.replace(NO_PLAN_TAGS, mask=MISSING)

    def refusal(model, tags, **fields):
        engine = make_engine(model, tags)
        with pytest.raises(ValueError) as raised:
            engine.add("x", PROMPT, GenerationParams(**fields))
        assert not engine.has_work
        return str(raised.value)

    needs = "which this model does not have"
    assert refusal(unshifted, NO_PLAN_TAGS, mode="ar") == (
        f"mode: 'ar' needs logits that predict the next token, {needs}"
    )
    for mode in ("planned", "skeleton"):
        assert refusal(tiny_model, plain, mode=mode) == (
            f"mode: {mode!r} needs the control tokens of plans "
            f"(topic_start, topic_end, async_start, async_end, sync), {needs}"
        )
    assert refusal(tiny_model, plain, mode="diffusion") == (
        f"mode: 'diffusion' needs a mask token, {needs}"
    )
    assert refusal(tiny_model, NO_PLAN_TAGS, mode="fast_dllm") == (
        f"mode: 'fast_dllm' needs the tags of spans, {needs}"
    )


def test_a_model_without_plan_tags_writes_on(tiny_model):
    plain = dataclasses.replace(NO_PLAN_TAGS, mask=MISSING)
    params = GenerationParams(mode="ar", max_tokens=9)
    [output] = answer_alone(tiny_model, plain, [Case(PROMPT, params)])
    token_ids = [*PROMPT]
    for _ in range(9):
        num = len(token_ids)
        visible = torch.ones(num, num, dtype=torch.bool).tril()
        logits = DenseModel(tiny_model, num).logits(token_ids, list(range(num)), visible)[-1]
        token_ids.append(int(logits.argmax()))
        if token_ids[-1] == TAGS.eos:
            break
    assert output.token_ids == [t for t in token_ids[len(PROMPT) :] if t != TAGS.eos]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mode": "tree"}, "mode: expected one of 'planned', 'ar', 'diffusion', 'fast_dllm', "
         "'skeleton', got 'tree'"),
        ({"unmask": "best"}, "unmask: expected one of"),
        ({"unmask": "confidence_threshold"}, "threshold: 'confidence_threshold' needs one"),
        ({"threshold": 1.5}, "threshold: expected a number from 0.0 to 1.0, got 1.5"),
        ({"num_steps": 0}, "num_steps: expected an integer from 1"),
        ({"block_len": 0}, "block_len: expected an integer from 1"),
        ({"block_cache": None}, "block_cache: expected one of 'prefix', 'dual', 'off', got None"),
        ({"mode": "skeleton", "kv_commit": "published"}, "kv_commit: expected 'clean' in mode"),
        ({"mode": "skeleton", "isolate_spans": False}, "isolate_spans: expected True in mode"),
        ({"compat": "v1"}, "compat: expected None or 'published', got 'v1'"),
        ({"compat": "published", "mode": "ar"}, "compat: expected mode='planned' with it"),
        ({"compat": "published", "unmask": "origin"}, "unmask: expected one of"),
        ({"mode": "ar", "plan": [[("a", 2)]]}, "plan: expected a mode with plans, got 'ar'"),
    ],
)  # fmt: skip
def test_bad_parameters_are_named(fields, message):
    with pytest.raises(ValueError) as raised:
        GenerationParams(**fields)
    assert str(raised.value).startswith(message)


def test_defaults_of_modes():
    ours = GenerationParams().resolved()
    assert (ours.temperature, ours.top_k, ours.kv_commit, ours.unmask) == (
        0.0,
        0,
        "clean",
        "entropy",
    )
    published = GenerationParams(compat="published").resolved()
    assert (published.temperature, published.top_k, published.kv_commit) == (1.0, 50, "published")
    kept = GenerationParams(
        compat="published", temperature=0, top_k=0, kv_commit="clean"
    ).resolved()
    assert (kept.temperature, kept.top_k, kept.kv_commit) == (0, 0, "clean")
    blocks = GenerationParams(mode="fast_dllm").resolved()
    assert (blocks.unmask, blocks.threshold) == ("confidence_threshold", 0.9)
    assert GenerationParams(mode="fast_dllm", threshold=0.5).resolved().threshold == 0.5
    assert set(RULES) > {"entropy", "maskgit_plus", "topk_margin", "confidence_threshold"}


def test_cancelling_any_mode_returns_its_pages(tiny_model):
    for num_before in range(8):
        engine = make_engine(tiny_model, TAGS)
        for idx, case in enumerate(MIXED):
            engine.add(str(idx), case.prompt, case.params, case.rounds)
        for _ in range(num_before):
            step(engine)
        engine.abort(engine.request_ids)
        assert drain(engine) == {}
        assert engine.allocator.num_free == engine.allocator.num_pages


# --- how requests end ----------------------------------------------------------------------------

ANY_MODE = [
    Case(PROMPT, GenerationParams(max_tokens=60), user_plan(TAGS, [4, 5])),
    Case(PROMPT, GenerationParams(max_tokens=60, mode="skeleton"), user_plan(TAGS, [4, 5])),
    Case(PROMPT, GenerationParams(max_tokens=30, mode="diffusion")),
    Case(PROMPT, GenerationParams(max_tokens=30, mode="fast_dllm", block_len=9)),
    Case(PROMPT, GenerationParams(max_tokens=60, compat="published", temperature=0, top_k=0),
         user_plan(TAGS, [4, 5])),
]  # fmt: skip


@pytest.mark.parametrize("case", ANY_MODE, ids=lambda case: name_of(case.params))
@pytest.mark.parametrize("how", ["out of memory", "nan", "abort"])
def test_an_answer_that_breaks_off_has_no_masks_and_counts_its_steps(case, how, tiny_model):
    engine = make_engine(tiny_model, TAGS)
    engine.add("x", case.prompt, case.params, case.rounds)
    run, num_runs = engine.runner.run, itertools.count()

    def failing(works):
        if next(num_runs) < 6:
            return run(works)
        if how == "out of memory":
            raise torch.OutOfMemoryError("none left")
        results = run(works)
        for predicted in results:
            predicted.is_nan = how == "nan"
        return results

    engine.runner.run = failing
    outputs = {}
    while engine.has_work:
        if how == "abort" and engine.num_steps == 6:
            outputs |= finished(engine.abort(["x"]))
        else:
            outputs |= finished(engine.step())
    output = outputs["x"]
    assert output.finish_reason == ("abort" if how == "abort" else "error")
    assert TAGS.mask not in output.token_ids
    assert 5 <= output.usage.critical_path <= 6
    assert engine.allocator.num_free == engine.allocator.num_pages


def events_of(model: Decoder, tags: ControlTokens, case: Case) -> list:
    engine = make_engine(model, tags)
    engine.add("x", case.prompt, case.params, case.rounds, with_text=True)
    events = []
    while engine.has_work:
        events += step(engine)
    return events


@pytest.mark.parametrize(
    "case",
    [
        *ANY_MODE,
        Case(PROMPT, GenerationParams(max_tokens=3, mode="diffusion")),
        Case(PROMPT, GenerationParams(max_tokens=30, length_scale=0.1), user_plan(TAGS, [4, 5])),
        Case(PROMPT, GenerationParams(max_tokens=4), user_plan(TAGS, [4])),
    ],
    ids=lambda case: name_of(case.params),
)
def test_events_tell_of_every_round_and_span_and_of_all_the_text(case, tiny_model):
    events = events_of(tiny_model, TAGS, case)
    output = events[-1].output
    plans = [event for event in events if isinstance(event, PlanReady)]
    assert [len(plan.bounds) for plan in plans] == [len(r.lengths) for r in output.rounds]
    done = {(e.round_idx, e.span_idx): e.text for e in events if isinstance(e, SpanDone)}
    spans = {(i, j): text for i, r in enumerate(output.rounds) for j, text in enumerate(r.spans)}
    assert done == spans
    assert "".join(e.text for e in events if isinstance(e, Text)) == output.text


def test_a_canvas_that_ends_at_eos_says_that_its_span_is_done(two_way, monkeypatch):
    favour(monkeypatch, two_way, TAGS.eos, 5.0)
    case = Case(PROMPT, GenerationParams(mode="fast_dllm", max_tokens=40, block_len=5))
    events = events_of(two_way, NO_PLAN_TAGS, case)
    [done] = [event for event in events if isinstance(event, SpanDone)]
    assert done.text == events[-1].output.text
    assert events[-1].output.finish_reason == "stop"


def test_only_the_last_round_of_a_users_plan_may_end_in_eos(tiny_model):
    rounds = user_plan(TAGS, [2], [2])
    rounds[0][-1] = TAGS.eos
    engine = make_engine(tiny_model, TAGS)
    with pytest.raises(ValueError, match="plan: round 1: expected sync at its end"):
        engine.add("x", PROMPT, GenerationParams(), rounds)


def test_pinned_requests_take_all_their_pages_at_once(tiny_model):
    """Else two of them could each wait for pages of the other, and neither would ever end."""
    blocks = GenerationParams(mode="fast_dllm", max_tokens=100, block_len=30)
    frozen = GenerationParams(max_tokens=100, kv_commit="published")
    plan = user_plan(TAGS, [9, 9], [9])
    cases = [Case(PROMPT, frozen, plan), Case(PROMPT, frozen, plan), Case(PROMPT, blocks)]
    alone = answer_alone(tiny_model, TAGS, cases)
    engine = make_engine(tiny_model, TAGS, kv_cache_tokens=144)
    for output, expected in zip(answer(engine, cases), alone, strict=True):
        assert output.token_ids == expected.token_ids


def overshooting(**fields: object) -> GenerationParams:
    return GenerationParams(compat="published", temperature=0, max_tokens=40, **fields)


def test_overshooting_spans_wait_for_pages_like_others(tiny_model):
    """As published, four spans of 18 run though only 40 tokens of the answer are kept."""
    plan = user_plan(TAGS, [9, 9, 9, 9])
    case = Case(PROMPT, overshooting(), plan)
    [alone] = answer_alone(tiny_model, TAGS, [case])
    assert alone.finish_reason == "length"
    assert len(alone.token_ids) == 40
    company = Case(PROMPT, GenerationParams(mode="diffusion", max_tokens=60))
    engine = make_engine(tiny_model, TAGS, kv_cache_tokens=160)
    together = answer(engine, [case, company])
    assert together[0].token_ids == alone.token_ids
    assert together[1].finish_reason == "stop"


def test_what_overshoots_is_not_read(tiny_model):
    """Neither by somebody who reads along, nor in the search for stop strings."""
    plan = user_plan(TAGS, [9, 9, 9, 9])
    engine = make_engine(tiny_model, TAGS)
    [whole] = answer(engine, [Case(PROMPT, overshooting(), plan)])
    longer = dataclasses.replace(overshooting(), max_tokens=100)
    [more] = answer(engine, [Case(PROMPT, longer, plan)])
    assert more.text.startswith(whole.text)
    beyond = more.text[-2:]
    assert beyond not in whole.text
    engine.add("reads", PROMPT, overshooting(), plan, with_text=True)
    engine.add("stops", PROMPT, overshooting(stop=[beyond]), plan)
    text, outputs = "", {}
    while engine.has_work:
        events = step(engine)
        text += "".join(event.text for event in events if isinstance(event, Text))
        outputs |= finished(events)
    assert text == whole.text
    for output in outputs.values():
        assert output.token_ids == whole.token_ids
        assert output.finish_reason == "length"


def test_plans_that_overshoot_one_another_end_one_by_one(tiny_model, monkeypatch):
    """Each waits for what the others hold, and none can give any back: the last one gives way."""
    plan = user_plan(TAGS, [9, 9, 9, 9])[0]
    engine = make_engine(tiny_model, TAGS, kv_cache_tokens=160, draft_plan=False)
    write_next = engine.runner._write_next

    def scripted(hidden, rows):
        write_next(hidden, rows)
        for row in rows:
            row.predicted.token_ids[-1] = plan[len(row.request.token_ids) - len(PROMPT)]

    monkeypatch.setattr(engine.runner, "_write_next", scripted)
    joint = Case(PROMPT, overshooting(isolate_spans=False))  # all of its spans or none
    first, second, third = answer(engine, [joint] * 3)
    assert first.finish_reason == second.finish_reason == "length"
    assert first.token_ids == second.token_ids
    assert "overshoot to" in str(third.error)


def test_a_carry_is_what_the_last_step_alone_has_left():
    span, rule = Span(0, 12, (1, 11)), PUBLISHED_RULES["confidence_threshold"]
    span.num_steps = 4
    for num_written, quota in ((1, 2), (1, 4), (5, 7), (3, 3)):
        assert rule.quota(span.progress) == quota
        span.stepped(rule.carry(span.progress, num_written))
        span.unmasked(span.masked[:num_written])
        assert span.progress.carry == quota - num_written


@pytest.mark.parametrize("rule", RULES)
def test_our_own_rules_carry_nothing(rule):
    assert RULES[rule].carry(Progress(10, 0, 4), 1) == 0
