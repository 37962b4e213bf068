"""What this installation can do, and why anything is missing: what ``pdiff check-env`` prints."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import torch

from pdiff_runtime import _C

DISTRIBUTION = "pdiff_runtime"
MIN_COMPUTE_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class CudaDevice:
    """One CUDA device and the kernels it gets."""

    name: str
    compute_capability: tuple[int, int]
    num_sms: int
    memory_bytes: int
    kernels: str  # "sm_90a", "sm_90", "sm_80", "PTX" or "none"


@dataclass(frozen=True)
class Environment:
    """Versions, build flags, devices; ``unavailable`` gives the reason of each missing one."""

    version: str
    python: str
    platform: str
    torch: str
    torch_cuda: str | None
    num_threads: int
    compiler: str
    build_type: str
    openmp: bool
    isa_built: tuple[str, ...]
    isa_detected: str
    isa_selected: str
    isa_override: str | None
    cuda_built: bool
    cuda_runtime: str | None
    cuda_architectures: tuple[str, ...]
    cuda_devices: tuple[CudaDevice, ...]
    impls: tuple[str, ...]
    extras: tuple[str, ...]
    unavailable: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values, ready for JSON."""
        return asdict(self)

    def report(self) -> str:
        """A few aligned lines for people."""
        rows = self.rows()
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)

    def rows(self) -> list[tuple[str, str]]:
        """The report as ``(name, text)``; what is missing is named "no ...", with the reason."""
        threads = "OpenMP" if self.openmp else "no OpenMP"
        torch_cuda = self.torch_cuda or "none"
        isa_built = ", ".join(self.isa_built)
        isa = f"{self.isa_selected} (built {isa_built}; detected {self.isa_detected})"
        if self.isa_override:
            isa += f", PDIFF_CPU_ISA={self.isa_override}"
        cuda = "not built"
        if self.cuda_built:
            cuda = f"{self.cuda_runtime}, built for {' '.join(self.cuda_architectures)}"
        rows = [
            ("pdiff_runtime", f"{self.version} ({self.compiler}, {self.build_type}, {threads})"),
            ("python", f"{self.python} on {self.platform}"),
            ("torch", f"{self.torch}, CUDA {torch_cuda}, {self.num_threads} threads"),
            ("cpu kernels", isa),
            ("cuda kernels", cuda),
        ]
        for device_idx, device in enumerate(self.cuda_devices):
            major, minor = device.compute_capability
            size = f"{device.num_sms} SMs, {device.memory_bytes / 2**30:.0f} GiB"
            text = f"{device.name}, {major}.{minor}, {size}, kernels {device.kernels}"
            rows.append((f"cuda:{device_idx}", text))
        rows.append(("impls", ", ".join(self.impls)))
        rows.append(("extras", ", ".join(self.extras) or "none"))
        rows += [(f"no {name}", reason) for name, reason in self.unavailable.items()]
        return rows


def kernels_for(compute_capability: tuple[int, int], architectures: tuple[str, ...]) -> str:
    """Which of the built images a device runs: its own, an older minor version's, or PTX.

    Args:
        compute_capability: Major and minor number of the device.
        architectures: As CMake writes them, e.g. ``("80-real", "90-virtual", "90a-real")``.
    """
    major, minor = compute_capability
    if compute_capability < MIN_COMPUTE_CAPABILITY:
        return "none"
    if f"{major}{minor}a-real" in architectures:
        return f"sm_{major}{minor}a"
    numbers = {
        kind: [int(a.split("-")[0]) for a in architectures if re.fullmatch(rf"\d+(-{kind})?", a)]
        for kind in ("real", "virtual")
    }
    real = [n for n in numbers["real"] if n // 10 == major and n % 10 <= minor]
    if real:
        return f"sm_{max(real)}"
    return "PTX" if any(n <= 10 * major + minor for n in numbers["virtual"]) else "none"


def _cuda_devices(architectures: tuple[str, ...]) -> tuple[CudaDevice, ...]:
    devices = []
    for device_idx in range(_C.cuda_device_count()):
        device = _C.cuda_device(device_idx)
        chosen = architectures
        if _C.cuda_kernels(device_idx) == "portable":  # PDIFF_CUDA_KERNELS did not ask for others
            chosen = tuple(a for a in architectures if not a.endswith("a-real"))
        kernels = kernels_for(device["compute_capability"], chosen)
        devices.append(CudaDevice(**device, kernels=kernels))
    return tuple(devices)


def _why_no_cuda(devices: tuple[CudaDevice, ...]) -> str:
    """Empty when ``impl="cuda"`` can run."""
    if not _C.built_with_cuda:
        return "built without CUDA: install nvcc, then reinstall with PDIFF_WITH_CUDA=ON"
    if not devices:
        return _C.cuda_unavailable_reason()
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no CUDA device"
    if all(device.compute_capability < MIN_COMPUTE_CAPABILITY for device in devices):
        return f"no device of compute capability {MIN_COMPUTE_CAPABILITY[0]}.0 or higher"
    if all(device.kernels == "none" for device in devices):
        return f"built for {_C.cuda_architectures}, which no device here runs"
    return ""


def _why_no_triton() -> str:
    """Empty when ``impl="triton"`` can run."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not interpreted and not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no CUDA device, and TRITON_INTERPRET is not 1"
    return ""


def _missing_by_extra() -> dict[str, list[str]]:
    """Extra -> its packages that are not installed, from the installed package's own metadata."""
    try:
        requirements = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:  # imported from a source tree, not installed
        return {}
    missing: dict[str, list[str]] = {}
    for requirement in requirements:
        extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)['\"]", requirement)
        package = re.match(r"[A-Za-z0-9._-]+", requirement)
        if extra is None or package is None:
            continue
        absent = missing.setdefault(extra.group(1), [])
        try:
            metadata.version(package.group())
        except metadata.PackageNotFoundError:
            absent.append(package.group())
    return missing


def environment() -> Environment:
    """Collect the facts. Asks the CUDA driver for its devices and makes no context on them."""
    architectures = tuple(_C.cuda_architectures.split())
    devices = _cuda_devices(architectures)
    missing = _missing_by_extra()
    why_not = {"cuda": _why_no_cuda(devices), "triton": _why_no_triton()}
    unavailable = {name: reason for name, reason in why_not.items() if reason}
    for extra, packages in missing.items():
        if packages and extra not in unavailable:
            unavailable[extra] = f"not installed: {', '.join(packages)}"
    runtime = _C.cuda_runtime_version()
    return Environment(
        version=_C.__version__,
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        torch=torch.__version__,
        torch_cuda=torch.version.cuda,
        num_threads=torch.get_num_threads(),
        compiler=_C.compiler,
        build_type=_C.build_type,
        openmp=_C.built_with_openmp,
        isa_built=tuple(_C.isa_built()),
        isa_detected=_C.isa_detected(),
        isa_selected=_C.isa_selected(),
        isa_override=os.environ.get("PDIFF_CPU_ISA") or None,
        cuda_built=_C.built_with_cuda,
        cuda_runtime=f"{runtime // 1000}.{runtime % 1000 // 10}" if runtime else None,
        cuda_architectures=architectures,
        cuda_devices=devices,
        impls=("cpu", *(name for name, reason in why_not.items() if not reason), "reference"),
        extras=tuple(extra for extra, packages in missing.items() if not packages),
        unavailable=unavailable,
    )
