"""How benches take times: ours and its peers by turns in one process, medians of many rounds."""

from __future__ import annotations

import ctypes
import dataclasses
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from pdiff_runtime import _C

_keeps_memory = False


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds per call: the median, and half the spread of the middle half as a share of it."""

    seconds: float
    spread: float

    @property
    def ms(self) -> float:
        return 1e3 * self.seconds

    def __str__(self) -> str:
        return f"{self.ms:9.3f} ms ±{100 * self.spread:3.0f}%"


def alternate(
    calls: Mapping[str, Callable[[], object]], *, num_rounds: int = 30, max_seconds: float = 10.0
) -> dict[str, Timing]:
    """Time all calls by turns, so that a busy moment of the machine meets all of them.

    With one thread the thread's own processor time is taken, which other programs do not inflate;
    with more, time on the wall.

    Args:
        calls: What to time, by name. Each runs once before.
        num_rounds: Rounds wanted.
        max_seconds: No further round starts after this long, but there are at least five.
    """
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    start = time.perf_counter()
    for idx in range(num_rounds):
        if idx >= 5 and time.perf_counter() - start > max_seconds:
            break
        for name, call in calls.items():
            before = clock()
            call()
            seconds[name].append(clock() - before)
    timings = {}
    for name, samples in seconds.items():
        first, median, third = statistics.quantiles(samples, n=4)
        timings[name] = Timing(median, (third - first) / 2 / median)
    return timings


def keep_freed_memory() -> None:
    """Have the C library keep what is freed, so that no call pays for fresh pages.

    Else results of 32 MB and more are mapped anew in every call, ours and the peers', and the
    system fills them with zeros: at 2 GB/s where we measured, more work than many a kernel.

    Raises:
        ValueError: Not glibc.
    """
    global _keeps_memory
    mmap_max, trim_threshold = -4, -1
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        raise ValueError("--keep-memory: expected glibc's malloc, found another") from None
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, -1)
    _keeps_memory = True


def machine() -> str:
    """One line on what numbers were taken with: processor, threads, versions, commit."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [x.split(":", 1)[1] for x in cpuinfo.read_text().splitlines() if "model name" in x]
        model = names[0].strip() if names else model
    return (
        f"{model}, {torch.get_num_threads()} threads, kernels {_C.isa_selected()}, "
        f"{_C.compiler}, torch {torch.__version__}, {_source()}"
        + (", freed memory kept" if _keeps_memory else "")
    )


def _source() -> str:
    """The commit of a source tree, else the version of the package."""
    root = Path(__file__).resolve().parents[2]
    if shutil.which("git") is None or not (root / ".git").exists():
        return f"pdiff_runtime {_C.__version__}"
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=root, capture_output=True, text=True, check=False,
    ).stdout.strip()  # fmt: skip
    return f"commit {commit or 'unknown'}"
