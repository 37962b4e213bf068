"""Accuracy of the bundled model against its critical path, over modes and knobs.

    python bench/bench_atlas.py [--model DIR] [--out bench/results/cpu/atlas.json]

One model answers the held-out prompts in every mode. A part of an answer counts when it is an
accepted wording of its fact to the letter. The critical path is the number of forward passes a
request takes part in; seconds are per prompt, one prompt at a time, and tell about this machine
only. Mode "diffusion" is given the true length of the answer, which favours it.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from pdiff_runtime import LLM, GenerationParams, RequestOutput
from pdiff_runtime.bench.models import held_out_records
from pdiff_runtime.models import BUNDLED_MODEL
from pdiff_runtime.train.synth import score

Records = list[dict[str, Any]]

MAX_TOKENS = 200
SETTINGS: dict[str, dict[str, Any]] = {
    "ar": {"mode": "ar"},
    **{f"planned, steps_ratio {r}": {"steps_ratio": r} for r in (0.05, 0.1, 0.25, 0.5, 1.0)},
    **{
        f"planned, threshold {p}": {"unmask": "confidence_threshold", "threshold": p}
        for p in (0.3, 0.5, 0.7, 0.9, 0.95, 0.99)
    },
    "planned, threshold 0.9, no grammar": {
        "unmask": "confidence_threshold", "threshold": 0.9, "use_grammar": False,
    },
    **{f"diffusion, steps_ratio {r}": {"mode": "diffusion", "steps_ratio": r}
       for r in (0.1, 0.25, 0.5, 1.0)},
    "diffusion, threshold 0.9": {
        "mode": "diffusion", "unmask": "confidence_threshold", "threshold": 0.9,
    },
}  # fmt: skip


def marks_of(record: dict[str, Any], output: RequestOutput, mode: str) -> list[bool]:
    """Right or wrong for each part of a record."""
    parts = record["parts"]
    if mode != "planned":
        return score(parts, answer_text=output.text)
    spans = collections.defaultdict(list)
    for plan_round in output.rounds:
        for topic, text in zip(plan_round.topics, plan_round.spans, strict=False):
            spans[topic].append(text)
    texts = [spans[p["topic"]].pop(0) if spans[p["topic"]] else "" for p in parts]
    return score(parts, texts)


def answer_len(llm: LLM, record: dict[str, Any]) -> int:
    """Tokens of the record's answer in its first wordings, rounded up to the length unit."""
    assert llm.tokenizer is not None
    text = " ".join(part["accepted"][0] for part in record["parts"])
    unit = llm.model.config.length_unit
    return -(-len(llm.tokenizer.encode_text(text)) // unit) * unit


def measure(llm: LLM, records: Records, setting: dict[str, Any], num_timed: int) -> dict[str, Any]:
    """Accuracy, validity and cost of one setting."""
    mode = setting.get("mode", "planned")
    params = [
        GenerationParams(
            max_tokens=answer_len(llm, record) + 2 if mode == "diffusion" else MAX_TOKENS, **setting
        )
        for record in records
    ]
    outputs = llm.generate([record["prompt"] for record in records], params)
    right: dict[str, list[bool]] = collections.defaultdict(list)
    topics_right, lengths, needed = [], 0, 0
    for record, output in zip(records, outputs, strict=True):
        right[record["family"]] += marks_of(record, output, mode)
        topics = [topic for plan_round in output.rounds for topic in plan_round.topics]
        topics_right.append(topics == [part["topic"] for part in record["parts"]])
        lengths += output.usage.span_tokens
        needed += output.usage.span_tokens - output.usage.pad_tokens
    seconds = []
    for record, each in list(zip(records, params, strict=True))[:num_timed]:
        start = time.perf_counter()
        llm.generate([record["prompt"]], each)
        seconds.append(time.perf_counter() - start)
    result: dict[str, Any] = {
        "accuracy": {family: statistics.mean(marks) for family, marks in right.items()},
        "num_facts": {family: len(marks) for family, marks in right.items()},
        "forwards": {
            family: statistics.mean(
                o.usage.num_forwards
                for r, o in zip(records, outputs, strict=True)
                if r["family"] == family
            )
            for family in right
        },
        "seconds_per_prompt": statistics.median(seconds) if seconds else None,
        "finish_reasons": collections.Counter(o.finish_reason for o in outputs),
    }
    if mode == "planned":
        result["valid_plans"] = statistics.mean(o.finish_reason == "stop" for o in outputs)
        result["topics_exact"] = statistics.mean(topics_right)
        result["pad_share"] = 1 - needed / max(1, lengths)
    return result


def plot(results: dict[str, Any], path: Path) -> None:
    """Accuracy of country sheets against forwards."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for label, prefix, marker in (
        ("autoregressive", "ar", "s"),
        ("planned, fixed steps", "planned, steps_ratio", "o"),
        ("planned, threshold", "planned, threshold", "^"),
        ("one-span diffusion, true length, fixed steps", "diffusion, steps_ratio", "x"),
        ("one-span diffusion, true length, threshold", "diffusion, threshold", "+"),
    ):
        points = sorted(
            (r["forwards"]["sheet"], 100 * r["accuracy"]["sheet"])
            for name, r in results.items()
            if name.startswith(prefix) and "no grammar" not in name
        )
        if points:
            axes.plot(*zip(*points, strict=True), marker=marker, label=label)
    axes.set(xlabel="forward passes per answer", ylabel="facts exact, %", ylim=(0, 102))
    axes.set_title("atlas-2m, country sheets, held-out combinations", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Run all settings and write one JSON file and one plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=BUNDLED_MODEL)
    parser.add_argument("--out", type=Path, default=Path("bench/results/cpu/atlas.json"))
    parser.add_argument("--only", default="", help="run settings whose name contains this")
    parser.add_argument("--num-timed", type=int, default=20)
    parser.add_argument("--replot", action="store_true", help="draw again from --out")
    parser.add_argument("--limit", type=int, default=None, help="use the first N records")
    args = parser.parse_args()
    if args.replot:
        plot(json.loads(args.out.read_text())["results"], args.out.with_suffix(".png"))
        return
    llm = LLM(args.model)
    records = held_out_records()[: args.limit]
    results = {}
    for name, setting in SETTINGS.items():
        if args.only not in name:
            continue
        results[name] = measure(llm, records, setting, args.num_timed)
        accuracy = results[name]["accuracy"]
        shown = "  ".join(f"{family} {100 * value:5.1f} %" for family, value in accuracy.items())
        forwards = results[name]["forwards"].get("sheet", 0.0)
        print(f"{name:36} {shown}  sheet forwards {forwards:5.1f}", flush=True)
    header = {
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "prompts_seed": records[0]["seed"],
        "model": dataclasses.asdict(llm.model.config),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"header": header, "results": results}, indent=1) + "\n")
    plot(results, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
