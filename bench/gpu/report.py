"""Merges rows and stages into one JSON file, and prints them: what has a target comes last.

python bench/gpu/report.py ROWS.jsonl STAGES.tsv RESULTS.json

Works without the package, too: a build that failed is a result.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from device import machine

Row = dict[str, Any]


def text_of(row: Row) -> str:
    """One line of the table."""
    line = f"{row['workload'][:46]:46} {row['impl'][:20]:20}"
    for reason in ("skipped", "failed"):
        if reason in row:
            return f"{line} {reason}: {row[reason]}"
    if "ms" in row:
        in_us = row["ms"] < 1
        time_text = f"{1e3 * row['ms']:8.1f} us" if in_us else f"{row['ms']:8.2f} ms"
        line += f"{time_text} ±{100 * row['spread']:2.0f}%"
        if "rate" in row:
            line += f" {row['rate']:5.0f} {row['unit']:7} {100 * row['share']:3.0f}%"
        if "ratio" in row:
            line += f" {row['ratio']:5.2f}x"
    else:
        line += f"{row['value']:10.2f} {row['unit']}"
    if target := row.get("target"):
        bounds = "/".join(f"{target[name]:g}" for name in ("floor", "target", "stretch"))
        line += f"  [{bounds} {target['unit']}] {row.get('met', '')}"
    return line


def main(rows_file: str, stages_file: str, results_file: str) -> None:
    """Write the file, print the table."""
    lines = Path(rows_file).read_text().splitlines() if Path(rows_file).is_file() else []
    rows = [json.loads(line) for line in lines]
    header = next((row["machine"] for row in rows if "machine" in row), None) or machine()
    rows = [row for row in rows if "machine" not in row]
    names = ("stage", "outcome", "seconds", "note")
    stages = [
        dict(zip(names, line.split("\t", maxsplit=3), strict=True))
        for line in Path(stages_file).read_text(errors="replace").split("\n")
        if line
    ]
    results = {"machine": header, "stages": stages, "rows": rows}
    Path(results_file).write_text(json.dumps(results, indent=1) + "\n")

    plain = [row for row in rows if "target" not in row]
    judged = [row for row in rows if "target" in row]
    print(", ".join(f"{key} {value}" for key, value in header.items()))
    print("\n".join(map(text_of, plain)))
    print(f"\nwith targets (floor/target/stretch), {header['gpu']}, commit {header['commit']}")
    print("\n".join(map(text_of, judged)))
    print()
    for stage in stages:
        print(f"{stage['stage']:15} {stage['outcome']:8} {stage['seconds']:>4} s  {stage['note']}")
    failed = [stage["stage"] for stage in stages if stage["outcome"] not in ("ok", "skipped")]
    print(f"\nfailed: {', '.join(failed) or 'none'}")


if __name__ == "__main__":
    main(*sys.argv[1:])
