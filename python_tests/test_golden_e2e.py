"""Whole generations, step by step, against the recorded behaviour of the published code.

The autoregressive picks are scripted there, so they are here: the next logit of the script is set
to 1e4. Everything else is the model's own.
"""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from golden_data import load_npz, recorded_model, recorded_tags
from tiny_engine import DirtyAllocator, letters

from pdiff_runtime import Decoder, EngineConfig, GenerationParams, ops
from pdiff_runtime.engine import Engine, GenerationError, InvalidPlanError, RequestOutput
from pdiff_runtime.engine.output import Finished
from pdiff_runtime.models.attention import rotate

DATA = load_npz("e2e")
META = json.loads(str(DATA["meta"]))
CASES = [pytest.param(int(case), id=META[case]["name"]) for case in DATA["cases"]]
FORCED = 1e4


@pytest.fixture(scope="module")
def model() -> Decoder:
    return recorded_model()


def params_of(case: dict, **changes: object) -> GenerationParams:
    params = GenerationParams(
        compat="published",
        max_tokens=case.get("max_new_tokens") or case["max_length"] - 12,
        temperature=case["temperature"],
        top_p=case["top_p"] or 1.0,
        top_k=None if case["top_k_is_default"] else case["top_k"] or 0,
        unmask=case["alg"].removeprefix("pd_"),
        steps_ratio=case["steps_ratio"],
        threshold=case.get("threshold"),
        length_scale=case["length_scale"],
        isolate_spans=not case["dense"],
        record_steps=True,
    )
    return dataclasses.replace(params, **changes)


@dataclasses.dataclass
class Recorded:
    """What a scripted run did.

    Attributes:
        ar_logits: One row per autoregressive step, before the script.
        steps: ``(positions, confidence, candidate)`` of every denoising step.
        caches: Keys (after rotary) and values per layer, after every step of the engine.
    """

    output: RequestOutput
    ar_logits: torch.Tensor
    steps: list[tuple[list[int], np.ndarray, np.ndarray]]
    caches: list[list[tuple[torch.Tensor, torch.Tensor]]]


def run_scripted(
    model: Decoder, case: int, monkeypatch: pytest.MonkeyPatch, *, kv_cache_tokens: int = 1024,
    **changes: object,
) -> Recorded:  # fmt: skip
    tags, meta = recorded_tags(), META[case]
    config = EngineConfig(page_size=16, kv_cache_tokens=kv_cache_tokens)
    engine = Engine(model, tags, config, letters)
    engine.allocator = engine.scheduler.allocator = DirtyAllocator(engine, 7.0)
    runner, script = engine.runner, iter(DATA[f"{case:02d}_script"].tolist())
    ar_logits: list[torch.Tensor] = []
    steps: list[tuple[list[int], np.ndarray, np.ndarray]] = []
    open_positions: list[int] = []  # of the denoising call under way
    make_logits, denoise, unmask = runner._logits, runner._denoise, ops.unmask_

    def logits_of(hidden, rows):
        logits = make_logits(hidden, rows)
        if open_positions:
            forced = [i for i, p in enumerate(open_positions) if p in meta.get("force_mask", ())]
            logits[forced, tags.mask] = FORCED
        else:
            assert len(logits) == 1
            ar_logits.append(logits[0].clone())
            logits[0, next(script)] = FORCED
        return logits

    def logged_denoise(hidden, spans, *call):
        open_positions[:] = [p for span in spans for p in span.span.candidates]
        denoise(hidden, spans, *call)
        open_positions.clear()

    def logged_unmask(*arguments, **settings):
        stats = unmask(*arguments, **settings)
        if open_positions:
            steps.append(
                ([*open_positions], stats.confidence.numpy().copy(), stats.candidate.numpy().copy())
            )
        return stats

    monkeypatch.setattr(runner, "_logits", logits_of)
    monkeypatch.setattr(runner, "_denoise", logged_denoise)
    monkeypatch.setattr(ops, "unmask_", logged_unmask)
    engine.add("run", DATA[f"{case:02d}_prompt"].tolist(), params_of(meta, **changes))
    caches = []
    pages: list[
        int
    ] = []  # all that it ever holds: at first, before finished spans give theirs back
    while engine.has_work:
        events = engine.step()
        running = engine.scheduler.running
        pages = max(pages, running[0].pages.held() if running else [], key=len)
        caches.append(
            [tuple(t[pages].flatten(0, 1) for t in engine.runner.cache.layer(layer))
             for layer in range(model.config.num_layers)]
        )  # fmt: skip
    output = next(event.output for event in events if isinstance(event, Finished))
    assert engine.allocator.num_free == engine.allocator.num_pages
    return Recorded(output, torch.stack(ar_logits), steps, caches)


