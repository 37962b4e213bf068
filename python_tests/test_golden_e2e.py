"""Whole generations, step by step, against the recorded behaviour of the published code.

The autoregressive picks are scripted there, so they are here: the next logit of the script is set
to 1e4. Everything else is the model's own.
"""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import safetensors.torch
import torch
from golden_data import GOLDEN, load_json, load_npz
from tiny_engine import DirtyAllocator, letters

from pdiff_runtime import ControlTokens, Decoder, EngineConfig, GenerationParams, ops
from pdiff_runtime.engine import Engine, RequestOutput
from pdiff_runtime.engine.output import Finished
from pdiff_runtime.models import ModelConfig
from pdiff_runtime.models.attention import rotate

DATA = load_npz("e2e")
META = json.loads(str(DATA["meta"]))
CASES = [pytest.param(int(case), id=META[case]["name"]) for case in DATA["cases"]]
FORCED = 1e4


def golden_tags() -> ControlTokens:
    fields = load_json("tiny_config")
    ids = fields["tags"]
    return ControlTokens(
        topic_start=ids["PROMISE_START"], topic_end=ids["PROMISE_END"],
        async_start=ids["ASYNC_START"], async_end=ids["ASYNC_END"], sync=ids["SYNC_TOKEN_ID"],
        mask=ids["MASK_TOKEN_ID"], pad=ids["PAD_TOKEN_ID"], eos=ids["EOS_TOKEN_ID"],
        digits=tuple(fields["digit_token_ids"]),
    )  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Decoder:
    decoder = Decoder(ModelConfig.from_hf(load_json("tiny_config") | {"model_type": "Dream"}))
    decoder.load_state_dict(safetensors.torch.load_file(GOLDEN / "tiny.safetensors"))
    return decoder.eval().requires_grad_(False)


def params_of(case: dict, **changes: object) -> GenerationParams:
    max_tokens = case.get("max_new_tokens") or case["max_length"] - 12
    return GenerationParams(
        compat="published",
        max_tokens=max_tokens,
        temperature=case["temperature"],
        top_p=case["top_p"] or 1.0,
        top_k=None if case["top_k_is_default"] else case["top_k"] or 0,
        unmask=case["alg"].removeprefix("pd_"),
        steps_ratio=case["steps_ratio"],
        threshold=case.get("threshold"),
        length_scale=case["length_scale"],
        isolate_spans=not case["dense"],
        record_steps=True,
        **changes,
    )


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
    model: Decoder, case: int, monkeypatch: pytest.MonkeyPatch, **changes: object
) -> Recorded:
    tags, meta = golden_tags(), META[case]
    engine = Engine(model, tags, EngineConfig(page_size=16, kv_cache_tokens=1024), letters)
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
    assert sum(token_id == golden_tags().mask for token_id in sequence) == meta["final_masks"]

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
