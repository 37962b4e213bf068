"""Rows of results: what was timed, against which ceiling, peer and target."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import math
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from device import DEVICE, ON_GPU, Call, Timing, alternate, ceilings, synchronize
from report import Row, text_of

from pdiff_runtime.ops import AttentionPlan, Impl
from pdiff_runtime.testing import BACKENDS


@dataclasses.dataclass(frozen=True)
class Target:
    """On one H200: what must, should and could be reached."""

    floor: float
    target: float
    stretch: float
    unit: str  # "TFLOP/s" and "x" want more, "us" and "ms" less

    def met(self, value: float) -> str:
        """The best of the three that the value reaches."""
        more = self.unit in ("TFLOP/s", "x")
        reached = "below floor"
        for name in ("floor", "target", "stretch"):
            bound = getattr(self, name)
            if value >= bound if more else value <= bound:
                reached = name
        return reached


TARGETS: Mapping[str, Target] = {
    "attention forward, long": Target(300, 480, 560, "TFLOP/s"),
    "attention backward, long": Target(180, 330, 400, "TFLOP/s"),
    "attention forward, paper": Target(170, 280, 380, "TFLOP/s"),
    "attention backward, paper": Target(90, 180, 240, "TFLOP/s"),
    "attention both ways against FlexAttention, long": Target(1.2, 2.0, 2.5, "x"),
    "attention both ways against FlexAttention, paper": Target(1.2, 2.0, 2.5, "x"),
    "attention plan on the device": Target(50, 20, 10, "us"),
    "attention forward, denoise": Target(830, 550, 450, "us"),
    "attention forward, answers": Target(415, 315, 275, "us"),
    "attention forward, mixed batch of separate launches": Target(1.0, 0.85, 0.7, "of the sum"),
    "unmask, entropy and argmax": Target(110, 85, 78, "us"),
    "unmask, select and scatter": Target(10, 6, 4, "us"),
    "weighted cross-entropy in place": Target(1050, 680, 620, "us"),
    "denoise step, captured": Target(12, 9, 7.8, "ms"),
    "autoregressive step, captured": Target(5, 4, 3.7, "ms"),
    "whole answer against the published algorithm": Target(1.8, 2.5, 3.0, "x"),
}
"""By workload, for our CUDA implementation."""

TO_UNIT = {"us": 1e3, "ms": 1.0}  # from milliseconds


@dataclasses.dataclass
class Work:
    """What a call does, for its rate: so many floating-point operations, or bytes."""

    amount: float
    unit: str  # "TFLOP/s" or "GB/s"


class Bench:
    """Times cases, and appends a row for each call to a file of JSON lines as it goes.

    Args:
        path: The file; None keeps rows in memory only.
        is_tiny: Shapes that run anywhere in a moment.
        seconds: When these are over, no further case starts, which counts as failed.
        kernels: The set of CUDA kernels in use; of ``sm90a`` nothing else of ours runs beside.
    """

    def __init__(
        self, path: Path | None, *, is_tiny: bool, seconds: float, kernels: str = "portable"
    ) -> None:
        self.path, self.is_tiny, self.kernels = path, is_tiny, kernels
        self.deadline = time.monotonic() + seconds
        self.rows: list[Row] = []
        self.num_failed = 0

    @property
    def impls(self) -> list[Impl]:
        """Ours, the first being what ratios refer to: the GPU's, or what stands in for them."""
        missing = {str(b.impl): b.missing for b in BACKENDS}
        ours = [Impl.CUDA, Impl.TRITON] if ON_GPU else [Impl.CUDA, Impl.TRITON, Impl.CPU]
        if self.kernels == "sm90a":
            ours = [Impl.CUDA]
        for impl in ours:
            if missing[impl] and not any(r["impl"] == impl and "skipped" in r for r in self.rows):
                self.add({"workload": "all", "impl": str(impl), "skipped": missing[impl]})
        return [impl for impl in ours if not missing[impl]]

    def title(self, impl: str) -> str:
        """What rows call an implementation."""
        return f"{impl}, sm90a" if self.kernels == "sm90a" else str(impl)

    def case(self, workload: str, body: Callable[[], None]) -> None:
        """Run the body if there is time; its failure is a row, and the next case goes on."""
        if time.monotonic() > self.deadline:
            self.num_failed += 1
            self.add({"workload": workload, "impl": "all", "failed": "no time left"})
            return
        try:
            body()
        except Exception as error:
            self.fail(workload, "all", error)
        finally:
            gc.collect()
            if ON_GPU:
                torch.cuda.empty_cache()

    def fail(self, workload: str, impl: str, error: BaseException) -> None:
        """A row that says what went wrong. Raises again if the device is lost."""
        if isinstance(error, NotImplementedError):
            reason = f"not implemented: {error}"
            self.add({"workload": workload, "impl": str(impl), "skipped": reason})
            return
        traceback.print_exception(error)
        self.num_failed += 1
        lines = str(error).strip().splitlines() or [type(error).__name__]
        self.add({"workload": workload, "impl": str(impl), "failed": lines[0][:200]})
        synchronize()

    def plans(
        self, workload: str, make: Callable[[Impl], AttentionPlan]
    ) -> dict[str, AttentionPlan]:
        """A plan for each of our implementations that takes it."""
        plans = {}
        for impl in self.impls:
            try:
                plans[str(impl)] = make(impl)
            except Exception as error:
                self.fail(workload, impl, error)
        return plans

    def check(self, workload: str, impl: str, check: Callable[[], object]) -> None:
        """Compare with the reference before anything is timed; a failure is a row."""
        try:
            check()
            synchronize()
        except Exception as error:
            self.fail(workload, impl, error)

    def measure(
        self,
        workload: str,
        calls: Mapping[str, Call],
        work: Work | None = None,
        *,
        max_seconds: float = 2.0,
    ) -> dict[str, Timing]:
        """Time calls by turns and add a row for each; one that raises is left out.

        So is a peer that is not ready when there is no time left: compilers take their time.
        """
        able = {}
        ours_first = sorted(calls, key=lambda name: name.split(",")[0] not in map(str, Impl))
        for name, call in ((name, calls[name]) for name in ours_first):
            if time.monotonic() > self.deadline and able:
                self.add({"workload": workload, "impl": name, "skipped": "no time left"})
                continue
            try:
                with _ending_at(self.deadline if able else math.inf):
                    if call.prepare is not None:
                        call.prepare(0)
                    call.run(0)
                    synchronize()
                able[name] = call
            except Exception as error:
                if able and time.monotonic() > self.deadline:
                    self.add({"workload": workload, "impl": name, "skipped": "no time left"})
                else:
                    self.fail(workload, name, error)
        num_rounds = 30 if ON_GPU else 1
        timings = alternate(able, num_rounds=num_rounds, max_seconds=max_seconds)
        ours = next((timings[x] for x in map(self.title, self.impls) if x in timings), None)
        for name, timing in timings.items():
            row: Row = {"workload": workload, "impl": name, **dataclasses.asdict(timing)}
            if work is not None:
                per_ms = {"TFLOP/s": 1e9, "GB/s": 1e6}[work.unit]
                rate = work.amount / timing.ms / per_ms
                row |= {"rate": rate, "unit": work.unit, "share": rate / ceilings()[work.unit]}
            if ours is not None:
                row["ratio"] = timing.ms / ours.ms
            target = TARGETS.get(workload)
            if target is not None and name == self.title(self.impls[0]):
                in_time = target.unit in TO_UNIT
                value = timing.ms * TO_UNIT[target.unit] if in_time else row["rate"]
                row |= self._judged(target, value)
            self.add(row)
        return timings

    def value(self, workload: str, impl: str, value: float, unit: str) -> None:
        """Add a row for a number that is no time of its own: a ratio, a count."""
        row: Row = {"workload": workload, "impl": impl, "value": value, "unit": unit}
        if target := TARGETS.get(workload):
            row |= self._judged(target, value)
        self.add(row)

    def _judged(self, target: Target, value: float) -> Row:
        row: Row = {"target": dataclasses.asdict(target), "value": value}
        if ON_GPU and not self.is_tiny:
            row["met"] = target.met(value)
        return row

    def add(self, row: Row) -> None:
        """Keep a row, print it, and append it to the file."""
        self.rows.append(row)
        print(text_of(row), flush=True)
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")


@contextlib.contextmanager
def _ending_at(deadline: float) -> Iterator[None]:
    """Raise in the body when the time is over; what it calls in C comes to its end first."""

    def ring(*_: object) -> None:
        raise TimeoutError("no time left")

    before = signal.signal(signal.SIGALRM, ring)
    if deadline < math.inf:
        signal.setitimer(signal.ITIMER_REAL, max(0.01, deadline - time.monotonic()))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Standard normal numbers on the device."""
    return torch.randn(*shape, device=DEVICE, dtype=dtype)
