"""How many steps a round takes and how many tokens each span receives in each of them."""

from __future__ import annotations

import numpy as np

MIN_TIME = 0.001
"""Where the time axis of a round ends; it starts at 1."""


def num_steps(longest_span: int, steps_ratio: float) -> int:
    """Denoising steps of a round whose longest span has ``longest_span`` content tokens."""
    return max(1, int(longest_span * steps_ratio))


def num_unmask(num_masked: int, step_idx: int, num_steps: int) -> int:
    """Tokens a span with ``num_masked`` masks left receives in step ``step_idx``.

    The published schedule, in float32 as there: with times on a line from 1 to 0.001, a step from
    t to s reveals the share 1 - s / t of what is left, at least one token, and the last step all.
    Truncation just below 1 / (steps left) makes it lose one early: 40 tokens in 20 steps go
    1, 2 x 18, 3.
    """
    if num_masked == 0 or step_idx >= num_steps - 1:
        return num_masked
    times = _times(num_steps)
    share = np.float32(1.0) - times[step_idx + 1] / times[step_idx]
    return min(num_masked, max(1, int(np.float32(num_masked) * share)))


def _times(num_steps: int) -> np.ndarray:
    """``linspace(1, 0.001, num_steps + 1)`` in float32."""
    return np.linspace(np.float32(1.0), np.float32(MIN_TIME), num_steps + 1, dtype=np.float32)
