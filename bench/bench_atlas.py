"""Accuracy of the bundled model against its critical path, over modes and knobs.

    python bench/bench_atlas.py [--model DIR] [--out bench/results/cpu/atlas.json]

One model answers the held-out prompts in every mode. A part of an answer counts when it is an
accepted wording of its fact to the letter. The critical path is the number of forward passes a
request takes part in; seconds are per prompt, one prompt at a time, and tell about this machine
only. Mode "diffusion" is given the true length of the answer, which favours it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
from pathlib import Path
from typing import Any

import torch

from pdiff_runtime import LLM, GenerationParams
from pdiff_runtime.eval.atlas import answer_len, evaluate, held_out_records
from pdiff_runtime.models import BUNDLED_MODEL

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


def measure(llm: LLM, records: Records, setting: dict[str, Any], num_timed: int) -> dict[str, Any]:
    """Accuracy, validity and cost of one setting."""
    params = [
        GenerationParams(
            max_tokens=answer_len(llm, record) + 2
            if setting.get("mode") == "diffusion"
            else MAX_TOKENS,
            **setting,
        )
        for record in records
    ]
    report = evaluate(llm, records, params, batch=len(records))
    families, overall = report.families, report.overall
    result: dict[str, Any] = {
        "accuracy": {name: scores.exact for name, scores in families.items()},
        "num_facts": {name: scores.num_facts for name, scores in families.items()},
        "forwards": {name: scores.num_forwards for name, scores in families.items()},
        "seconds_per_prompt": None,
        "finish_reasons": report.finish_reasons,
    }
    if num_timed:
        timed = evaluate(llm, records[:num_timed], params[:num_timed])
        result["seconds_per_prompt"] = timed.overall.latency
    if overall.topics_exact is not None:
        result["valid_plans"] = 1 - overall.num_failures / overall.num_prompts
        result["topics_exact"] = overall.topics_exact
        result["pad_share"] = overall.padding
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
