"""The rotary embedding's tables."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Slower rotations for contexts beyond those of pretraining, as Llama 3.1 has them.

    Frequencies that turn at least ``high_freq_factor`` times within ``original_max_position`` stay
    as they are, those that turn less than ``low_freq_factor`` times are divided by ``factor``, and
    those between are interpolated.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not 0 < value <= 1e9:
                raise ValueError(
                    f"rope_scaling: {field.name}: expected a number > 0, got {value!r:.80}"
                )
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"rope_scaling: expected low_freq_factor < high_freq_factor, got "
                f"{self.low_freq_factor} and {self.high_freq_factor}"
            )

    def apply(self, frequency: Tensor) -> Tensor:
        """``[head_dim / 2]`` radians a position -> the same shape."""
        turns = self.original_max_position * frequency / (2 * math.pi)
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = kept.clamp(0, 1)
        return (1 - kept) * frequency / self.factor + kept * frequency


def rope_table(
    max_position: int,
    head_dim: int,
    theta: float,
    scaling: Llama3Scaling | None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """cos and sin of every position, each ``[max_position, head_dim / 2]`` fp32."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    frequency = 1.0 / theta**exponent
    if scaling is not None:
        frequency = scaling.apply(frequency)
    position = torch.arange(max_position, dtype=torch.float32, device=device)
    angle = position[:, None] * frequency
    return angle.cos(), angle.sin()
