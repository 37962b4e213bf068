"""One denoising step against the recorded behaviour of the published implementation."""

import itertools
import json

import numpy as np
import pytest
import torch
from golden_data import load_npz
from on_backends import backend_fixture

from pdiff_runtime import ops
from pdiff_runtime.denoise import PUBLISHED_RULES, Progress
from pdiff_runtime.ops import Impl

DATA = load_npz("unmask")
META = json.loads(str(DATA["meta"]))
CASES = [int(case) for case in DATA["cases"]]
FILTERS = [i for i in range(len(META["filters"])) if f"f{i}_logits" in DATA]


backend = backend_fixture(["generic", "avx2", "avx512"], [Impl.CUDA, Impl.TRITON])


def run(backend, token_ids, logits, *arguments, **settings):
    """The statistics, on the CPU; `token_ids` is written wherever the backend ran."""
    moved = [x.to(backend.device) for x in (token_ids, logits, *arguments)]
    stats = ops.unmask_(*moved, impl=backend.impl, **settings)
    token_ids.copy_(moved[0])
    return ops.UnmaskStats(*(part.cpu() for part in stats))


def quotas(case: dict) -> list[int]:
    """What the published schedule lets each span write in this step."""
    rule = PUBLISHED_RULES[case["alg"].removeprefix("pd_")]
    num_steps = case.get("og_num_steps") or case["steps"]
    carry = case.get("left_before") or [0] * len(case["masked"])
    return [
        rule.quota(Progress(num_masked, case["i"], num_steps, left))
        for num_masked, left in zip(case["masked"], carry, strict=True)
    ]


@pytest.mark.parametrize("number", CASES)
def test_step_writes_what_the_published_code_wrote(number, backend):
    case = META["cases"][number]
    field = {name: DATA[f"{number:02d}_{name}"] for name in (
        "logits", "x_before", "x_after", "confidence", "x0", "chosen", "block_info"
    )}  # fmt: skip
    masked = np.flatnonzero(field["x_before"] == case["mask_id"])
    spans = [masked[(masked > lo) & (masked < hi - 1)] for lo, hi, _ in field["block_info"]]
    row_position = np.concatenate(spans)
    assert np.array_equal(row_position, masked)
    assert [len(span) for span in spans] == case["masked"]

    token_ids = torch.from_numpy(field["x_before"]).long()
    stats = run(
        backend,
        token_ids,
        torch.from_numpy(field["logits"][row_position]).float(),
        torch.from_numpy(row_position).int(),
        torch.tensor([0, *itertools.accumulate(map(len, spans))], dtype=torch.int32),
        torch.tensor(quotas(case), dtype=torch.int32),
        rule=case["alg"].removeprefix("pd_"),
        threshold=case.get("threshold"),
        temperature=case["temperature"],
        top_p=case["top_p"] or 1.0,
        top_k=case["top_k"] or 0,
    )
    assert np.array_equal(stats.candidate, field["x0"])
    assert np.allclose(stats.confidence, field["confidence"], rtol=1e-5, atol=1e-5)
    assert np.array_equal(row_position[stats.is_written.numpy()], field["chosen"])
    assert np.array_equal(token_ids, field["x_after"])
    written = [int(np.isin(span, field["chosen"]).sum()) for span in spans]
    assert written == case["counts"]
    if "left_after" in case:  # what is held back is owed to the next step, if the span has as much
        held_back = [quota - count for quota, count in zip(quotas(case), written, strict=True)]
        left = [m - count for m, count in zip(case["masked"], written, strict=True)]
        assert held_back == [min(pair) for pair in zip(case["left_after"], left, strict=True)]


@pytest.mark.parametrize("number", FILTERS)
def test_filters_keep_what_the_published_code_kept(number, backend):
    logits = torch.from_numpy(DATA[f"f{number}_logits"]).float()
    keep = torch.from_numpy(DATA[f"f{number}_keep"])
    settings = META["filters"][number]
    filters = {"top_p": settings["top_p"] or 1.0, "top_k": settings["top_k"] or 0}
    rows = len(logits)
    tokens = torch.zeros(rows, dtype=torch.int64)
    for row in range(rows):
        assert torch.equal(ops.reference.keep_prefix(logits[row].double(), **filters), keep[row])
    for rule in ops.Rule:  # the distribution over exactly the kept set
        arguments = (
            torch.arange(rows, dtype=torch.int32),
            torch.tensor([0, rows], dtype=torch.int32),
            torch.tensor([rows], dtype=torch.int32),
        )
        kept_only = logits.masked_fill(~keep, -torch.inf)
        settings = {"rule": rule, "threshold": 0.0}
        actual = run(backend, tokens, logits, *arguments, **settings, **filters)
        expected = run(backend, tokens, kept_only, *arguments, **settings)
        assert torch.allclose(actual.confidence, expected.confidence, rtol=1e-5, atol=1e-6)
