"""Unmasking rules by the names users know, each a few settings of one kernel."""

from __future__ import annotations

import dataclasses

from pdiff_runtime import ops


@dataclasses.dataclass(frozen=True)
class UnmaskRule:
    """How a step chooses the positions it writes.

    Attributes:
        kernel_rule: What the kernel ranks positions by.
        has_quota: Whether the schedule limits a step; without, every position above the threshold
            is written, and at least one per span.
        needs_threshold: Whether the caller must give a threshold.
    """

    kernel_rule: ops.Rule
    has_quota: bool = True
    needs_threshold: bool = False


RULES = {
    "entropy": UnmaskRule(ops.Rule.ENTROPY),
    "maskgit_plus": UnmaskRule(ops.Rule.PROBABILITY),
    "topk_margin": UnmaskRule(ops.Rule.MARGIN),
    "confidence_threshold": UnmaskRule(ops.Rule.THRESHOLD, has_quota=False, needs_threshold=True),
}
"""The rules of ``GenerationParams.unmask``."""
