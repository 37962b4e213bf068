"""The direction of imports, in Python and in C++, and what the package never does."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "pdiff_runtime"
CSRC = ROOT / "csrc"

# A module may import from rows below its own, and from its own package; siblings in a row never
# import each other. Only ops touches _C.
ROWS = (
    ("serve",),
    ("eval",),
    ("train", "hf"),
    ("engine",),
    ("denoise", "models"),
    ("plan", "cache"),
    ("ops",),
)
ROW_OF = {name: row_idx for row_idx, row in enumerate(ROWS) for name in row}

# Folder of csrc -> the folders whose headers it may include, besides its own.
CSRC_ARROWS = {
    "include": set(),
    "common": {"include"},
    "cpu": {"include", "common"},
    "cuda": {"include", "common"},
    "capi": {"include", "common"},
    "bindings": {"include", "common"},
    "tests": {"include", "common", "cpu", "cuda", "capi"},
}

PYTHON_FILES = sorted(PACKAGE.rglob("*.py"))
CSRC_FILES = sorted(p for p in CSRC.rglob("*") if p.suffix in {".h", ".cuh", ".cpp", ".cu", ".c"})

pytestmark = pytest.mark.skipif(
    not CSRC.is_dir() or not PACKAGE.is_dir(), reason="needs the source tree"
)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imported_modules(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of every import, also those inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = (node.module or "").split(".") if node.module else []
            if node.level:
                here = list(path.relative_to(ROOT).with_suffix("").parts)
                base = here[: -node.level] + base
            yield from ((node.lineno, ".".join([*base, alias.name])) for alias in node.names)


def breaks_an_arrow(importer: str, imported: str) -> bool:
    """Whether a module of package `importer` ("" is the top level) may not import `imported`."""
    if importer in ("", "testing", "bench"):  # the front door, and what measures the rest
        return False
    if imported == "_C":
        return importer != "ops"
    if imported in ("testing", "bench"):
        return (importer, imported) != ("serve", "bench")
    if importer not in ROW_OF or imported not in ROW_OF or importer == imported:
        return False
    return ROW_OF[imported] <= ROW_OF[importer]


@pytest.mark.parametrize("path", PYTHON_FILES, ids=name_of)
def test_python_imports_point_down(path):
    inside = path.relative_to(PACKAGE).parts
    importer = inside[0] if len(inside) > 1 else ""
    wrong = []
    for line, module in imported_modules(path):
        parts = module.split(".")
        if parts[0] == PACKAGE.name and len(parts) > 1 and breaks_an_arrow(importer, parts[1]):
            wrong.append(f"line {line}: {importer} imports {module}")
    assert not wrong


def test_the_arrows_mean_what_they_say():
    assert breaks_an_arrow("ops", "plan")
    assert breaks_an_arrow("denoise", "models")
    assert breaks_an_arrow("plan", "_C")
    assert breaks_an_arrow("engine", "serve")
    assert breaks_an_arrow("engine", "bench")
    assert not breaks_an_arrow("serve", "bench")
    assert not breaks_an_arrow("ops", "_C")
    assert not breaks_an_arrow("train", "models")
    assert not breaks_an_arrow("serve", "plan")


def test_every_package_has_a_place_in_the_rows():
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert packages <= {*ROW_OF, "testing", "bench", "assets"}


def quoted_includes(path: Path) -> Iterator[str]:
    yield from re.findall(r'^\s*#\s*include\s*"([^"]+)"', path.read_text(), re.MULTILINE)


def included_file(path: Path, name: str) -> Path | None:
    """The file of the source tree that an include names."""
    for folder in (path.parent, CSRC / "include", CSRC, CSRC / "tests" / "emulation"):
        if (folder / name).is_file():
            return (folder / name).resolve()
    return None


@pytest.mark.parametrize("path", CSRC_FILES, ids=name_of)
def test_csrc_includes_keep_the_arrows(path):
    folder = path.relative_to(CSRC).parts[0]
    wrong = []
    for name in quoted_includes(path):
        target = included_file(path, name)
        if target is None:
            wrong.append(f'"{name}" is not in csrc: use <> for system headers')
            continue
        target_folder = target.relative_to(CSRC).parts[0]
        if target_folder != folder and target_folder not in CSRC_ARROWS[folder]:
            wrong.append(f'{folder} includes "{name}" of {target_folder}')
    assert not wrong


@pytest.mark.parametrize("path", CSRC_FILES, ids=name_of)
def test_csrc_is_free_of_torch_and_only_bindings_know_python(path):
    text = path.read_text()
    assert not re.search(r'#\s*include\s*[<"](torch|ATen|c10)/', text)
    if path.relative_to(CSRC).parts[0] != "bindings":
        assert not re.search(r'#\s*include\s*[<"](pybind11/|Python\.h)', text)


def test_c_headers_stay_free_of_machine_specific_code():
    # A public header that used an intrinsic would need its reader's compiler flags.
    for path in (CSRC / "include" / "pdiff").glob("*.h"):
        assert "immintrin.h" not in path.read_text(), path.name


def requirements() -> Iterator[str]:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    yield from pyproject["build-system"]["requires"]
    yield from pyproject["project"]["dependencies"]
    for extra in pyproject["project"]["optional-dependencies"].values():
        yield from extra


def test_torch_is_a_range_and_no_build_requirement():
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    torch = [r for r in requirements() if re.match(r"torch\b", r)]
    assert torch
    assert all("==" not in r and "~=" not in r and "<" not in r for r in torch)
    assert not any(re.match(r"torch\b", r) for r in pyproject["build-system"]["requires"])


FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal"}
FORBIDDEN_CALLS = {"torch.load", "torch.save", "jinja2.Environment", "jinja2.Template"}


@pytest.mark.parametrize("path", PYTHON_FILES, ids=name_of)
def test_no_pickle_no_remote_code_no_open_jinja(path):
    wrong = []
    for line, module in imported_modules(path):
        if module.split(".")[0] in FORBIDDEN_MODULES or module in FORBIDDEN_CALLS:
            wrong.append(f"line {line}: imports {module}")
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in FORBIDDEN_CALLS:
            wrong.append(f"line {node.lineno}: {ast.unparse(node)}")
        if isinstance(node, ast.keyword) and node.arg in {"trust_remote_code", "allow_pickle"}:
            refused = isinstance(node.value, ast.Constant) and node.value.value is False
            if not refused:
                wrong.append(f"line {node.value.lineno}: {node.arg}")
    assert not wrong
