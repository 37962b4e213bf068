"""The machine code of the Triton kernels, compiled here for GPUs that need not be here."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import sass
import torch
import triton_kernels

pytest.importorskip("triton")

ATTENTION = [
    f"{kernel}_{head_dim}{pages}"
    for head_dim in (64, 128)
    for kernel, pages in (("forward", "_page0"), ("forward", "_page64"), ("dq", ""), ("dk_dv", ""))
]
NAMES = [
    *ATTENTION, "delta", "rope_kv_write", "score_greedy", "score_filtered", "finish_greedy",
    "finish_filtered", "limit_factor", "limit_entropy_budget", "select", "ban",
]  # fmt: skip
MOST_STACK_BYTES = 128
"""Of the one kernel that keeps a few numbers of a task there while it walks the task's rows; Triton
3.6 and 3.7 make them 36 bytes at most, 3.9 up to 80."""
PRODUCT = {80: "HMMA", 90: "HGMMA"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("cubins")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([p for p in sys.path if p])
    result = subprocess.run(
        [sys.executable, triton_kernels.__file__, str(path)],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return path


@pytest.fixture(params=[80, 90])
def arch(request):
    return request.param


def machine_code(binary: Path) -> list[sass.Instruction]:
    (code,) = sass.instructions_of(sass.dump(sass.find_cuobjdump(), "-sass", binary)).values()
    return code


def product_loops(code, product):
    """The innermost loops with a matrix product, as their instructions."""
    innermost = []
    for loop in sass.loops_of(code):  # smaller ones first
        holds_another = any(set(inner) < set(loop) for inner in innermost)
        if sass.has(sass.instructions_in(loop), product) and not holds_another:
            innermost.append(loop)
    return [sass.instructions_in(loop) for loop in innermost]


def test_every_kernel_is_compiled(folder):
    expected = {f"sm_{arch}-{name}.cubin" for arch in (80, 90) for name in NAMES}
    assert {path.name for path in folder.iterdir()} == expected


@pytest.mark.parametrize("name", NAMES)
def test_nothing_spills(name, arch, folder):
    (kernel,) = sass.kernels_of(sass.find_cuobjdump(), folder / f"sm_{arch}-{name}.cubin")
    most = MOST_STACK_BYTES if name.startswith("dk_dv") else 0
    assert kernel.resources["STACK"] <= most, kernel.resources
    assert kernel.resources["LOCAL"] == 0


@pytest.mark.parametrize("name", ATTENTION)
def test_products_run_on_tensor_cores_and_their_loops_touch_no_local_memory(name, arch, folder):
    code = machine_code(folder / f"sm_{arch}-{name}.cubin")
    loops = product_loops(code, PRODUCT[arch])
    assert len(loops) >= 2  # of full tiles, of the others
    for loop in loops:
        assert not any(i.opcode.startswith(("LDL", "STL")) for i in loop)


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("forward")])
def test_full_tiles_carry_no_mask(name, arch, folder):
    code = machine_code(folder / f"sm_{arch}-{name}.cubin")
    assert sass.unmasked_cycle(code, PRODUCT[arch])
    assert any(i.is_mask for loop in product_loops(code, PRODUCT[arch]) for i in loop)


def test_logits_are_read_sixteen_bytes_at_a_time(arch, folder):
    """In the loop over a segment; what is left of a row may be read by elements."""
    code = machine_code(folder / f"sm_{arch}-score_greedy.cubin")
    loops = [sass.instructions_in(loop) for loop in sass.loops_of(code)]
    streams = [loop for loop in loops if sass.has(loop, "MUFU.EX2")]
    assert streams
    for loop in streams:
        loads = [i.opcode for i in loop if i.opcode.startswith("LDG")]
        assert any(".128" in opcode for opcode in loads), loads
        assert not any(".U16" in opcode for opcode in loads), loads


@pytest.mark.parametrize(
    "op", ["hybrid_attention", "hybrid_attention_backward", "rope_kv_write", "unmask"]
)
def test_kernels_are_launched_on_the_device_of_the_tensors(op, monkeypatch):
    from pdiff_runtime.ops import triton

    class Entered(Exception):
        pass

    def enter(device):
        raise Entered(device)

    monkeypatch.setattr(torch.cuda, "device", enter)
    stand_in = types.SimpleNamespace(is_cuda=True, device="cuda:1")
    with pytest.raises(Entered, match="cuda:1"):
        getattr(triton, op)(stand_in)