def states(init: np.ndarray, history: list[list[tuple[int, int]]]) -> np.ndarray:
    """The sequence after each step of a round."""
    x, after = init.copy(), []
    for writes in history:
        for position, token_id in writes:
            x[position] = token_id
        after.append(x.copy())
    return np.stack(after)


def num_ar_steps(recorded: np.ndarray, run: torch.Tensor) -> int:
    """Steps to compare: there the length is looked at after a forward, whose pick is dropped."""
    assert 0 <= len(recorded) - len(run) <= 1
    return len(run)


@pytest.mark.parametrize("case", CASES)
def test_cached_run_step_by_step(case, model, monkeypatch):
    meta, name = META[case], f"{case:02d}"
    run = run_scripted(model, case, monkeypatch)
    sequence = [*DATA[f"{name}_prompt"].tolist(), *run.output.token_ids]
    assert sequence == DATA[f"{name}_sequence"].tolist()
    assert [r.num_steps for r in run.output.rounds] == meta["steps_run"]
    assert sum(token_id == recorded_tags().mask for token_id in sequence) == meta["final_masks"]

    recorded_logits = torch.from_numpy(DATA[f"{name}_ar_logits"])
    num_ar = num_ar_steps(recorded_logits, run.ar_logits)
    torch.testing.assert_close(run.ar_logits, recorded_logits[:num_ar], rtol=0, atol=2e-4)

    steps = iter(run.steps)
    for idx, plan_round in enumerate(run.output.rounds):
        key = f"{name}_r{idx}"
        init, after = DATA[f"{key}_init"], DATA[f"{key}_x"]
        lo = DATA[f"{key}_block_info"][0, 0]  # masks left by earlier rounds are scored, not written
        assert np.array_equal(states(init, plan_round.history), after)
        for confidence, candidate in zip(DATA[f"{key}_conf"], DATA[f"{key}_x0"], strict=True):
            positions, actual_confidence, actual_candidate = next(steps)
            scored = np.flatnonzero(~np.isnan(confidence))
            assert positions == scored[scored >= lo].tolist()
            assert np.allclose(actual_confidence, confidence[positions], rtol=0, atol=5e-5)
            assert np.array_equal(actual_candidate, candidate[positions])
    assert next(steps, None) is None


@pytest.mark.parametrize("case", CASES)
def test_uncached_run_is_the_clean_one(case, model, monkeypatch):
    """Recomputing a finished span's keys and values once is what no cache at all gives."""
    name = f"{case:02d}"
    run = run_scripted(model, case, monkeypatch, kv_commit="clean")
    sequence = [*DATA[f"{name}_prompt"].tolist(), *run.output.token_ids]
    assert sequence == DATA[f"{name}_uncached_sequence"].tolist()
    recorded_logits = torch.from_numpy(DATA[f"{name}_uncached_ar_logits"])
    num_ar = num_ar_steps(recorded_logits, run.ar_logits)
    torch.testing.assert_close(run.ar_logits, recorded_logits[:num_ar], rtol=0, atol=2e-4)
    for idx, plan_round in enumerate(run.output.rounds):
        lo = DATA[f"{name}_r{idx}_block_info"][0, 0]  # the context may differ from the cached run's
        after = states(DATA[f"{name}_r{idx}_init"], plan_round.history)
        assert np.array_equal(after[:, lo:], DATA[f"{name}_uncached_r{idx}_x"][:, lo:])


