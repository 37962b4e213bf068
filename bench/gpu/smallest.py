"""Runs every CUDA kernel on small shapes, and little else: for compute-sanitizer.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python bench/gpu/smallest.py

``--kernels sm90a`` is attention for compute capability 9.0, ``portable`` all the rest; ``--dtypes``
are all that there are unless told: the slower tools have time for one.
Inputs are made on the CPU, so that few kernels but ours are launched. Results are only looked at
for NaN: the tests compare them.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

import torch

from pdiff_runtime import ops
from pdiff_runtime.bench.peers import plan_of
from pdiff_runtime.bench.workloads import gpu_attention
from pdiff_runtime.testing import BACKENDS, use_cuda_kernels

BACKEND = next(b for b in BACKENDS if b.impl is ops.Impl.CUDA)
DEVICE = BACKEND.device
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SKIPPED = 77  # as bench/gpu_check.sh reads an exit status


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Standard normal numbers, made on the CPU."""
    return torch.randn(*shape).to(dtype).to(DEVICE)


def expect_numbers(*tensors: torch.Tensor) -> None:
    """No NaN, looked for on the CPU."""
    for tensor in tensors:
        assert not tensor.cpu().isnan().any()


def attention(head_dim: int, dtype: torch.dtype) -> None:
    """Packed keys both ways, paged keys forward; long rows, short rows, one row a request."""
    for name, workload in gpu_attention(128, heads=(4, 2, head_dim)).items():
        plan = plan_of(workload, impl=BACKEND.impl, device=DEVICE)
        attend(plan, dtype, has_gradient=name in ("long", "paper"))


def attention_from_tokens(head_dim: int, dtype: torch.dtype) -> None:
    """With the plan built on the device, of two documents with two spans and of one without."""
    begin, end, sync = 1, 2, 3
    text = [9] * 40
    spans = [begin, *text, end, begin, *text[:7], end, sync]
    documents = [[*text, *spans, *text], [*spans, *spans, *text[:3]], text]
    ends = itertools.accumulate(map(len, documents), initial=0)
    plan = ops.AttentionPlan.from_tokens(
        torch.tensor([x for document in documents for x in document]).to(DEVICE),
        torch.tensor(list(ends), dtype=torch.int32).to(DEVICE),
        async_start=begin, async_end=end, sync=sync,
        num_heads_q=4, num_heads_kv=2, head_dim=head_dim, impl=BACKEND.impl,
    )  # fmt: skip
    plan.check()
    attend(plan, dtype, has_gradient=True)


def attend(plan: ops.AttentionPlan, dtype: torch.dtype, *, has_gradient: bool) -> None:
    """Forward and, if asked for, backward."""
    keys = (plan.total_kv,)
    if plan.page_table is not None and plan.page_size is not None:
        keys = (int(plan.page_table.max()) + 1, plan.page_size)
    q = random(plan.total_q, 4, plan.head_dim, dtype=dtype)
    k, v = (random(*keys, 2, plan.head_dim, dtype=dtype) for _ in range(2))
    leaves = [x.requires_grad_(has_gradient) for x in (q, k, v)]
    out, lse = ops.hybrid_attention(*leaves, plan, return_lse=True)
    expect_numbers(out, lse)
    if has_gradient:
        expect_numbers(*torch.autograd.grad(out, leaves, random(*out.shape, dtype=dtype)))


def unmask(dtype: torch.dtype) -> None:
    """Greedy, sampled, filtered; spans of 5, 0, 1 and 7 rows; an odd vocabulary."""
    cu_rows = torch.tensor([0, 5, 5, 6, 13], dtype=torch.int32).to(DEVICE)
    num_unmask = torch.tensor([2, 1, 3, 4], dtype=torch.int32).to(DEVICE)
    row_position = torch.arange(13, dtype=torch.int32).to(DEVICE)
    for settings in ({}, {"temperature": 0.7}, {"temperature": 0.7, "top_p": 0.9, "top_k": 20}):
        for rule, vocab_size in itertools.product(ops.Rule, (1003, 4096)):
            stats = ops.unmask_(
                torch.zeros(13, dtype=torch.int64).to(DEVICE), random(13, vocab_size, dtype=dtype),
                row_position, cu_rows, num_unmask, rule=rule, threshold=0.1,
                banned_ids=torch.tensor([1, 5]).to(DEVICE), impl=BACKEND.impl, **settings,
            )  # fmt: skip
            expect_numbers(stats.confidence)


def rope(dtype: torch.dtype) -> None:
    """With pages and without."""
    angle = torch.rand(64, 32)
    tables = angle.cos().to(DEVICE), angle.sin().to(DEVICE)
    for has_pages in (True, False):
        q, k, v = (random(11, heads, 64, dtype=dtype) for heads in (4, 2, 2))
        caches = [random(2, 16, 2, 64, dtype=dtype) for _ in range(2)] if has_pages else [None] * 2
        slots = torch.randperm(32)[:11].to(DEVICE) if has_pages else None
        positions = torch.arange(11).to(DEVICE)
        ops.rope_kv_write_(q, k, v, *tables, positions, slots, *caches, impl=BACKEND.impl)
        expect_numbers(q, k)


def cross_entropy(dtype: torch.dtype) -> None:
    """Loss, and gradient in place, as it is and scaled; an ignored row, an odd vocabulary."""
    labels = torch.tensor([0, 5, -100, 1002, 7]).to(DEVICE)
    weight, kind = torch.rand(5).to(DEVICE), torch.tensor([0, 1, 1, 0, 1]).byte().to(DEVICE)
    for vocab_size, scale in itertools.product((1003, 4096), (1, 2)):
        leaf = random(5, vocab_size, dtype=dtype).requires_grad_()
        loss = ops.weighted_cross_entropy(
            leaf.view(leaf.shape), labels, weight, kind, normaliser=4.0, inplace_backward=True,
            impl=BACKEND.impl,
        ).loss  # fmt: skip
        expect_numbers(loss, *torch.autograd.grad(scale * loss, leaf))


def main() -> int:
    """All kernels; the exit status is the number of cases that failed, 77 if none could run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernels", choices=("portable", "sm90a"), default="portable")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    args = parser.parse_args()
    if BACKEND.missing:
        print(BACKEND.missing)
        return SKIPPED
    torch.manual_seed(0)
    cases: list[tuple[Callable[..., None], tuple[object, ...]]] = []
    for name in args.dtypes:
        dtype = DTYPES[name]
        if dtype != torch.float32:
            for head_dim in (64, 128):
                cases += [(case, (head_dim, dtype)) for case in (attention, attention_from_tokens)]
        if args.kernels == "portable":
            cases += [(case, (dtype,)) for case in (unmask, rope, cross_entropy)]
    with use_cuda_kernels(args.kernels) as available:
        if args.kernels == "sm90a" and not available:
            print("sm90a kernels are not for this device")
            return SKIPPED
        outcomes = [run(case, *arguments) for case, arguments in cases]
    if all(outcome.startswith("skipped") for outcome in outcomes):
        return SKIPPED
    return sum(outcome.startswith("failed") for outcome in outcomes)


def run(case: Callable[..., None], *arguments: object) -> str:
    """One case; what came of it."""
    try:
        case(*arguments)
        outcome = "ok"
    except NotImplementedError as error:
        outcome = f"skipped: not implemented: {error}"
    except (ValueError, AssertionError) as error:
        outcome = f"failed: {type(error).__name__}: {error}"
    print(case.__name__, *arguments, outcome, flush=True)
    return outcome


if __name__ == "__main__":
    sys.exit(main())
