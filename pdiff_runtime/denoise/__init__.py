"""Filling the masked positions of open spans: how many per step, and which."""

from pdiff_runtime.denoise.rules import RULES, UnmaskRule
from pdiff_runtime.denoise.schedule import num_steps, num_unmask

__all__ = ["RULES", "UnmaskRule", "num_steps", "num_unmask"]
