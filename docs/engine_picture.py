"""Draws docs/engine.svg: what each request does in each forward of a small, crowded engine.

python docs/engine_picture.py
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from pdiff_runtime import LLM, EngineConfig, GenerationParams
from pdiff_runtime.engine.request import Work

COLOURS = {
    "prefill": "#8d99ae", "plan": "#457b9d", "denoise": "#f4a261", "commit": "#2a9d8f",
    "waiting": "#eeeeee",
}  # fmt: skip
ARRIVALS = (
    (0, "Tell me about Peru: capital, currency, climate and exports.", {}, 0),
    (0, "Tell me about Chad.",
     {"plan": [[("capital", 8), ("climate", 12)], [("neighbours", 12), ("exports", 12)]]}, 0),
    (2, "Tell me about Japan: capital, currency, climate, neighbours and exports.", {}, 0),
    (6, "What is the currency of Kenya?", {}, -1),
    (8, "Tell me about Brazil: capital, currency and climate.", {}, 0),
)  # fmt: skip
LABELS = ("a: four topics", "b: own plan, two rounds", "c: five topics", "d: priority", "e")


def cells_of(work: Work) -> dict[str, int]:
    """How many rows of each kind a request has in a forward."""
    request, cells = work.request, defaultdict(int)
    for lo, hi, kind, _ in work.context:
        phase = "commit" if kind == "full" else "prefill" if lo < request.prompt_len else "plan"
        cells[phase] += hi - lo
    cells["denoise"] += sum(span.hi - span.lo for span in work.spans)
    return {phase: rows for phase, rows in cells.items() if rows}


def record() -> list[dict[str, dict[str, int]]]:
    """Per forward, the cells of each request."""
    torch.manual_seed(0)
    config = EngineConfig(kv_cache_tokens=192, page_size=16, max_batch_tokens=48)
    llm = LLM(dtype=torch.float32, config=config)
    engine, steps, schedule = llm.engine, [], llm.engine.scheduler.schedule

    def recorded() -> list[Work]:
        works = schedule()
        steps.append({work.request.request_id: cells_of(work) for work in works})
        for request in engine.scheduler.waiting:
            steps[-1][request.request_id] = {"waiting": 1}
        return works

    engine.scheduler.schedule = recorded  # type: ignore[method-assign]
    while engine.has_work or len(steps) == 0:
        for idx, (step, prompt, fields, priority) in enumerate(ARRIVALS):
            if step == len(steps):
                params = GenerationParams(
                    unmask="confidence_threshold", threshold=0.7, max_tokens=100, **fields
                )
                rounds = llm.encode_plan(params.plan)
                engine.add(str(idx), llm.encode(prompt), params, rounds, priority=priority)
        engine.step()
    return steps


def main() -> None:
    """Draw one line per request, one column per forward; height and number are rows."""
    steps = record()
    figure, axes = plt.subplots(figsize=(11, 3.6), layout="constrained")
    for column, step in enumerate(steps):
        for request_id, cells in step.items():
            bottom = -int(request_id) - 0.4
            total = sum(cells.values())
            for phase, rows in cells.items():
                height = 0.8 * rows / total
                axes.bar(column, height, 0.92, bottom, color=COLOURS[phase])
                bottom += height
            if "waiting" not in cells:
                axes.text(column, -int(request_id), total, ha="center", va="center", fontsize=7)
    axes.set_yticks([-i for i in range(len(LABELS))], LABELS)
    axes.set_xlabel("forward; the numbers are rows, at most 48 in a forward, 12 pages of 16 tokens")
    axes.set_xlim(-0.6, len(steps) - 0.4)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS.values()]
    figure.legend(handles, list(COLOURS), ncols=5, loc="outside upper right", frameon=False)
    plt.rcParams["svg.hashsalt"] = "pdiff"
    figure.savefig(Path(__file__).with_name("engine.svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
