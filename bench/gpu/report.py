"""Merges rows and stages into one JSON file, and prints them: what has a target comes last.

python bench/gpu/report.py ROWS.jsonl STAGES.tsv RESULTS.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

from device import machine
from records import text_of


def main(rows_file: str, stages_file: str, results_file: str) -> None:
    """Write the file, print the table."""
    lines = Path(rows_file).read_text().splitlines() if Path(rows_file).is_file() else []
    rows = [json.loads(line) for line in lines]
    header = next((row["machine"] for row in rows if "machine" in row), None) or machine()
    rows = [row for row in rows if "machine" not in row]
    names = ("stage", "outcome", "seconds", "note")
    stages = [
        dict(zip(names, line.split("\t"), strict=True))
        for line in Path(stages_file).read_text().splitlines()
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
        print(f"{stage['stage']:12} {stage['outcome']:8} {stage['seconds']:>4} s  {stage['note']}")


if __name__ == "__main__":
    main(*sys.argv[1:])
