"""The Triton kernels, compiled ahead of time for GPUs that need not be there.

`python triton_kernels.py FOLDER` writes one cubin per kernel and architecture. It is a program of
its own because kernels cannot be compiled in a process that interprets them.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

POINTERS = {
    "words": "*i32", "pages": "*i32", "cu_rows_span": "*i32", "random_position": "*i32",
    "row_position": "*i32", "num_unmask": "*i32", "num_masked": "*i32",
    "ids": "*i32", "lists": "*i32", "bans": "*i32",
    "top_ks": "*i32", "seeds": "*i64", "positions": "*i64", "slots": "*i64", "token_ids": "*i64",
    "candidate": "*i64", "banned_ids": "*i64", "is_nan": "*u8", "is_written": "*u8",
    "lse": "*fp32", "dlse": "*fp32", "delta": "*fp32", "log2_sum": "*fp32", "floats": "*fp32",
    "lane_max": "*fp32", "confidence": "*fp32", "rank_key": "*fp32", "cos": "*fp32",
    "sin": "*fp32", "temperatures": "*fp32", "top_ps": "*fp32",
}  # fmt: skip
"""Arguments that are pointers; other tensors hold bfloat16."""
ABSENT = ("alg_temps", "step_idxs", "thresholds")
FLOATS = ("scale", "scale_log2", "temperature", "top_p", "alg_temp", "threshold")
MULTIPLES_OF_16 = (
    "q_stride", "k_stride", "v_stride", "k_page_stride", "v_page_stride", "logits_stride",
    "vocab_size",
)  # fmt: skip
INTEGERS = (
    *MULTIPLES_OF_16, "total_q", "max_position", "num_slots", "top_k", "step_idx", "num_rows",
    "num_spans", "num_segments", "num_banned", "total_tokens",
)  # fmt: skip


class Case(NamedTuple):
    """One kernel with what is fixed when it is compiled."""

    name: str
    kernel: Any
    constants: dict[str, Any]
    num_warps: int
    num_stages: int


def cases(arch: int) -> Iterator[Case]:
    """Every kernel, as an H200 (90) or an A100 (80) would run it in bfloat16."""
    forward, backward, rope, unmask = (
        importlib.import_module(f"pdiff_runtime.ops.triton.{name}")
        for name in ("hybrid_attention", "hybrid_attention_backward", "rope_kv_write", "unmask")
    )
    shared_bytes = {80: 163 * 1024, 90: 227 * 1024}[arch]
    for head_dim in (64, 128):
        heads = {"GROUP": 7, "HEADS_KV": 4, "HEAD_DIM": head_dim, "BLOCK_D": head_dim}
        dtype = torch.bfloat16
        config = forward.forward_config(dtype, head_dim, shared_bytes)
        for page_size in (0, 64):
            yield attention(
                f"forward_{head_dim}_page{page_size}", forward.forward_kernel, config,
                heads | {"PAGE_SIZE": page_size},
            )  # fmt: skip
        config = backward.dq_config(dtype, head_dim, shared_bytes)
        yield attention(f"dq_{head_dim}", backward.dq_kernel, config, heads)
        config = backward.dk_dv_config(dtype, head_dim)
        yield attention(f"dk_dv_{head_dim}", backward.dk_dv_kernel, config, heads)
    yield Case(
        "delta", backward.delta_kernel,
        {"HEADS_Q": 28, "HEAD_DIM": 128, "BLOCK_D": 128, "BLOCK_M": backward.ROWS_OF_DELTA}, 4, 1,
    )  # fmt: skip
    yield Case(
        "rope_kv_write", rope.rope_kv_write_kernel,
        {
            "HEADS_Q": 28, "HEADS_KV": 4, "HEAD_DIM": 128,
            "BLOCK_HQ": 32, "BLOCK_HKV": 4, "BLOCK_D": 64, "BLOCK_V": 512,
        }, 4, 1,
    )  # fmt: skip
    rows = {"LANES": unmask.LANES, "SPAN_BLOCK": unmask.SPAN_BLOCK}
    for name, draws, filters in (("greedy", False, False), ("filtered", True, True)):
        how = rows | {"DRAWS": draws, "FILTERS": filters}
        yield Case(
            f"score_{name}", unmask.score_kernel,
            how | {"NEEDS_SECOND": filters, "VEC": 8, "SEGMENT": unmask.SEGMENT}, 8, 1,
        )  # fmt: skip
        yield Case(
            f"finish_{name}", unmask.finish_kernel,
            how | {
                "CONFIDENCE": 0, "SEGMENTS": 8, "LANES_BLOCK": 2048,
                "LIST_BLOCK": unmask.LIST_BLOCK,
            },
            8 if filters else 1, 1,
        )  # fmt: skip
    for name, rule in (("factor", 4), ("entropy_budget", 5)):
        yield Case(
            f"limit_{name}", unmask.limit_kernel, {"RULE": rule, "ROWS": unmask.SELECT_ROWS}, 8, 1
        )
    yield Case("select", unmask.select_kernel, {"RULE": 3, "ROWS": unmask.SELECT_ROWS}, 4, 1)
    yield Case("ban", unmask.ban_kernel, {"BLOCK": 256}, 4, 1)


def attention(name: str, kernel: Any, config: Any, heads: dict[str, int]) -> Case:
    blocks = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n}
    return Case(name, kernel, heads | blocks, config.num_warps, config.num_stages)


def cubin(case: Case, arch: int) -> bytes:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(case.kernel.arg_names):
        if name in case.constants or name in ABSENT:
            signature[name], constants[(i,)] = "constexpr", case.constants.get(name)
        elif name in INTEGERS or name in FLOATS:
            signature[name] = "i32" if name in INTEGERS else "fp32"
        else:
            signature[name] = POINTERS.get(name, "*bf16")
        if name in MULTIPLES_OF_16 or signature[name].startswith("*"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(case.kernel, signature, constants, attributes),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": case.num_warps, "num_stages": case.num_stages},
    )
    return compiled.asm["cubin"]


if __name__ == "__main__":
    for arch in (80, 90):
        for case in cases(arch):
            Path(sys.argv[1], f"sm_{arch}-{case.name}.cubin").write_bytes(cubin(case, arch))
