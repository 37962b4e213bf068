"""The picture of what ``pareto.py`` measured: facts right against forwards and against time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pdiff_runtime.bench.plots import INK, clean, plain_numbers

MUTED, BLUE = "#777777", "#1f5fbf"
DRAWN = {
    "planned, threshold": ("planned, threshold", BLUE, "o", "-", 2.4),
    "planned, entropy budget": ("planned, entropy budget", "#17a2b8", "v", "-", 2.4),
    "planned, entropy": ("planned, fixed steps", BLUE, "o", "--", 1.4),
    "planned, random order": ("planned, random order", "#8fb3e6", "o", ":", 1.4),
    "Fast-dLLM, prefix cache": ("Fast-dLLM, prefix cache*", "#2f8f4e", "s", "-", 1.8),
    "Fast-dLLM, dual cache": ("Fast-dLLM, dual cache*", "#2f8f4e", "s", "--", 1.2),
    "diffusion, threshold": ("one span, threshold*", "#d9822b", "^", "-", 1.8),
    "diffusion, entropy": ("one span, fixed steps*", "#d9822b", "^", "--", 1.2),
    "skeleton": ("skeleton, token by token", "#8a4fb0", "D", "", 0),
    "ar": ("autoregressive", INK, "*", "", 0),
}
"""Arms in the picture: label, colour, marker, line and its width."""

ABLATIONS = {
    "sync": "trained with sync between coupled parts",
    "control": "trained without sync (control)",
    "no topic": "trained without topic words",
    "joint": "trained with spans that see each other",
    "joint at inference": "the same without training for it",
}
FAMILIES = {"sheet": "independent facts", "coupled": "coupled facts"}


def draw(file: Path) -> Path:
    """Draw ``pareto.json``, and ``ablations.json`` where it lies beside it; returns the picture."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    measured = json.loads(file.read_text("utf-8"))
    ablations = file.with_name("ablations.json")
    has_ablations = ablations.is_file()
    figure = plt.figure(figsize=(12, 9.6 if has_ablations else 6), layout="constrained")
    above, *below = figure.subfigures(2 if has_ablations else 1, 1, height_ratios=[1.7, 1][
        : 1 + has_ablations
    ], squeeze=False)[:, 0]  # fmt: skip
    title = "One small model, every way of decoding it"
    figure.suptitle(title, x=0.01, ha="left", fontsize=17, color=INK)
    forwards, seconds = above.subplots(1, 2, sharey=True)
    _frontier(forwards, measured["points"], "critical_path", 1.0)
    forwards.set_xlabel("critical path: forward passes that wait for one another")
    forwards.set_ylabel("facts right to the letter, %")
    _frontier(seconds, measured["points"], "seconds", 1e3)
    seconds.set_xlabel("milliseconds per answer, one at a time")
    above.legend(
        *forwards.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=9,
        frameon=False,
    )  # fmt: skip
    for part in below:
        lengths, bars = part.subplots(1, 2, width_ratios=[1, 1.1])
        _ablations(json.loads(ablations.read_text("utf-8")), lengths, bars)
    num = measured["prompts"][measured["family"]]
    figure.supxlabel(
        f"atlas-2m, 2.0 M parameters, {num} held-out country sheets, greedy. Up and left is better."
        "  * told the true length of the answer.  Bars: 95 % over prompts.\n"
        f"{measured['machine']}, {measured['date']}",
        fontsize=8, color=MUTED, x=0.01, ha="left",
    )  # fmt: skip
    picture = file.with_suffix(".png")
    figure.savefig(picture, dpi=130)
    plt.close(figure)
    return picture


def _frontier(axes: Any, points: list[dict[str, Any]], cost: str, unit: float) -> None:
    """Quality over one cost, a line for each arm."""
    from matplotlib.ticker import LogLocator

    for arm, (label, color, marker, line, width) in DRAWN.items():
        of_arm = sorted((p for p in points if p["arm"] == arm), key=lambda p: p[cost])
        if not of_arm:
            continue
        x = [unit * p[cost] for p in of_arm]
        y = [100 * p["exact"] for p in of_arm]
        bars = [
            [100 * (p["exact"] - p["exact_low"]) for p in of_arm],
            [100 * (p["exact_high"] - p["exact"]) for p in of_arm],
        ]
        axes.errorbar(
            x, y, bars, color=color, marker=marker, linestyle=line, linewidth=width, label=label,
            markersize=13 if marker == "*" else 6, elinewidth=0.8, alpha=0.95,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.margins(x=0.08)
    axes.set_ylim(0, 103)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    plain_numbers(axes.xaxis)
    clean(axes, label_size=9)


def _ablations(measured: dict[str, Any], lengths: Any, bars: Any) -> None:
    """How much the length of spans matters, and what is lost without topics, sync, isolation."""
    results, unit = measured["results"], measured["header"]["length_unit"]
    scales = {float(name.split()[1]): r for name, r in results.items() if "length_scale" in name}
    scales[unit] = results["bundled"]
    x = sorted(scales)
    lengths.plot(
        [scale / unit for scale in x], [100 * scales[scale]["accuracy"]["sheet"] for scale in x],
        "o-", color=BLUE, linewidth=2,
    )  # fmt: skip
    lengths.set(ylim=(0, 103), xlabel="span length, times what the plan announces")
    lengths.set_ylabel("facts right to the letter, %")
    lengths.set_title("Lengths have to be right", loc="left", fontsize=12, color=INK)
    clean(lengths, label_size=9)

    shown = {arm: label for arm, label in ABLATIONS.items() if arm in results}
    for idx, arm in enumerate(shown):
        accuracy = results[arm]["accuracy"]
        for offset, family, color in ((-0.2, "sheet", BLUE), (0.2, "coupled", "#d9822b")):
            value = 100 * accuracy[family]
            bars.barh(idx + offset, value, 0.36, color=color, label=FAMILIES[family])
            bars.annotate(
                f"{value:.0f}", (value, idx + offset), xytext=(3, 0), textcoords="offset points",
                va="center", fontsize=8, color=INK,
            )  # fmt: skip
    bars.set_yticks(range(len(shown)), shown.values(), fontsize=9)
    bars.invert_yaxis()
    bars.set(xlim=(0, 108), xlabel="facts right to the letter, %")
    title = "Without a part"
    bars.set_title(title, loc="left", fontsize=12, color=INK)
    handles, labels = bars.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    bars.legend(
        unique.values(), unique, fontsize=9, frameon=False, loc="lower right",
        bbox_to_anchor=(1, 0.99), ncols=2,
    )  # fmt: skip
    clean(bars, label_size=9)
