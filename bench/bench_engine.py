"""The whole runtime: against the published code, against itself token by token, alone and loaded.

    python bench/bench_engine.py [--out bench/results/cpu] [--only NAME ...]

Random weights write the plan by themselves: prompt of 160 tokens, 8 topics of 5 tokens, so that 8
spans of 60 stand behind a context of 200; bfloat16, half as many steps as a span has tokens. What
is compared takes turns in one process; figures are medians. Tables of load come from
``pdiff bench throughput``'s code.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from published import Published

from pdiff_runtime import LLM, Decoder, EngineConfig, GenerationParams
from pdiff_runtime.bench import engine as runs
from pdiff_runtime.bench.kernels import header
from pdiff_runtime.bench.models import (
    MODELS,
    TAGS,
    WORDS,
    planning_model,
    random_prompt,
)
from pdiff_runtime.engine import SpanUpdate
from pdiff_runtime.eval.atlas import held_out_records

NUM_TOPICS, NUMBER, PROMPT_LEN = 8, 6, 160
TOPIC = [TAGS.topic_start, *WORDS, TAGS.digits[NUMBER], TAGS.topic_end]
PLANNED = GenerationParams(max_tokens=700, steps_ratio=0.5, top_k=50, seed=0)
SAMPLED = dataclasses.replace(PLANNED, temperature=0.2, top_p=0.95)
NUM_TOKENS = NUM_TOPICS * 10 * NUMBER
AR = GenerationParams(mode="ar", max_tokens=NUM_TOKENS, seed=0)

Record = dict[str, Any]


@functools.cache
def model(name: str) -> Decoder:
    return planning_model(MODELS[name], number=NUMBER)


def engine_of(name: str, **config: Any) -> LLM:
    return LLM(model(name), tags=TAGS, config=EngineConfig(max_topics=NUM_TOPICS, **config))


@functools.cache
def bundled() -> tuple[LLM, list[list[int]]]:
    llm = LLM()
    return llm, [llm.encode(record["prompt"]) for record in held_out_records()]


def by_turns(calls: dict[str, Callable[[], float]], num_rounds: int) -> dict[str, float]:
    """Median of what each call returns."""
    values: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(num_rounds):
        for name, call in calls.items():
            values[name].append(call())
    return {name: statistics.median(of_call) for name, of_call in values.items()}


# --- single steps --------------------------------------------------------------------------------


def denoise_ms(llm: LLM, params: GenerationParams) -> float:
    """Median time of a denoising step but the first, which also follows the plan's end."""
    times, last = [], time.perf_counter()
    for event in llm.stream(random_prompt(PROMPT_LEN, 0), params):
        now = time.perf_counter()
        if isinstance(event, SpanUpdate):
            times.append(now - last)
        last = now
    return 1e3 * statistics.median(times[1:])


def published_ms(algorithm: Published) -> float:
    """The same of the published algorithm."""
    starts: list[float] = []
    forward = algorithm._forward

    def timed(*args: Any) -> torch.Tensor:
        starts.append(time.perf_counter())
        return forward(*args)

    algorithm._forward = timed  # type: ignore[method-assign]
    script = TOPIC * NUM_TOPICS + [TAGS.eos]
    algorithm.generate(random_prompt(PROMPT_LEN, 0), script)
    algorithm._forward = forward  # type: ignore[method-assign]
    starts = [*starts[len(script) :], time.perf_counter()]
    return 1e3 * statistics.median(b - a for a, b in itertools.pairwise(starts[1:]))


def steps(num_rounds: int) -> list[Record]:
    """A denoising step of the whole runtime against the published code on the same weights."""
    records = []
    llm = engine_of("34M")
    for name, params in (("greedy", PLANNED), ("temperature 0.2, top-p 0.95", SAMPLED)):
        algorithm = Published(
            llm.model, TAGS, steps_ratio=0.5, temperature=params.temperature or 0.0,
            top_p=params.top_p,
        )  # fmt: skip
        ms = by_turns(
            {
                "ours": functools.partial(denoise_ms, llm, params),
                "published": functools.partial(published_ms, algorithm),
            },
            num_rounds,
        )
        records.append(
            {"what": f"denoising step, {name}", "ours_ms": ms["ours"],
             "published_ms": ms["published"], "ratio": ms["published"] / ms["ours"]}
        )  # fmt: skip
    return records


def invariance(num_rounds: int) -> list[Record]:
    """What ``batch_invariant`` costs."""
    plain, invariant = engine_of("34M"), engine_of("34M", batch_invariant=True)
    records, prompts = [], [random_prompt(PROMPT_LEN, 0)]
    for name, params in (("planned answer", PLANNED), ("autoregressive answer", AR)):
        seconds = by_turns(
            {
                which: functools.partial(_fresh, llm, prompts, [params], False)
                for which, llm in (("plain", plain), ("invariant", invariant))
            },
            num_rounds,
        )
        records.append(
            {"what": f"batch_invariant, {name}", **{f"{k}_s": v for k, v in seconds.items()},
             "ratio": seconds["invariant"] / seconds["plain"]}
        )  # fmt: skip
    return records


# --- whole answers -------------------------------------------------------------------------------


