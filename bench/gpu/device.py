"""The machine a bench runs on: what it is, a clock that suits it, and its ceilings."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import importlib.metadata
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
SPINS_PER_SECOND = 2e9  # cycles of torch.cuda._sleep; too many cost time, too few accuracy


@dataclasses.dataclass(frozen=True)
class Timing:
    """Milliseconds per call: the median of all rounds, and how sure it is.

    Attributes:
        ms: Median.
        spread: Half the range of the middle half, as a share of the median.
        rerun: Difference of the medians of two runs, as a share.
        num_rounds: Intervals that were timed, both runs together.
    """

    ms: float
    spread: float
    rerun: float
    num_rounds: int


@dataclasses.dataclass
class Call:
    """What is timed: ``run(i)`` with the index of the call, to rotate its inputs.

    ``prepare(i)`` comes before each and is not timed.
    """

    run: Callable[[int], object]
    prepare: Callable[[int], object] | None = None


def synchronize() -> None:
    """Wait for the GPU, and raise what went wrong on it."""
    if ON_GPU:
        torch.cuda.synchronize()


def alternate(
    calls: Mapping[str, Call], *, num_rounds: int = 30, max_seconds: float = 2.0
) -> dict[str, Timing]:
    """Time all calls by turns, in two runs.

    On a GPU with its events. The stream is kept busy until the host has issued the whole call, so
    that gaps in issuing do not count; a call that waits for the device pays for its wait. Calls of
    some microseconds are timed several at once.

    Args:
        calls: What to time, by name; each has run before.
        num_rounds: Rounds of a run.
        max_seconds: Of one call in one run; there are at least five rounds.
    """
    clocks = {name: _Clock(call) for name, call in calls.items()}
    runs: list[dict[str, list[float]]] = []
    for _ in range(2):
        samples: dict[str, list[float]] = {name: [] for name in calls}
        for round_idx in range(num_rounds):
            for name, clock in clocks.items():
                if round_idx < 5 or clock.seconds * round_idx < max_seconds:
                    samples[name].append(clock.sample())
        runs.append(samples)
    timings = {}
    for name in calls:
        both = [ms for run in runs for ms in run[name]]
        median = statistics.median(both)
        first, _, third = statistics.quantiles(both, n=4)
        medians = [statistics.median(run[name]) for run in runs]
        rerun = abs(medians[1] - medians[0]) / median
        timings[name] = Timing(median, (third - first) / 2 / median, rerun, len(both))
    return timings


class _Clock:
    """Times one call; counts its calls, so that inputs rotate through all rounds."""

    def __init__(self, call: Call) -> None:
        self.call, self.idx, self.repeats, self.spins = call, 0, 1, 0
        self.sample()
        issued, done = [], []
        for _ in range(3 if ON_GPU else 1):
            synchronize()
            start = time.perf_counter()
            self._issue()
            issued.append(time.perf_counter() - start)
            synchronize()
            done.append(time.perf_counter() - start)
        self.seconds = min(done)
        if ON_GPU:
            if self.seconds < 1e-4 and call.prepare is None:
                self.repeats = 20
            host = self.repeats * statistics.median(issued)
            if host < 0.02:
                self.spins = int(SPINS_PER_SECOND * (1.5 * host + 2e-5))

    def _issue(self) -> None:
        for _ in range(self.repeats):
            self.call.run(self.idx)
            self.idx += 1

    def sample(self) -> float:
        """Milliseconds of one call."""
        if self.call.prepare is not None:
            self.call.prepare(self.idx)
        if not ON_GPU:
            start = time.perf_counter()
            self._issue()
            return 1e3 * (time.perf_counter() - start) / self.repeats
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if self.spins:
            torch.cuda._sleep(self.spins)
        start.record()
        self._issue()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / self.repeats


def compiled(function: Callable[..., object]) -> Callable[..., object]:
    """`torch.compile`d for the shapes of its first call; as it is on a CPU, where that is slow."""
    return torch.compile(function, dynamic=False) if ON_GPU else function


def rotated(make: Callable[[], Tensor]) -> list[Tensor]:
    """As many tensors as it takes for the last-level cache to have forgotten the first."""
    first = make()
    if not ON_GPU:
        return [first]
    cache_bytes = torch.cuda.get_device_properties(DEVICE).L2_cache_size
    return [first] + [make() for _ in range(int(3 * cache_bytes // first.nbytes))]


@functools.cache
def ceilings() -> dict[str, float]:
    """What the machine gives today: GB/s of a copy, read and write counted; TFLOP/s of bf16."""
    num_bytes, size = (4 << 30, 8192) if ON_GPU else (1 << 22, 128)
    source, target = (torch.empty(num_bytes // 2, dtype=torch.bfloat16, device=DEVICE)
                      for _ in range(2))  # fmt: skip
    source.normal_()
    a, b = (torch.randn(size, size, device=DEVICE).bfloat16() for _ in range(2))
    timings = alternate(
        {"copy": Call(lambda _: target.copy_(source)), "product": Call(lambda _: a @ b)},
        num_rounds=30 if ON_GPU else 5,
    )
    return {
        "GB/s": 2 * num_bytes / timings["copy"].ms / 1e6,
        "TFLOP/s": 2 * size**3 / timings["product"].ms / 1e9,
    }


def machine() -> dict[str, object]:
    """What numbers were taken with; clocks are read, never set."""
    header: dict[str, object] = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _first_line("git", "describe", "--always", "--dirty")
        or os.environ.get("COMMIT", "unknown"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "nvcc": _first_line("nvcc", "--version", last=True),
    }
    try:
        from pdiff_runtime import _C
    except ImportError as error:  # the build failed, which is to be reported
        header["kernels"] = f"none: {error}"
    else:
        architectures = _C.cuda_architectures or "no CUDA"
        header["kernels"] = f"{_C.__version__}, {_C.compiler}, {architectures}"
        header["emulated"] = _C.emulates_cuda
    if ON_GPU:
        properties = torch.cuda.get_device_properties(DEVICE)
        header |= {
            "gpu": properties.name,
            "num_sms": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "l2_mib": round(properties.L2_cache_size / 2**20, 1),
        }
        query = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,temperature.gpu,power.draw"
        values = _first_line("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader")
        header |= dict(zip(query.split(","), values.split(", "), strict=False))
    else:
        header["gpu"] = f"none: {platform.processor() or platform.machine()}, smoke run"
    return header


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _first_line(*command: str, last: bool = False) -> str:
    if shutil.which(command[0]) is None:
        return ""
    result = subprocess.run(
        command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    lines = result.stdout.strip().splitlines() if result.returncode == 0 else []
    return lines[-1 if last else 0].strip() if lines else ""
