"""Print the README's tables from the JSON files in `bench/results/cpu`.

python bench/readme_table.py
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results" / "cpu"
RESULTS, ENGINE_RESULTS = FOLDER / "kernels.json", FOLDER / "engine.json"
PARETO_RESULTS, ABLATION_RESULTS = FOLDER / "pareto.json", FOLDER / "ablations.json"

ROWS = (
    ("hybrid_attention", "long", "attention forward, long"),
    ("hybrid_attention", "paper", "attention forward, paper"),
    ("hybrid_attention", "denoise", "denoise step, 8 spans of 60 over 736 paged keys"),
    ("hybrid_attention", "answers", "8 single rows over 2048 paged keys each"),
    ("hybrid_attention", "mixed", "two such steps, such rows and a prompt in one batch"),
    ("hybrid_attention_backward", "long", "attention backward, long"),
    ("hybrid_attention_backward", "paper", "attention backward, paper"),
    ("unmask", "greedy", "unmask, 320 x 152,064, greedy"),
    ("unmask", "sampled", "unmask with temperature"),
    ("unmask", "filtered", "unmask with temperature, top-p and top-k"),
    ("weighted_cross_entropy", "fresh", "weighted cross-entropy and gradient, 256 x 152,064"),
    ("weighted_cross_entropy", "in place", "the same over the logits"),
    ("rms_norm", "56M", "RMS norm, 480 x 512"),
    ("swiglu", "56M", "SwiGLU, 480 x 1,408"),
    ("rope_kv_write", "56M", "rotary embedding and write to pages, 480 rows, 8 and 2 heads of 64"),
    ("attention_plan", "plan", "layout and plan of 4,096 tokens, 100 segments"),
)
SHORT = {
    "SDPA, dense mask": "dense-mask SDPA",
    "SDPA, dense mask, a call each": "SDPA call by call",
    "SDPA, causal": "causal SDPA",
    "gathered keys, then SDPA, dense mask": "SDPA with its gather",
    "FlexAttention, compiled": "compiled FlexAttention",
    "torch, eager": "eager torch",
    "torch, compiled": "compiled torch",
    "one read": "one read",
    "torch.mm": "the matrix product",
}


LOADS = ("bundled, planned", "34M, planned", "34M, ar, 120 tokens")


POINTS = (
    ("ar", 0, "autoregressive"),
    ("planned, threshold", 0.95, "**planned, threshold 0.95** (the model's default)"),
    ("planned, threshold", 0.7, "planned, threshold 0.7"),
    ("planned, entropy budget", 0.3, "planned, entropy budget of 0.3 nats a step"),
    ("planned, factor", 1.0, "planned, factor 1"),
    ("planned, entropy", 1.0, "planned, entropy, as many steps as the longest span has tokens"),
    ("planned, entropy", 0.5, "the same, half as many steps"),
    ("planned, random order", 0.5, "the same, positions in random order"),
    ("planned, joint", 0.95, "planned, threshold 0.95, spans that see each other"),
    ("planned, as published", 1.0, 'planned, entropy, `compat="published"`, greedy'),
    ("Fast-dLLM, prefix cache", 0.95, "Fast-dLLM blocks of 8, threshold 0.95, prefix cache *"),
    ("Fast-dLLM, dual cache", 0.95, "the same, dual cache *"),
    ("diffusion, threshold", 0.95, "one-span diffusion, threshold 0.95 *"),
    ("diffusion, entropy", 1.0, "one-span diffusion, entropy, one token a step *"),
    ("skeleton", 0, "skeleton: the plan's branches token by token"),
)
ARMS = (
    ("sync", "trained with sync between coupled parts"),
    ("control", "trained without (control)"),
    ("no topic", "trained without topic words"),
    ("joint", "trained with spans that see each other"),
    ("joint at inference", "spans that see each other, not trained so"),
    ("true plan", "the true plan given"),
    ("length_scale 3", "spans 0.75 times as long as announced"),
    ("length_scale 5", "spans 1.25 times as long"),
)


def number(x: float) -> str:
    """Two or three digits: 0.17, 2.6, 12, 340."""
    return f"{x:.0f}" if x >= 10 else f"{x:.1f}" if x >= 1 else f"{x:.2f}"


def row_of(title: str, records: Sequence[Mapping[str, Any]]) -> str:
    """One line of the table: a number for each dtype, one slash between two."""
    first = records[0]

    def joined(numbers: Iterable[str]) -> str:
        return " / ".join(numbers)

    if "rate" in first:
        ours = f"{joined(number(r['rate']) for r in records)} G{first['unit']}/s"
    else:
        ours = f"{joined(number(1e3 * r['ms']) for r in records)} µs"
    if "share" in first:
        shares = joined(f"{100 * r['share']:.0f}" for r in records)
        ours += f", {shares} % of {SHORT.get(first['limit'], first['limit'])}"
    peers = ", ".join(
        joined(f"{number(r['peers'][name]['ms'] / r['ms'])}x" for r in records)
        + f" {SHORT.get(name, name)}"
        for name in first["peers"]
    )
    return f"| {title} | {ours} | {peers} |"


def table_of(results: Mapping[str, Any]) -> str:
    """The table in Markdown: float32, then bfloat16."""
    lines = ["| what | ours, fp32 / bf16 | times ours |", "|---|---|---|"]
    for kernel, case, title in ROWS:
        found = [r for r in results["kernels"][kernel]["records"] if r["case"] == case]
        lines.append(row_of(title, [r for r in found if r["dtype"] != "fp16" and "at" not in r]))
    return "\n".join(lines)


def engine_table_of(results: Mapping[str, Any]) -> str:
    """The runtime's table in Markdown."""
    lines = ["| what | ours | |", "|---|---|---|"]
    for r in results["steps"]["records"]:
        lines.append(
            f"| {r['what']} | {number(r['ours_ms'])} ms "
            f"| {number(r['ratio'])}x the published algorithm ({number(r['published_ms'])} ms) |"
        )
    for r in results["answers"]["records"]:
        lines.append(
            f"| {r['what']} | {number(r['planned_s'])} s | {number(r['ratio'])}x "
            f"({number(r['ar_s'])} s, {number(r['ar_step_ms'])} ms a step) |"
        )
    for r in results["batching"]["records"]:
        lines.append(
            f"| {r['what']} | {number(r['together_s'])} s "
            f"| {number(r['ratio'])}x one after another |"
        )
    for r in results["invariance"]["records"]:
        cost = f"takes {number(r['ratio'])} times as long"
        lines.append(f"| {r['what']} | {number(r['invariant_s'])} s | {cost} |")
    lines += [
        "",
        "| load | requests | answers/s | tokens/s | to plan | to first span | to answer | step "
        "| scheduling | with tensors |",
        "|---" * 10 + "|",
    ]
    for r in results["load"]["records"]:
        if r["what"] not in LOADS:
            continue
        moments = (r["ms_to_plan"], r["ms_to_span"], r["ms_to_end"], r["step_ms"])
        cells = " | ".join("" if ms is None else f"{number(ms)} ms" for ms in moments)
        lines.append(
            f"| {r['what']} | {r['num_requests']} | {number(r['requests_per_s'])} "
            f"| {number(r['tokens_per_s'])} | {cells} | {100 * r['scheduling']:.1f} % "
            f"| {100 * r['overhead']:.1f} % |"
        )
    return "\n".join(lines)