def answers(num_rounds: int) -> list[Record]:
    """A planned answer against as many tokens one by one, and that against reading the weights."""
    llm = engine_of("34M")
    prompt = [random_prompt(PROMPT_LEN, 0)]
    layers = [*llm.model.model.layers.parameters(), llm.model.lm_head.weight]
    num_bytes = sum(parameter.nbytes for parameter in layers)
    copies = itertools.cycle([torch.ones(num_bytes // 4) for _ in range(8)])  # past the caches

    def stream_ms() -> float:
        read, before = next(copies), time.perf_counter()
        read.sum()
        return 1e3 * (time.perf_counter() - before)

    values = by_turns(
        {
            "planned_s": lambda: runs.serve(llm, prompt, [PLANNED]).seconds,
            "ar_s": lambda: runs.serve(llm, prompt, [AR]).seconds,
            "weights_ms": lambda: statistics.median(stream_ms() for _ in range(16)),
        },
        num_rounds,
    )
    step_ms = 1e3 * values["ar_s"] / NUM_TOKENS
    return [
        {"what": f"planned answer of {NUM_TOKENS} tokens against autoregressive", **values,
         "ar_step_ms": step_ms, "ar_step_of_weight_stream": step_ms / values["weights_ms"],
         "ratio": values["ar_s"] / values["planned_s"]}
    ]  # fmt: skip


def batching(num_rounds: int) -> list[Record]:
    """16 requests together against one after another."""
    llm, prompts = bundled()
    own = dataclasses.replace(llm.default_params, max_tokens=200)
    random_prompts = [random_prompt(PROMPT_LEN, seed) for seed in range(16)]
    short = dataclasses.replace(AR, max_tokens=120)
    records = []
    for name, of_case, some, params in (
        ("bundled model, planned", llm, prompts[:16], own),
        ("34M, autoregressive", engine_of("34M"), random_prompts, short),
        ("34M, planned", engine_of("34M"), random_prompts, PLANNED),
    ):
        seconds = by_turns(
            {
                "together_s": functools.partial(_fresh, of_case, some, [params] * 16, False),
                "one_by_one_s": functools.partial(_fresh, of_case, some, [params] * 16, True),
            },
            num_rounds,
        )
        ratio = seconds["one_by_one_s"] / seconds["together_s"]
        records.append({"what": f"16 requests together, {name}", **seconds, "ratio": ratio})
    return records


def _fresh(
    llm: LLM, prompts: list[list[int]], params: list[GenerationParams], is_one_by_one: bool
) -> float:
    """Seconds for all; cached prompts would favour whoever comes second."""
    llm.engine.allocator.clear_cache()
    if is_one_by_one:
        return runs.one_by_one(llm, prompts, params)
    return runs.serve(llm, prompts, params).seconds


# --- load ----------------------------------------------------------------------------------------


def load(_num_rounds: int) -> list[Record]:
    """1, 4, 16 and 64 requests at once."""
    records = []
    llm, prompts = bundled()
    own = dataclasses.replace(llm.default_params, max_tokens=200)
    cases: list[tuple[str, LLM, list[list[int]], GenerationParams, tuple[int, ...]]] = [
        ("bundled, planned", llm, prompts, own, (1, 4, 16, 64)),
        ("bundled, ar", llm, prompts, dataclasses.replace(own, mode="ar"), (1, 4, 16, 64)),
    ]
    for name in MODELS:
        random_prompts = [random_prompt(PROMPT_LEN, seed) for seed in range(64)]
        sizes = (1, 4, 16, 64) if name == "34M" else (1, 4, 16)
        short = dataclasses.replace(AR, max_tokens=120)
        cases += [
            (f"{name}, planned", engine_of(name), random_prompts, PLANNED, sizes),
            # Without the token that starts a plan, which ar mode could only answer with the end.
            (f"{name}, ar, 120 tokens", engine_of(name), [p[:-1] for p in random_prompts], short,
             sizes),
        ]  # fmt: skip
    for row in runs.heading():
        print(f"{'':22}{row}")
    for name, of_case, some, params, sizes in cases:
        runs.serve(of_case, some[-1:], [params])
        for size in sizes:
            record = _median_run(of_case, some[:size], [params] * size)
            records.append({"what": name, **record})
            print(f"{name:22}{runs.line(record)}", flush=True)
    return records


def _median_run(llm: LLM, prompts: list[list[int]], params: list[GenerationParams]) -> Record:
    """Of five runs the one with the median time; one that takes long stands for itself."""
    served: list[runs.Served] = []
    while len(served) < 5 and sum(each.seconds for each in served) < 5:
        llm.engine.allocator.clear_cache()
        served.append(runs.serve(llm, prompts, params))
    return sorted(served, key=lambda each: each.seconds)[len(served) // 2].record()


BENCHES = {
    "steps": steps, "invariance": invariance, "answers": answers, "batching": batching,
    "load": load,
}  # fmt: skip


def main() -> None:
    """Run the benches and write engine.json; what other benches left in it is kept."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("bench/results/cpu"))
    parser.add_argument("--only", nargs="*", default=list(BENCHES), choices=list(BENCHES))
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    file = args.out / "engine.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    print(header()["machine"])
    for name in args.only:
        records = BENCHES[name](args.rounds)
        for record in records:
            if "ratio" in record:
                print(
                    f"{record['what']:60} {record['ratio']:5.2f}x  {_rounded(record)}", flush=True
                )
        results[name] = {**header(), "records": [_rounded(record) for record in records]}
        args.out.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(results, indent=1) + "\n")


def _rounded(record: Record) -> Record:
    return {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in record.items()}


if __name__ == "__main__":
    main()
