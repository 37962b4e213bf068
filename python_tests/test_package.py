"""The installed package: its version, what an import does not do, and the compiled core."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import pdiff_runtime
from pdiff_runtime import _C
from pdiff_runtime.ops.environment import environment, kernels_for

ROOT = Path(__file__).resolve().parents[1]
CORE = Path(_C.__file__)
ISAS = ("generic", "avx2", "avx512", "avx512_bf16", "amx")


def run_python(code: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PDIFF_")}
    return subprocess.run(
        [sys.executable, "-c", code], env=env | environ, capture_output=True, text=True, timeout=120
    )


def tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


def run_tool(name: str, *args: str) -> str:
    return subprocess.run([tool(name), *args], check=True, capture_output=True, text=True).stdout


def test_version_is_the_same_everywhere():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert version == pdiff_runtime.__version__
    assert _C.__version__ == version
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()


def test_installed_metadata_matches_the_core():
    try:
        installed = importlib.metadata.version("pdiff_runtime")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("imported from a source tree, not installed")
    assert installed == _C.__version__


IMPORT_PROBE = """
import json, sys
network = []
sys.addaudithook(
    lambda event, args: network.append(event)
    if event in ("socket.connect", "socket.getaddrinfo", "urllib.Request") else None
)
import torch
before = set(sys.modules)
import pdiff_runtime
for name in pdiff_runtime.__all__:  # imported on first use
    getattr(pdiff_runtime, name)
optional = {"triton", "transformers", "fastapi", "uvicorn", "ray", "peft", "tensorboard",
            "matplotlib", "gguf", "lm_eval", "prometheus_client", "openai"}
