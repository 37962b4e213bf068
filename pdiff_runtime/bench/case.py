"""A case: one kernel on one workload, with its peers and what bounds it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pdiff_runtime.bench.measure import alternate

Call = Callable[[], object]

DTYPES: Mapping[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


@dataclasses.dataclass(frozen=True)
class Limit:
    """The fastest way the machine knows to do as much work: a product, or one read.

    Attributes:
        name: What it is.
        call: Does it.
        work: FLOP or bytes of the call.
    """

    name: str
    call: Call
    work: float


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Calls on the same inputs, ours checked against one of the peers or the reference.

    Attributes:
        ours: Our kernel.
        peers: Others, by name.
        work: FLOP or bytes of ours; 0 where neither says anything.
        unit: ``FLOP`` or ``B``.
        limit: What bounds the kernel, if anything simple does.
        notes: Numbers to keep with the result, such as seconds of compilation.
    """

    ours: Call
    peers: Mapping[str, Call] = dataclasses.field(default_factory=dict)
    work: float = 0.0
    unit: str = "FLOP"
    limit: Limit | None = None
    notes: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Case:
    """One kernel on one workload.

    Attributes:
        kernel: Stem of the kernel, e.g. ``hybrid_attention``.
        name: Of the workload, or of the sweep.
        dtype: Key of :data:`DTYPES`.
        prepare: Makes the inputs and the calls, and checks ours.
        at: In a sweep, the number that varies.
        axis: What that number is.
    """

    kernel: str
    name: str
    dtype: str
    prepare: Callable[[], Prepared]
    at: float | None = None
    axis: str = ""

    def __str__(self) -> str:
        point = "" if self.at is None else f"-{self.at:g}"
        return f"{self.name}{point}-{self.dtype}"

    def measure(self, prepared: Prepared, *, max_seconds: float = 10.0) -> dict[str, Any]:
        """Time ours, its peers and its limit by turns.

        Returns:
            The case's fields with ``ms`` and ``spread``, ``peers`` (by name, the same two),
            ``rate`` in units of 1e9 a second, ``share`` of the limit's rate, and ``notes``.
        """
        calls: dict[str, Call] = {"ours": prepared.ours, **prepared.peers}
        if prepared.limit is not None:
            calls["limit"] = prepared.limit.call
        timings = alternate(calls, max_seconds=max_seconds)
        ours = timings.pop("ours")
        record: dict[str, Any] = {
            "kernel": self.kernel,
            "case": self.name,
            "dtype": self.dtype,
            "threads": torch.get_num_threads(),
            "ms": round(ours.ms, 5),
            "spread": round(ours.spread, 3),
        }
        if self.at is not None:
            record |= {"axis": self.axis, "at": self.at}
        if prepared.work:
            record |= {"rate": round(prepared.work / ours.seconds / 1e9, 2), "unit": prepared.unit}
        if prepared.limit is not None:
            rate = prepared.limit.work / timings.pop("limit").seconds
            record["limit"] = prepared.limit.name
            record["limit_rate"] = round(rate / 1e9, 2)
            record["share"] = round(prepared.work / ours.seconds / rate, 3)
        record["peers"] = {
            name: {"ms": round(timing.ms, 5), "spread": round(timing.spread, 3)}
            for name, timing in timings.items()
        }
        return record | {"notes": dict(prepared.notes)}


def text_of(record: Mapping[str, Any]) -> str:
    """Two or more lines: ours, then how many times longer each peer takes."""
    at = f": {record['at']:g} {record['axis']}" if "at" in record else ""
    rate = f"{record['rate']:9.1f} G{record['unit']}/s" if "rate" in record else ""
    share = f"  {100 * record['share']:5.1f} % of {record['limit']}" if "share" in record else ""
    title = f"{record['kernel']} {record['case']}{at} {record['dtype']}"
    lines = [f"{title:52} {record['ms']:10.3f} ms ±{100 * record['spread']:3.0f}% {rate}{share}"]
    for name, peer in record["peers"].items():
        ratio = peer["ms"] / record["ms"]
        lines.append(
            f"    {name:48} {peer['ms']:10.3f} ms ±{100 * peer['spread']:3.0f}% {ratio:8.2f} x"
        )
    for name, value in record["notes"].items():
        lines.append(f"    {name.replace('_', ' '):48} {value:10g}")
    return "\n".join(lines)


def read_once(x: Tensor) -> Tensor:
    """The fastest read of all of a tensor that torch has."""
    return x.flatten().view(torch.float32).sum()


def wants_compiled() -> bool:
    """Whether peers are to be compiled, which takes seconds each: not where ``BENCH_COMPILE=0``."""
    return os.environ.get("BENCH_COMPILE", "1") == "1"
