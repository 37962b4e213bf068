"""Filling the masked positions of open spans: how many per step, and which."""

from pdiff_runtime.denoise.rules import PUBLISHED_RULES, RULES, Progress, UnmaskRule
from pdiff_runtime.denoise.schedule import num_steps, num_unmask

__all__ = ["PUBLISHED_RULES", "RULES", "Progress", "UnmaskRule", "num_steps", "num_unmask"]