def test_frozen_keys_and_values(model, monkeypatch):
    """After each round of case 0 the cache holds what the published one holds."""
    run = run_scripted(model, 0, monkeypatch)
    num_forwards = 0
    for idx, plan_round in enumerate(run.output.rounds):
        context_len = len(DATA["00_prompt"]) if idx == 0 else DATA["00_r0_x"].shape[1]
        num_ar = DATA[f"00_r{idx}_block_info"][0, 0] - context_len + (idx == 0)
        num_forwards += num_ar + plan_round.num_steps
        num_tokens = DATA[f"00_r{idx}_x"].shape[1]
        for layer, (k, v) in enumerate(run.caches[num_forwards - 1]):
            key = f"kv_case00_round{idx}_layer{layer}"
            before = torch.from_numpy(DATA[f"{key}_k_before_rope"]).unflatten(-1, (2, -1))
            expected = rotate(before, model.cos[:num_tokens], model.sin[:num_tokens])
            torch.testing.assert_close(k[:num_tokens], expected, rtol=0, atol=1e-4)
            value = torch.from_numpy(DATA[f"{key}_v"]).unflatten(-1, (2, -1))
            torch.testing.assert_close(v[:num_tokens], value, rtol=0, atol=1e-4)


OURS = {"compat": None, "use_grammar": False}
"""What callers get who ask for nothing; the script itself writes valid plans or not."""


def test_our_default_is_the_uncached_run(model, monkeypatch):
    """Where nothing is banned that the model would write, clean keys are the only difference."""
    case = next(c for c, meta in enumerate(META) if meta["name"] == "two_rounds_pd_topk_margin_0.5")
    candidates = [DATA[f"{case:02d}_r{idx}_x0"] for idx in range(2)]
    banned = set(np.concatenate([c.ravel() for c in candidates]).tolist())
    assert not banned & recorded_tags().control_ids
    run = run_scripted(model, case, monkeypatch, **OURS, top_k=50)
    sequence = np.array([*DATA[f"{case:02d}_prompt"].tolist(), *run.output.token_ids])
    cached, uncached = (DATA[f"{case:02d}_{kind}sequence"] for kind in ("", "uncached_"))
    assert np.array_equal(sequence, uncached)
    first_sync = np.flatnonzero(sequence == recorded_tags().sync)[0]
    assert np.array_equal(sequence[: first_sync + 1], cached[: first_sync + 1])
    assert not np.array_equal(sequence, cached)  # frozen keys: other tokens behind the sync


def test_our_default_bans_control_tokens_in_spans(model, monkeypatch):
    case = next(c for c, meta in enumerate(META) if meta["name"] == "top_p_0.9_pd_entropy_0.5")
    tags = recorded_tags()

    def spans_of(output: RequestOutput) -> set[int]:
        writes = [write for r in output.rounds for step in r.history for write in step]
        return {token_id for _, token_id in writes}

    banned = set(tags.banned_in_span)
    assert spans_of(run_scripted(model, case, monkeypatch).output) & banned
    monkeypatch.undo()
    assert not spans_of(run_scripted(model, case, monkeypatch, **OURS).output) & banned


def test_our_default_threshold_has_no_quota(model, monkeypatch):
    """Every position that is sure enough is written at once, and at least one per step."""
    case = next(c for c, m in enumerate(META) if m["name"] == "dense_pd_confidence_threshold_0.5")
    threshold = META[case]["threshold"]
    run = run_scripted(model, case, monkeypatch, **OURS)
    steps = iter(run.steps)
    for plan_round in run.output.rounds:
        for writes in plan_round.history:
            positions, confidence, _ = next(steps)
            sure = {p for p, c in zip(positions, confidence, strict=True) if c >= threshold}
            assert sure <= {position for position, _ in writes}


