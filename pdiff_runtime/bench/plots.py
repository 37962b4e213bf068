"""Pictures of what `pdiff bench kernels` measured: one for each kernel."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Record = Mapping[str, Any]

INK, GRID = "#222222", "#dddddd"
COLORS = ("#c44e52", "#4c72b0", "#55a868", "#8172b2", "#ccb974")
OURS = "#111111"


def draw_all(file: Path) -> list[Path]:
    """Draw each kernel of a ``kernels.json`` beside it, to ``<kernel>.png``.

    Returns:
        The pictures.
    """
    pictures = []
    for kernel, measured in json.loads(file.read_text())["kernels"].items():
        header = f"{measured['machine']}, {measured['date']}"
        pictures += draw(kernel, header, measured["records"], file.parent)
    return pictures


def draw(kernel: str, header: str, records: Sequence[Record], folder: Path) -> list[Path]:
    """Draw how many times longer each peer takes, and how cost grows along each sweep.

    Returns:
        The picture, if there is anything to draw.
    """
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    alone = [r for r in records if "at" not in r and r["peers"]]
    sweeps = _sweeps(records)
    if not alone and not sweeps:
        return []
    names = list(dict.fromkeys(name for r in records for name in r["peers"]))
    color_of = dict(zip(names, itertools.cycle(COLORS), strict=False))
    num_bars = sum(len(r["peers"]) for r in alone)
    num_rows = -(-len(sweeps) // 2)
    bars_height = 1.0 + 0.26 * num_bars if alone else 0.0
    heights = [bars_height] * bool(alone) + [3.2] * num_rows
    figure = plt.figure(figsize=(10, sum(heights) + 0.8), layout="constrained")
    grid = figure.add_gridspec(len(heights), 2, height_ratios=heights)
    figure.suptitle(kernel, fontsize=14, color=INK, x=0.01, ha="left")
    if alone:
        _bars(figure.add_subplot(grid[0, :]), alone, color_of)
    first = 1 if alone else 0
    for idx, (title, sweep) in enumerate(sweeps.items()):
        is_last = idx == len(sweeps) - 1
        columns = slice(None) if is_last and idx % 2 == 0 else idx % 2
        axes = figure.add_subplot(grid[first + idx // 2, columns])
        _lines(axes, title, sweep, color_of)
    figure.supxlabel(header, fontsize=7, color="#777777", x=0.01, ha="left")
    file = folder / f"{kernel}.png"
    figure.savefig(file, dpi=110)
    plt.close(figure)
    return [file]


def _sweeps(records: Sequence[Record]) -> dict[str, list[Record]]:
    sweeps: dict[str, list[Record]] = {}
    for record in records:
        if "at" in record:
            sweeps.setdefault(record["case"], []).append(record)
    return {title: sorted(sweep, key=lambda r: float(r["at"])) for title, sweep in sweeps.items()}


def _bars(axes: Any, records: Sequence[Record], color_of: Mapping[str, str]) -> None:
    """A bar for each peer of each case: its time as a multiple of ours."""
    at, ticks, labels, shown = 0.0, [], [], set()
    for record in records:
        start = at
        for name, peer in record["peers"].items():
            ratio = peer["ms"] / record["ms"]
            label = name if name not in shown else None
            shown.add(name)
            axes.barh(at, ratio - 1, left=1, height=0.85, color=color_of[name], label=label)
            axes.annotate(
                f"{ratio:.1f}x", (max(ratio, 1), at), xytext=(3, 0),
                textcoords="offset points", va="center", fontsize=7.5, color=INK,
            )  # fmt: skip
            at += 1
        share = (
            f"  ({100 * record['share']:.0f} % of {record['limit']})" if "share" in record else ""
        )
        ticks.append((start + at - 1) / 2)
        labels.append(f"{record['case']} {record['dtype']}{share}")
        at += 0.6
    axes.set_xscale("log")
    axes.margins(x=0.12)
    plain_numbers(axes.xaxis)
    axes.axvline(1, color=OURS, linewidth=1.2)
    axes.set_yticks(ticks, labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("times ours (right of 1: slower than ours)", fontsize=8)
    axes.legend(fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=3)
    axes.margins(y=0.01)
    clean(axes)


def _lines(axes: Any, title: str, records: Sequence[Record], color_of: Mapping[str, str]) -> None:
    """Milliseconds against what varies."""
    axes.plot(
        [r["at"] for r in records], [r["ms"] for r in records], "o-", color=OURS, linewidth=2,
        markersize=4, label="ours",
    )  # fmt: skip
    for name in dict.fromkeys(name for r in records for name in r["peers"]):
        having = [r for r in records if name in r["peers"]]
        axes.plot(
            [r["at"] for r in having], [r["peers"][name]["ms"] for r in having], "o-",
            color=color_of[name], linewidth=1.2, markersize=3, label=name,
        )  # fmt: skip
    values = [float(r["at"]) for r in records]
    if max(values) > 4 * min(values):
        axes.set_xscale("log")
    times = [r["ms"] for r in records] + [p["ms"] for r in records for p in r["peers"].values()]
    if max(times) > 12 * min(times):
        axes.set_yscale("log")
        plain_numbers(axes.yaxis)
    else:
        axes.set_ylim(0, 1.15 * max(times))
    axes.set_xticks(values, [_short(x) for x in values], fontsize=7.5)
    axes.xaxis.minorticks_off()
    axes.set_title(title, fontsize=9, loc="left")
    axes.set_xlabel(records[0]["axis"], fontsize=8)
    axes.set_ylabel("ms", fontsize=8)
    axes.legend(fontsize=7, frameon=False)
    clean(axes)


def _short(value: float) -> str:
    return f"{value / 1000:g}k" if value >= 1000 and value % 1000 == 0 else f"{value:g}"


def plain_numbers(axis: Any) -> None:
    """10, 100 and parts of a millisecond rather than powers of ten."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def clean(axes: Any, *, label_size: float = 8) -> None:
    """A grid behind the data, and no frame."""
    axes.grid(True, color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=label_size, colors=INK)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
