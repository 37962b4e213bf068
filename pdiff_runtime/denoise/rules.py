"""Unmasking rules: what orders the positions of a span, and how many of them a step writes.

The kernel scores, orders and writes; a rule here is the kernel's rule and a quota. A new one is a
small class, or an entry of :data:`RULES` with other settings.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from pdiff_runtime import ops
from pdiff_runtime.denoise.schedule import num_unmask


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a span, or the block of it that is being filled, is before a step.

    Attributes:
        num_masked: Masks it has left.
        step_idx: Steps it has seen.
        num_steps: Steps the schedule has planned for it.
        carry: What the last step hands on to this one, see :meth:`UnmaskRule.carry`.
    """

    num_masked: int
    step_idx: int
    num_steps: int
    carry: int = 0


@dataclasses.dataclass(frozen=True)
class UnmaskRule:
    """The schedule's share of the masks, the most certain first.

    Attributes:
        kernel_rule: What the kernel ranks positions by, and where it stops.
        needs_threshold: Whether the caller must give a threshold.
    """

    kernel_rule: ops.Rule
    needs_threshold: bool = False

    @property
    def has_fixed_quota(self) -> bool:
        """Whether a step writes all of its quota, so that further quotas are known ahead."""
        return self.kernel_rule in (ops.Rule.ENTROPY, ops.Rule.PROBABILITY, ops.Rule.MARGIN)

    @property
    def runs_ahead(self) -> bool:
        """Whether a step may be launched before it is known what the last one has written."""
        return self.has_fixed_quota

    def quota(self, at: Progress) -> int:
        """How many positions the step writes at most."""
        return num_unmask(at.num_masked, at.step_idx, at.num_steps)

    def carry(self, at: Progress, num_written: int) -> int:
        """What a step that wrote so many positions hands on to the next one's quota."""
        return 0

    def order_temperature(self, alg_temp: float) -> float:
        """Temperature of the order of positions, given the caller's."""
        return alg_temp


class RandomOrder(UnmaskRule):
    """The schedule's share of the masks, in any order."""

    def order_temperature(self, alg_temp: float) -> float:
        return math.inf


class UntilUncertain(UnmaskRule):
    """No schedule: a step writes until the kernel's rule stops, at least one position."""

    @property
    def runs_ahead(self) -> bool:
        return True  # any number from that of the masks on is as good

    def quota(self, at: Progress) -> int:
        return at.num_masked


class CarriedQuota(UnmaskRule):
    """The published threshold rule: an even share per step, and what earlier steps rejected.

    The published carry may exceed the span, which crashes there; here the masks bound it.
    """

    def quota(self, at: Progress) -> int:
        steps_left = at.num_steps - at.step_idx
        share = at.num_masked // steps_left if steps_left > 0 else 1
        return min(at.num_masked, max(1, share) + at.carry)

    def carry(self, at: Progress, num_written: int) -> int:
        return self.quota(at) - num_written


RULES: Mapping[str, UnmaskRule] = {
    "entropy": UnmaskRule(ops.Rule.ENTROPY),
    "maskgit_plus": UnmaskRule(ops.Rule.PROBABILITY),
    "topk_margin": UnmaskRule(ops.Rule.MARGIN),
    "origin": RandomOrder(ops.Rule.PROBABILITY),
    "confidence_threshold": UntilUncertain(ops.Rule.THRESHOLD, needs_threshold=True),
    "factor": UntilUncertain(ops.Rule.FACTOR, needs_threshold=True),
    "entropy_budget": UntilUncertain(ops.Rule.ENTROPY_BUDGET, needs_threshold=True),
}
"""The rules of ``GenerationParams.unmask``, under the names that publications gave them."""

PUBLISHED_RULES: Mapping[str, UnmaskRule] = {
    **{name: RULES[name] for name in ("entropy", "maskgit_plus", "topk_margin")},
    "confidence_threshold": CarriedQuota(ops.Rule.THRESHOLD, needs_threshold=True),
}
"""Those of the published implementation, as it computes them."""
