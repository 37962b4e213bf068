"""Machine code of CUDA kernels as `cuobjdump` prints it: resources, instructions, loops."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import networkx as nx

INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
RESOURCES = re.compile(r"(\w+)(?:\[\d+\])?:(\d+)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """`@!P0 BRA 0x590` at address 0x60."""

    address: int
    predicate: str
    opcode: str
    operands: str

    @property
    def is_mask(self) -> bool:
        """Whether it puts -inf in the place of a score, or unpacks the bits that say where."""
        if self.opcode.startswith("R2P"):
            return True
        selects = self.opcode.split(".")[0] in ("FSEL", "SEL") or bool(self.predicate)
        return selects and re.search(r"-INF|-0x800000|0xff800000", self.operands) is not None

    @property
    def target(self) -> int | None:
        """Where a branch goes; None for one whose target is in a register."""
        addresses = re.findall(r"0x([0-9a-f]+)", self.operands)
        return int(addresses[-1], 16) if addresses else None


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel for one architecture."""

    name: str  # mangled
    arch: str  # "sm_90"
    source: Path  # of the object it was compiled into
    resources: dict[str, int]  # "REG", "STACK", "LOCAL", ...

    @property
    def folder(self) -> str:
        """The kernel's stem below csrc/cuda."""
        return str(self.source).rpartition("csrc/cuda/")[2].split("/")[0]

    def __str__(self) -> str:
        plain = demangled(self.name)
        plain = re.sub(r"\(anonymous namespace\)::|pdiff::(cuda::)?|^void ", "", plain)
        return f"{self.arch}-{plain.split('(')[0]}"


def find_cuobjdump() -> str | None:
    """Path of cuobjdump: PATH, a CUDA toolkit, then the packages that carry one."""
    if found := shutil.which("cuobjdump"):
        return found
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    candidates = [Path(home) / "bin" for home in homes if home]
    for package, folders in (("triton", ["backends/nvidia/bin"]), ("nvidia", ["*/bin"])):
        spec = importlib.util.find_spec(package)
        for root in spec.submodule_search_locations or [] if spec else []:
            candidates += [path for folder in folders for path in Path(root).glob(folder)]
    found = [path / "cuobjdump" for path in candidates if (path / "cuobjdump").is_file()]
    return str(found[0]) if found else None


def dump(cuobjdump: str, option: str, binary: Path) -> Iterator[str]:
    """Lines of `cuobjdump OPTION BINARY`; it finds its nvdisasm beside itself."""
    path = os.pathsep.join([str(Path(cuobjdump).parent), os.environ.get("PATH", "")])
    with subprocess.Popen(
        [cuobjdump, option, str(binary)], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PATH": path},
    ) as process:  # fmt: skip
        assert process.stdout is not None
        yield from process.stdout
    assert process.returncode == 0, f"cuobjdump {option} failed"


def kernels_of(cuobjdump: str, binary: Path) -> list[Kernel]:
    """Every kernel of every architecture in a binary."""
    kernels, arch, source, name = [], "", Path(), ""
    for line in dump(cuobjdump, "-res-usage", binary):
        if match := re.match(r"arch = (\w+)", line):
            arch = match[1]
        elif match := re.match(r"identifier = (.*)", line):
            source = Path(match[1].strip())
        elif match := re.match(r"\s+Function (\S+):", line):
            name = match[1]
        elif name:
            resources = {key: int(value) for key, value in RESOURCES.findall(line)}
            kernels.append(Kernel(name, arch, source, resources))
            name = ""
    return kernels


def instructions_of(lines: Iterable[str]) -> dict[tuple[str, str], list[Instruction]]:
    """(architecture, mangled name) -> the kernel's instructions."""
    code: dict[tuple[str, str], list[Instruction]] = {}
    arch, current = "", []
    for line in lines:
        if match := INSTRUCTION.match(line):
            current.append(Instruction(int(match[1], 16), match[2] or "", match[3], match[4]))
        elif match := re.match(r"arch = (\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s+Function : (\S+)", line):
            current = code[arch, match[1]] = []
    return code