def pareto_table_of(results: Mapping[str, Any]) -> str:
    """Ways of decoding the bundled model, in Markdown."""
    found = {(p["arm"], p["value"]): p for p in results["points"]}
    ar = found["ar", 0]
    lines = [
        "| decoding | facts exact | critical path | of autoregressive | milliseconds |",
        "|---" * 5 + "|",
    ]
    for arm, value, title in POINTS:
        p = found[arm, value]
        lines.append(
            f"| {title} | {100 * p['exact']:.1f} % | {p['critical_path']:.1f} "
            f"| {p['critical_path'] / ar['critical_path']:.2f} | {1e3 * p['seconds']:.0f} |"
        )
    return "\n".join(lines)


def ablation_table_of(results: Mapping[str, Any]) -> str:
    """What is lost without a part of the method, in Markdown."""
    lines = [
        "| | independent facts exact | coupled facts exact | critical path, coupled |",
        "|---|---|---|---|",
    ]
    for arm, title in ARMS:
        r = results["results"][arm]
        sheet, coupled = (100 * r["accuracy"][family] for family in ("sheet", "coupled"))
        path = r["critical_path"]["coupled"]
        lines.append(f"| {title} | {sheet:.1f} % | {coupled:.1f} % | {path:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table_of(json.loads(RESULTS.read_text())))
    print()
    print(engine_table_of(json.loads(ENGINE_RESULTS.read_text())))
    print()
    print(pareto_table_of(json.loads(PARETO_RESULTS.read_text())))
    print()
    print(ablation_table_of(json.loads(ABLATION_RESULTS.read_text())))
