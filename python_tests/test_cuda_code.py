"""The machine code of the CUDA kernels: nothing spilled, and the instructions that make it fast.

Needs no GPU, only a build with CUDA and `cuobjdump`. The kernels are read from the object, so a new
one is covered as soon as it is built; a folder of csrc/cuda is the kernel's stem.
"""

from __future__ import annotations

import functools
import itertools
from pathlib import Path

import pytest
from sass import (
    Instruction,
    Kernel,
    dump,
    find_cuobjdump,
    has,
    instructions_in,
    instructions_of,
    kernels_of,
    loops_of,
    unmasked_cycle,
)

from pdiff_runtime import _C

CUOBJDUMP = find_cuobjdump()
BINARY = Path(_C.__file__)

if not _C.built_with_cuda or _C.emulates_cuda:
    pytest.skip("built without CUDA: no machine code of kernels", allow_module_level=True)
if CUOBJDUMP is None:
    pytest.skip("no cuobjdump: it comes with CUDA and with triton", allow_module_level=True)

KERNELS = kernels_of(CUOBJDUMP, BINARY)
STEMS = {
    f"{stem}-{arch}": [k for k in KERNELS if (k.folder, k.arch) == (stem, arch)]
    for stem, arch in sorted({(k.folder, k.arch) for k in KERNELS})
}
ATTENTION = [name for name in STEMS if name.startswith("hybrid_attention")]
STREAMS = [name for name in STEMS if name.startswith(("unmask", "weighted_cross_entropy"))]
SM90A = [k for k in KERNELS if "sm90a" in k.source.parts]

each_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=str)


@functools.cache
def machine_code() -> dict[tuple[str, str], list[Instruction]]:
    return instructions_of(dump(CUOBJDUMP, "-sass", BINARY))


def code_of(kernel: Kernel) -> list[Instruction]:
    return machine_code()[kernel.arch, kernel.name]


def test_every_architecture_has_every_kernel():
    built = {
        a.removesuffix("-real") for a in _C.cuda_architectures.split() if a.endswith("-real")
    } - {"90a"}
    portable = [k for k in KERNELS if k not in SM90A]
    by_arch = {arch: {k.name for k in portable if k.arch == f"sm_{arch}"} for arch in built}
    for (a, names_a), (b, names_b) in itertools.combinations(by_arch.items(), 2):
        assert names_a == names_b, f"sm_{a} and sm_{b} differ"
    assert all(by_arch.values())


@each_kernel
def test_nothing_is_spilled(kernel):
    assert kernel.resources["STACK"] == 0
    assert kernel.resources["LOCAL"] == 0
    local = [i for i in code_of(kernel) if i.opcode.startswith(("LDL", "STL"))]
    assert not local, f"{len(local)} accesses of local memory"


@pytest.mark.parametrize("stem", ATTENTION)
def test_attention_multiplies_matrices(stem):
    """Tensor cores fed by ldmatrix from tiles that cp.async brings; TMA on sm_90a."""
    products = [k for k in STEMS[stem] if has(code_of(k), "HMMA") or has(code_of(k), "HGMMA")]
    assert products
    for kernel in products:
        code = code_of(kernel)
        if kernel not in SM90A:
            assert has(code, "LDSM", "LDGSTS"), kernel


@pytest.mark.parametrize("stem", ATTENTION)
def test_full_tiles_spend_no_mask_instruction(stem):
    """Some way round the loop over tiles passes products and exponentials, and no mask."""
    for kernel in STEMS[stem]:
        code = code_of(kernel)
        wanted = ("HGMMA" if has(code, "HGMMA") else "HMMA", "MUFU.EX2")
        if has(code, *wanted):
            assert unmasked_cycle(code, *wanted), f"{kernel}: every tile is masked"


@pytest.mark.parametrize("kernel", SM90A, ids=str)
def test_sm90a_kernels_use_what_they_are_for(kernel):
    assert kernel.arch == "sm_90a"
    assert has(code_of(kernel), "HGMMA", "UTMALDG")


@pytest.mark.parametrize("kernel", SM90A, ids=str)
def test_warpgroups_issue_products_one_after_another(kernel):
    """A compiler short of registers waits for each product before it issues the next."""
    code = code_of(kernel)
    waits = [i for i in code if i.opcode.startswith("WARPGROUP.DEPBAR")]
    products = [i for i in code if i.opcode.startswith("HGMMA")]
    assert len(products) >= 3 * len(waits)