def test_our_default_spans_fit_the_budget(model, monkeypatch):
    case = next(c for c, meta in enumerate(META) if meta["name"] == "maxlen_cuts_round1_diffusion")
    ours = run_scripted(model, case, monkeypatch, **OURS).output
    monkeypatch.undo()
    published = run_scripted(model, case, monkeypatch).output
    assert len(ours.token_ids) == len(published.token_ids) == META[case]["max_length"] - 12
    assert ours.finish_reason == published.finish_reason == "length"
    assert (
        ours.token_ids[-1] == recorded_tags().async_end
    )  # a shorter span, not half of a longer one
    assert published.token_ids[-1] != recorded_tags().async_end


def test_our_default_wants_a_plan_by_the_grammar(model, monkeypatch):
    """A length of 0 is none to us; the published implementation lays out an empty span."""
    case = next(c for c, meta in enumerate(META) if meta["name"] == "zero_size_span_pd_entropy_0.5")
    ours = run_scripted(model, case, monkeypatch, **OURS).output
    assert ours.finish_reason == "invalid_plan"
    assert isinstance(ours.error, InvalidPlanError)


@pytest.mark.parametrize(
    ("script", "changes", "message"),
    [
        ([7, 8, "eos"], {}, "expected a topic from position 0 on, got none"),
        (["topic_start", 7, "topic_end", "eos"], {}, "expected a topic with a digit"),
        (["topic_start", 7, "2", "eos"], {}, "expected a topic from position 0 on"),
        (["topic_start", 7, "2", "topic_end", "eos"], {"steps_ratio": 0.04}, "has 20 tokens"),
        (["topic_start", 7, "0", "topic_end", "sync"], {}, "has 0 tokens"),
        (["topic_start", 7, "9", "9", "topic_end", "eos"], {}, "overshoot to 1000 tokens: no room"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kv_commit", ["clean", "published"])
def test_what_crashes_the_published_code_is_a_typed_error(
    script, changes, message, kv_commit, model, monkeypatch
):
    """It ends that request alone, and its pages are free."""
    tags = recorded_tags()
    ids = {str(digit): token_id for digit, token_id in enumerate(tags.digits)} | vars(tags)
    token_ids = [ids.get(token, token) for token in script]
    monkeypatch.setitem(META[0], "max_length", 112)
    monkeypatch.setitem(DATA, "00_script", np.array(token_ids))
    monkeypatch.setitem(DATA, "00_prompt", np.array([7, 9, 11]))
    changes = {"kv_commit": kv_commit, **changes}
    output = run_scripted(model, 0, monkeypatch, kv_cache_tokens=256, **changes).output
    assert output.finish_reason in ("invalid_plan", "error")
    assert isinstance(output.error, GenerationError)
    assert message in str(output.error)


def test_a_plan_may_begin_in_the_prompt(model):
    """As published: topics of the prompt count, and its control tokens are not refused."""
    tags = recorded_tags()
    prompt = [7, tags.topic_start, 8, tags.digits[1], tags.topic_end]
    engine = Engine(model, tags, EngineConfig(page_size=16), letters)
    with pytest.raises(ValueError, match="control token"):
        engine.add("ours", prompt, GenerationParams())
    plan = [[tags.topic_start, 9, tags.digits[2], tags.topic_end, tags.eos]]
    engine.add("published", prompt, GenerationParams(compat="published", temperature=0), plan)
    events = []
    while engine.has_work:
        events += engine.step()
    output = next(event.output for event in events if isinstance(event, Finished))
    assert output.rounds[0].lengths == [10, 20]


def test_an_added_step_that_writes_nothing_adds_no_other(model, monkeypatch):
    """The mask as the likeliest token everywhere: the published threshold rule never ends."""
    forced = {"force_mask": range(400), "threshold": 1.0, "alg": "pd_confidence_threshold"}
    for name, value in forced.items():
        monkeypatch.setitem(META[0], name, value)
    output = run_scripted(model, 0, monkeypatch).output
    assert output.finish_reason == "stop"
    assert output.token_ids.count(recorded_tags().mask) == sum(
        sum(r.lengths) for r in output.rounds
    )