print(json.dumps({
    "network": network,
    "optional": sorted(optional & (set(sys.modules) - before)),
    "cuda": torch.cuda.is_initialized(),
}))
"""


def test_import_touches_no_network_no_device_and_no_extra():
    result = run_python(IMPORT_PROBE)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == {"network": [], "optional": [], "cuda": False}


def test_source_that_is_not_built_says_so(tmp_path):
    package = tmp_path / "pdiff_runtime"
    package.mkdir()
    shutil.copy(ROOT / "pdiff_runtime" / "__init__.py", package)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import pdiff_runtime"
    without_site = [sys.executable, "-S", "-c", code]  # an editable install would help out
    result = subprocess.run(without_site, capture_output=True, text=True)
    assert result.returncode == 1
    assert f"{package} is source code that is not built" in result.stderr


def test_import_is_safe_where_no_cuda_device_is_visible():
    code = "from pdiff_runtime import _C; print(_C.cuda_device_count())"
    result = run_python(code, CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "0"


@pytest.mark.parametrize("isa", ISAS)
def test_isa_override_is_clamped_to_built_and_detected(isa):
    result = run_python("from pdiff_runtime import _C; print(_C.isa_selected())", PDIFF_CPU_ISA=isa)
    assert result.returncode == 0, result.stderr
    highest = min(ISAS.index(isa), ISAS.index(_C.isa_detected()))
    expected = [name for name in ISAS[: highest + 1] if name in _C.isa_built()][-1]
    assert result.stdout.strip() == expected


def test_unknown_isa_override_is_a_clear_error():
    code = "from pdiff_runtime import _C; _C.isa_selected()"
    result = run_python(code, PDIFF_CPU_ISA="sse9")
    assert result.returncode != 0
    assert "PDIFF_CPU_ISA: expected generic, avx2, avx512" in result.stderr
    assert "got sse9" in result.stderr


def test_select_isa_lowers_and_goes_back():
    before = _C.isa_selected()
    try:
        _C.select_isa("generic")
        assert _C.isa_selected() == "generic"
        with pytest.raises(ValueError, match=r"isa: expected generic.*got mmx"):
            _C.select_isa("mmx")
        assert _C.isa_selected() == "generic"
    finally:
        _C.select_isa(before)
    assert _C.isa_selected() == before


def test_core_error_is_a_value_error():
    assert issubclass(_C.Error, ValueError)
    with pytest.raises(_C.Error, match="device_idx|built without CUDA"):
        _C.cuda_device(10_000)


def test_environment_names_a_reason_for_everything_missing():
    env = environment()
    assert env.version == pdiff_runtime.__version__
    assert env.isa_selected in env.isa_built
    assert {"cpu", "reference"} <= set(env.impls)
    for impl in ("cuda", "triton"):
        assert (impl in env.impls) != (impl in env.unavailable)
    assert all(env.unavailable.values())
    assert len(env.cuda_devices) == _C.cuda_device_count()
    if not _C.built_with_cuda:
        assert env.cuda_architectures == ()
        assert "built without CUDA" in env.unavailable["cuda"]
    json.dumps(env.as_dict())
    for text in (env.version, torch.__version__, env.isa_selected, *env.unavailable.values()):
        assert text in env.report()


@pytest.mark.parametrize(
    ("compute_capability", "kernels"),
    [
        ((7, 5), "none"),
        ((8, 0), "sm_80"),
        ((8, 9), "sm_80"),
        ((9, 0), "sm_90a"),
        ((10, 0), "PTX"),
        ((12, 1), "PTX"),
    ],
)
def test_kernels_for_a_device(compute_capability, kernels):
    architectures = ("80-real", "90-real", "90-virtual", "90a-real")
    assert kernels_for(compute_capability, architectures) == kernels


def test_kernels_for_a_device_without_ptx():
    assert kernels_for((9, 0), ("80-real", "90-real")) == "sm_90"
    assert kernels_for((10, 0), ("80-real", "90-real")) == "none"
    assert kernels_for((9, 0), ("80",)) == "PTX"


@pytest.mark.parametrize(
    ("compute_capability", "reason"),
    [
        ((7, 5), "no device of compute capability 8.0 or higher"),
        ((8, 9), ""),
        ((9, 0), "built for 80-real, which no device here runs"),
    ],
)
def test_a_device_without_kernels_says_why(compute_capability, reason, monkeypatch):
    device = {"name": "GPU", "compute_capability": compute_capability, "num_sms": 1,
              "memory_bytes": 1}  # fmt: skip
    monkeypatch.setattr(_C, "built_with_cuda", True)
    monkeypatch.setattr(_C, "cuda_architectures", "80-real")
    monkeypatch.setattr(_C, "cuda_device_count", lambda: 1)
    monkeypatch.setattr(_C, "cuda_device", lambda _: device)
    monkeypatch.setattr(_C, "cuda_kernels", lambda _: "portable")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert environment().unavailable.get("cuda", "") == reason


@pytest.mark.skipif(_C.cuda_device_count() == 0, reason=_C.cuda_unavailable_reason())
def test_every_cuda_device_runs_a_kernel():
    for device_idx in range(_C.cuda_device_count()):
        assert _C.cuda_can_launch(device_idx)


def test_core_exports_its_init_function_only():
    symbols = [
        line.split() for line in run_tool("nm", "-D", "--defined-only", str(CORE)).splitlines()
    ]
    assert [fields[-1] for fields in symbols] == ["PyInit__C"]


def test_core_links_no_torch_no_python_and_no_cuda_library():
    needed = re.findall(r"NEEDED.*\[(.+)\]", run_tool("readelf", "-d", str(CORE)))
    assert needed
    assert not [name for name in needed if re.match(r"lib(torch|c10|python|cuda|cudart)", name)]


def isa_objects() -> list[Path]:
    """Objects of the instruction set folders, as compiled by the builds of this source tree."""
    objects = []
    for commands in ROOT.glob("build/cmake-*/compile_commands.json"):
        for command in json.loads(commands.read_text()):
            output = commands.parent / command.get("output", "")
            if (
                re.search(r"pdiff_(avx2|avx512|avx512_bf16|amx)\.dir", str(output))
                and output.exists()
            ):
                objects.append(output)
    return objects


def test_isa_objects_leak_no_weak_symbol():
    # The linker keeps one copy of a weak symbol for the whole program. If that copy was compiled
    # with an instruction set's flags, a processor without it dies in unrelated code.
    objects = isa_objects()
    if not objects:
        pytest.skip("no build folder in this source tree")
    leaked = []
    for path in objects:
        for line in run_tool("nm", "-C", "--defined-only", str(path)).splitlines():
            kind, symbol = line[17:18], line[19:]
            is_code = not symbol.startswith("DW.ref.")  # a pointer to the exception machinery
            if kind in "WVu" and is_code:
                leaked.append(f"{path.name}: {symbol}")
    assert not leaked
