"""Every way of decoding one model: how good, how long, and along how many forwards.

    python bench/pareto.py [--model DIR] [--out bench/results/cpu] [--only ARM ...]
    python bench/pareto.py --draw            # the picture again from what was measured

The bundled model answers its 320 held-out prompts with every setting of every arm, greedily, so
quality is the same in each run. Figures are of country sheets, two to five facts each: a fact is
right to the letter or wrong, and an answer that does not end by itself is wrong. Seconds are of
one prompt at a time (and per prompt of eight together), all settings by turns in one process; the
critical path is the forwards that had to wait for one another.

The arms share weights, engine and kernels; what was trained how is not equal, and is said so here:
the second stage of training was 78 % planned, 14 % plain text ("ar") and 8 % one-span diffusion.
One-span arms get the true length of the answer, which no user knows, except "length unknown".
Branches of "skeleton" were never trained: spans have always seen all of themselves.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

from pareto_picture import draw

from pdiff_runtime import LLM, EngineConfig, GenerationParams
from pdiff_runtime.bench.kernels import header
from pdiff_runtime.engine.params import ONE_SPAN_MODES
from pdiff_runtime.eval.atlas import Record, Report, answer_len, evaluate, held_out_records
from pdiff_runtime.models import BUNDLED_MODEL

FAMILY = "sheet"
MAX_TOKENS = 200
NUM_ROUNDS, NUM_TIMED, TOGETHER = 5, 16, 8
RATIOS = (0.05, 0.1, 0.25, 0.5, 1.0)
THRESHOLDS = (0.3, 0.5, 0.7, 0.9, 0.95, 0.99)


@dataclasses.dataclass(frozen=True)
class Arm:
    """A way of decoding, and the settings of its knob.

    Attributes:
        knob: Field of ``GenerationParams`` that varies; "" for a single point.
        fixed: The other fields.
        knows_length: Whether a one-span answer is as long as the true one.
    """

    name: str
    knob: str
    values: tuple[float, ...]
    fixed: dict[str, Any]
    knows_length: bool = True

    def params(self, llm: LLM, record: Record, value: float) -> GenerationParams:
        """How this arm answers a record."""
        fields = dict(self.fixed)
        if self.knob:
            fields[self.knob] = value
        max_tokens = MAX_TOKENS
        if fields.get("mode") in ONE_SPAN_MODES and self.knows_length:
            max_tokens = answer_len(llm, record) + 2
        return GenerationParams(max_tokens=max_tokens, **fields)


def _threshold(**fields: Any) -> dict[str, Any]:
    return {"unmask": "confidence_threshold", **fields}


ARMS = [
    Arm("ar", "", (0,), {"mode": "ar"}),
    Arm("planned, threshold", "threshold", THRESHOLDS, _threshold()),
    Arm("planned, entropy", "steps_ratio", RATIOS, {}),
    Arm("planned, probability", "steps_ratio", RATIOS, {"unmask": "maskgit_plus"}),
    Arm("planned, margin", "steps_ratio", RATIOS, {"unmask": "topk_margin"}),
    Arm("planned, random order", "steps_ratio", RATIOS, {"unmask": "origin", "seed": 0}),
    Arm("planned, factor", "threshold", (0.25, 0.5, 1.0, 2.0, 4.0), {"unmask": "factor"}),
    Arm("planned, entropy budget", "threshold", (0.01, 0.1, 0.3, 1.0, 3.0),
        {"unmask": "entropy_budget"}),
    Arm("planned, joint", "threshold", THRESHOLDS, _threshold(isolate_spans=False)),
    Arm("planned, as published", "steps_ratio", RATIOS,
        {"compat": "published", "temperature": 0.0, "top_k": 0}),
    Arm("diffusion, threshold", "threshold", THRESHOLDS, _threshold(mode="diffusion")),
    Arm("diffusion, entropy", "steps_ratio", RATIOS, {"mode": "diffusion"}),
    Arm("diffusion, random order", "steps_ratio", RATIOS,
        {"mode": "diffusion", "unmask": "origin", "seed": 0}),
    Arm("diffusion, length unknown", "threshold", (0.7, 0.9), _threshold(mode="diffusion"),
        knows_length=False),
    Arm("Fast-dLLM, prefix cache", "threshold", THRESHOLDS,
        _threshold(mode="fast_dllm", block_len=8)),
    Arm("Fast-dLLM, dual cache", "threshold", THRESHOLDS,
        _threshold(mode="fast_dllm", block_len=8, block_cache="dual")),
    Arm("Fast-dLLM, no cache", "threshold", (0.7, 0.9),
        _threshold(mode="fast_dllm", block_len=8, block_cache="off")),
    Arm("Fast-dLLM, factor, prefix cache", "threshold", (0.5, 1.0, 2.0),
        {"unmask": "factor", "mode": "fast_dllm", "block_len": 8}),
    Arm("Fast-dLLM, length unknown", "threshold", (0.7, 0.9),
        _threshold(mode="fast_dllm", block_len=8), knows_length=False),
    Arm("skeleton", "", (0,), {"mode": "skeleton"}),
]  # fmt: skip


@dataclasses.dataclass
class Point:
    """One setting of an arm, and what came of it."""

    arm: Arm
    value: float
    params: list[GenerationParams]
    report: Report
    seconds: list[float] = dataclasses.field(default_factory=list)
    seconds_together: list[float] = dataclasses.field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        scores = self.report.families[FAMILY]
        low, high = interval(self.report)
        return {
            "arm": self.arm.name,
            "knob": self.arm.knob,
            "value": self.value,
            "exact": scores.exact,
            "exact_low": low,
            "exact_high": high,
            "critical_path": scores.critical_path,
            "num_forwards": scores.num_forwards,
            "seconds": statistics.median(self.seconds),
            "seconds_together": statistics.median(self.seconds_together),
            "report": self.report.to_dict(),
        }


def interval(report: Report) -> tuple[float, float]:
    """95 % bootstrap interval of the share of right facts; prompts are drawn, not facts."""
    marks = [a.marks for a in report.answers if a.record["family"] == FAMILY]
    generator = random.Random(0)
    shares = []
    for _ in range(1000):
        drawn = generator.choices(marks, k=len(marks))
        shares.append(sum(map(sum, drawn)) / sum(map(len, drawn)))
    shares.sort()
    return shares[25], shares[974]


def measure(llm: LLM, records: list[Record], arms: list[Arm]) -> list[Point]:
    """Quality of every setting first, then all of their times by turns."""
    points = []
    for arm in arms:
        for value in arm.values:
            params = [arm.params(llm, record, value) for record in records]
            report = evaluate(llm, records, params, batch=len(records))
            points.append(Point(arm, value, params, report))
            scores = report.families[FAMILY]
            print(
                f"{arm.name:34} {arm.knob:12} {value:5g}  exact {100 * scores.exact:5.1f} %  "
                f"critical path {scores.critical_path:6.1f}",
                flush=True,
            )
    timed = [idx for idx, r in enumerate(records) if r["family"] == FAMILY][:NUM_TIMED]
    prompts = [records[idx]["prompt"] for idx in timed]
    for _ in range(NUM_ROUNDS):
        for point in points:
            params = [point.params[idx] for idx in timed]
            start = time.perf_counter()
            for each in zip(prompts, params, strict=True):
                llm.generate(*each)
            point.seconds.append((time.perf_counter() - start) / len(timed))
            start = time.perf_counter()
            for at in range(0, len(timed), TOGETHER):
                llm.generate(prompts[at : at + TOGETHER], params[at : at + TOGETHER])
            point.seconds_together.append((time.perf_counter() - start) / len(timed))
    return points


def main() -> None:
    """Measure, write ``pareto.json``, draw ``pareto.png``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=BUNDLED_MODEL)
    parser.add_argument("--out", type=Path, default=Path("bench/results/cpu"))
    parser.add_argument("--only", nargs="*", metavar="ARM", help="arms whose name contains one")
    parser.add_argument("--limit", type=int, help="the first N records")
    parser.add_argument("--draw", action="store_true", help="only the picture, from the JSON")
    args = parser.parse_args()
    file = args.out / "pareto.json"
    if not args.draw:
        records = held_out_records()[: args.limit]
        arms = [a for a in ARMS if not args.only or any(part in a.name for part in args.only)]
        result = header()
        llm = LLM(args.model, config=EngineConfig(prefix_cache=False))  # prompts come again
        points = measure(llm, records, arms)
        counts = collections.Counter(record["family"] for record in records)
        result |= {
            "prompts": dict(counts),
            "prompts_seed": records[0]["seed"],
            "family": FAMILY,
            "points": [point.to_dict() for point in points],
        }
        args.out.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    draw(file)


if __name__ == "__main__":
    main()
