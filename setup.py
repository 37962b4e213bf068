"""Builds `pdiff_runtime._C` with CMake. Everything else about the package is in pyproject.toml.

The build folder has a fixed name inside the source tree, so a second install is incremental, also
from another isolated build environment. Environment: MAX_JOBS, PDIFF_WITH_CUDA (AUTO, ON, OFF),
PDIFF_BUILD_TYPE, PDIFF_CUDA_ARCHITECTURES, PDIFF_CMAKE_ARGS, CUDACXX or CUDA_HOME, CC, CXX,
CUDAHOSTCXX.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def find_tool(name: str) -> str:
    """Path of cmake or ninja: its Python package, the interpreter's scripts folder, then PATH."""
    try:
        module = importlib.import_module(name)
        bin_dir = getattr(module, {"cmake": "CMAKE_BIN_DIR", "ninja": "BIN_DIR"}[name])
        if (candidate := Path(bin_dir) / name).exists():
            return str(candidate)
    except (ImportError, AttributeError):
        pass
    if (candidate := Path(sysconfig.get_path("scripts")) / name).exists():
        return str(candidate)
    found = shutil.which(name)
    if found is None:
        raise RuntimeError(f"{name} not found: pip install {name}")
    return found


def find_nvcc() -> str | None:
    """Path of nvcc: CUDACXX, PATH, CUDA_HOME, CUDA_PATH, then the conventional prefix."""
    if os.environ.get("CUDACXX"):
        return os.environ["CUDACXX"]
    if found := shutil.which("nvcc"):
        return found
    for prefix in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if prefix and (Path(prefix) / "bin" / "nvcc").exists():
            return str(Path(prefix) / "bin" / "nvcc")
    return None


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        with_cuda = os.environ.get("PDIFF_WITH_CUDA", "AUTO").upper()
        build_type = os.environ.get("PDIFF_BUILD_TYPE", "Release")
        architectures = os.environ.get("PDIFF_CUDA_ARCHITECTURES")
        nvcc = None if with_cuda in {"OFF", "0", "NO", "FALSE"} else find_nvcc()

        # What a live CMake cache can not change goes into the folder's name.
        key = [nvcc, with_cuda, build_type, architectures]
        key += [os.environ.get(name) for name in ("CC", "CXX", "CUDAHOSTCXX", "PDIFF_CMAKE_ARGS")]
        digest = hashlib.sha256(repr(key).encode()).hexdigest()[:8]
        build_dir = ROOT / "build" / f"cmake-{sysconfig.get_config_var('SOABI')}-{digest}"
        build_dir.mkdir(parents=True, exist_ok=True)

        cmake, ninja = find_tool("cmake"), find_tool("ninja")
        configure = [
            cmake, "-S", str(ROOT), "-B", str(build_dir), "-G", "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DCMAKE_BUILD_TYPE={build_type}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DWITH_CUDA={with_cuda}",
            "-DPDIFF_BUILD_PYTHON=ON",
            "-DPDIFF_BUILD_LIBRARY=OFF",
        ]  # fmt: skip
        if nvcc:
            configure.append(f"-DCMAKE_CUDA_COMPILER={nvcc}")
        if architectures:
            configure.append(f"-DPDIFF_CUDA_ARCHITECTURES={architectures}")
        configure += shlex.split(os.environ.get("PDIFF_CMAKE_ARGS", ""))
        subprocess.run(configure, check=True)

        build = [cmake, "--build", str(build_dir), "--target", "_C"]
        if jobs := os.environ.get("MAX_JOBS"):
            build += ["--parallel", jobs]
        subprocess.run(build, check=True)

        # The same step serves a wheel, an editable install and `build_ext --inplace`.
        prefix = str(Path(self.get_ext_fullpath(ext.name)).resolve().parent)
        install = [cmake, "--install", str(build_dir), "--prefix", prefix]
        subprocess.run([*install, "--component", "python"], check=True)


setup(ext_modules=[Extension("pdiff_runtime._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