@functools.cache
def demangled(name: str) -> str:
    """The C++ name where c++filt is there, else the name as it is."""
    if shutil.which("c++filt") is None:
        return name
    return subprocess.run(
        ["c++filt", name], capture_output=True, text=True, check=True
    ).stdout.strip()


def blocks_of(code: Sequence[Instruction]) -> tuple[dict[int, list[Instruction]], nx.DiGraph]:
    """Basic blocks by their first address, and which may follow which."""
    is_branch = [i.opcode.startswith(("BRA", "BRX", "JMP", "EXIT", "RET")) for i in code]
    starts = {code[0].address} if code else set()
    for instruction, following, ends in zip(code, code[1:], is_branch, strict=False):
        if ends:
            starts.add(following.address)
            if instruction.opcode.startswith("BRA") and instruction.target is not None:
                starts.add(instruction.target)
    blocks: dict[int, list[Instruction]] = {}
    for instruction in code:
        if instruction.address in starts:
            blocks[instruction.address] = block = []
        block.append(instruction)
    graph = nx.DiGraph()
    graph.add_nodes_from(blocks)
    for (start, block), following in zip(blocks.items(), [*blocks][1:], strict=False):
        last = block[-1]
        is_jump = last.opcode.startswith(("BRA", "BRX", "JMP"))
        ends = is_jump or last.opcode.startswith(("EXIT", "RET"))
        if last.opcode.startswith("BRA") and last.target in blocks:
            graph.add_edge(start, last.target)
        # `BRA.U UP0, ...` and `BRA P0, ...` have their condition among the operands.
        is_conditional = bool(last.predicate) or "," in last.operands
        if not ends or is_conditional:
            graph.add_edge(start, following)
    return blocks, graph


def loops_of(code: Sequence[Instruction]) -> list[nx.DiGraph]:
    """Loops, smaller ones first: graphs of blocks whose instructions are the nodes' ``code``.

    A loop is entered at one block; whatever branches back there belongs to it.
    """
    blocks, graph = blocks_of(code)
    entry = code[0].address
    graph.remove_nodes_from(set(graph) - {entry} - nx.descendants(graph, entry))
    nx.set_node_attributes(graph, blocks, "code")
    dominators = nx.immediate_dominators(graph, entry)
    bodies: dict[int, set[int]] = {}
    for last, first in graph.edges:
        node = last
        while node not in (first, entry):
            node = dominators[node]
        if node != first:  # some way to `last` does not pass `first`
            continue
        body = bodies.setdefault(first, {first})
        if last != first:
            body |= {last, *nx.ancestors(nx.restricted_view(graph, [first], []), last)}
    return [graph.subgraph(body) for body in sorted(bodies.values(), key=len)]


def instructions_in(loop: nx.DiGraph) -> list[Instruction]:
    """In order of their addresses."""
    return [i for _, block in sorted(loop.nodes(data="code")) for i in block]


def unmasked_cycle(code: Sequence[Instruction], *prefixes: str) -> list[Instruction]:
    """A way round some loop that passes all these opcodes and no mask instruction.

    Blocks with a mask instruction are taken out, and with them loops of these opcodes that do not
    stay whole without: an outer loop must not pass for an inner one by going through its halves.

    Returns:
        The instructions of the cycle (a strongly connected component); none if every way is masked.
    """
    masked: set[int] = set()
    for loop in loops_of(code):
        if not has(instructions_in(loop), *prefixes):
            continue
        plain = loop.subgraph(
            node for node, block in loop.nodes(data="code")
            if node not in masked and not any(i.is_mask for i in block)
        )  # fmt: skip
        for component in nx.strongly_connected_components(plain):
            cycle = instructions_in(plain.subgraph(component))
            first = next(iter(component))
            is_cycle = len(component) > 1 or plain.has_edge(first, first)
            if is_cycle and has(cycle, *prefixes):
                return cycle
        masked |= set(loop)
    return []


def opcodes(code: Iterable[Instruction]) -> set[str]:
    """The different opcodes, modifiers included."""
    return {instruction.opcode for instruction in code}


def has(code: Iterable[Instruction], *prefixes: str) -> bool:
    """Whether every prefix begins some opcode."""
    names = opcodes(code)
    return all(any(name.startswith(prefix) for name in names) for prefix in prefixes)
