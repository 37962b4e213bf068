"""How many tokens each span receives per step."""

from __future__ import annotations

import pytest
from golden_data import load_json

from pdiff_runtime.denoise import num_steps, num_unmask

CASES = load_json("schedule")


def test_schedule_equals_the_published_one():
    assert len(CASES) > 100
    for case in CASES:
        steps = num_steps(max(case["sizes"]), case["steps_ratio"])
        assert steps == case["steps"]
        left = list(case["sizes"])
        for step_idx, counts in enumerate(case["counts"]):
            assert [num_unmask(m, step_idx, steps) for m in left] == counts, case
            left = [m - count for m, count in zip(left, counts, strict=True)]
        assert not any(left)


def test_a_round_has_at_least_one_step():
    assert num_steps(3, 0.1) == 1
    assert num_steps(0, 1.0) == 1


@pytest.mark.parametrize("masked", [0, 1, 7, 40])
def test_the_last_step_writes_the_rest(masked):
    assert num_unmask(masked, 4, 5) == masked
    assert num_unmask(masked, 9, 5) == masked