@pytest.mark.parametrize("kernel", SM90A, ids=str)
def test_exponentials_are_worked_out_while_products_are_under_way(kernel):
    """A compiler may move a wait for all products up past what was to go on meanwhile."""
    if "backward_kernel" in kernel.name and "Lb1E" in kernel.name:
        pytest.skip("the gradients of keys and values leave no registers for a second product")
    loop = next(
        loop for loop in map(instructions_in, loops_of(code_of(kernel)))
        if has(loop, "HGMMA", "MUFU.EX2")
    )  # fmt: skip
    meanwhile, idle, left = 0, 0, None
    for instruction in loop:
        if instruction.opcode.startswith("WARPGROUP.DEPBAR"):
            left = instruction.target
        elif instruction.opcode.startswith("MUFU.EX2"):
            meanwhile, idle = meanwhile + (left == 1), idle + (left == 0)
    assert meanwhile >= 32
    assert idle == 0


@pytest.mark.parametrize("kernel", SM90A, ids=str)
def test_warpgroups_ask_for_no_more_registers_than_there_are(kernel):
    """One gives back, two ask; a block that asks for more than it began with hangs."""
    code = code_of(kernel)
    asked = {
        wanted: [i.target for i in code if i.opcode.startswith(f"USETMAXREG.{wanted}")]
        for wanted in ("DEALLOC", "TRY_ALLOC")
    }
    [left], [held] = set(asked["DEALLOC"]), set(asked["TRY_ALLOC"])
    assert left + 2 * held <= 3 * kernel.resources["REG"]


@pytest.mark.parametrize("stem", STREAMS)
def test_logits_are_read_16_bytes_at_a_time(stem):
    """Of every kernel that goes through a row: one whose loop has exponentials."""
    streams = [
        k
        for k in STEMS[stem]
        if any(has(instructions_in(loop), "MUFU.EX2") for loop in loops_of(code_of(k)))
    ]
    assert streams
    for kernel in streams:
        loads = [i.opcode for i in code_of(kernel) if i.opcode.startswith("LDG")]  # and LDGSTS
        assert any("128" in opcode for opcode in loads), f"{kernel}: {sorted(set(loads))}"


LISTING = """
arch = sm_80
		Function : tile
        /*0000*/                   MOV R5, 0xff800000 ;                /* 0x0 */
        /*0010*/                   LDSM.16.M88.4 R8, [R2] ;            /* 0x0 */
        /*0020*/                   HMMA.16816.F32.BF16 R4, R8, R12, RZ ;  /* 0x0 */
        /*0030*/              @!P0 BRA 0x50 ;                          /* 0x0 */
        /*0040*/                   FSEL R4, R4, -INF , P1 ;            /* 0x0 */
        /*0050*/                   MUFU.EX2 R6, R4 ;                   /* 0x0 */
        /*0060*/               @P2 BRA 0x10 ;                          /* 0x0 */
        /*0070*/                   MUFU.EX2 R7, R4 ;                   /* 0x0 */
        /*0080*/               @P3 BRA 0x0 ;                           /* 0x0 */
        /*0090*/                   EXIT ;                              /* 0x0 */
"""


def test_a_branch_past_the_mask_is_found():
    code = instructions_of(LISTING.splitlines())["sm_80", "tile"]
    assert [i.is_mask for i in code] == [i.opcode == "FSEL" for i in code]
    assert len(loops_of(code)) == 2
    cycle = unmasked_cycle(code, "HMMA", "MUFU.EX2")
    assert [i.address for i in cycle] == [0x10, 0x20, 0x30, 0x50, 0x60]


def test_an_outer_loop_does_not_pass_for_an_unmasked_one():
    """Without the branch past the mask, the way round is masked; there is a way out before it."""
    lines = [line.replace("BRA 0x50", "BRA 0x70") for line in LISTING.splitlines()]
    code = instructions_of(lines)["sm_80", "tile"]
    assert len(loops_of(code)) == 2
    assert unmasked_cycle(code, "HMMA", "MUFU.EX2") == []
