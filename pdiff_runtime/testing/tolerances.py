"""How far a kernel may be from the float64 oracle."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_within_budget(
    name: str, actual: Tensor, oracle: Tensor, low_precision: Tensor, *, factor: float = 2.0
) -> None:
    """Assert ``max|actual - oracle| <= factor * max|low_precision - oracle| + rounding``.

    Args:
        name: What is compared, for the message.
        actual: The kernel's result.
        oracle: The float64 reference of the same inputs.
        low_precision: The reference computed in the dtype of the inputs.
        factor: Share of the reference's own error that is allowed.

    Infinities must agree exactly, and nothing may be NaN. Rounding is one unit in the last place
    of the largest value in 16 bits, and sixteen in float32, where the reference's own error is
    itself no more than a few: kernels add up a few hundred products in sequence, torch in blocks.
    """
    assert actual.shape == oracle.shape, f"{name}: {tuple(actual.shape)} != {tuple(oracle.shape)}"
    assert not actual.isnan().any(), f"{name}: NaN at {actual.isnan().nonzero()[0].tolist()}"
    finite = oracle.isfinite()
    assert torch.equal(actual[~finite].double(), oracle[~finite]), f"{name}: infinities differ"
    if not finite.any():
        return
    expected = oracle[finite]
    error = (actual[finite].double() - expected).abs().max().item()
    reference_error = (low_precision[finite].double() - expected).abs().max().item()
    ulps = 16 if actual.dtype is torch.float32 else 1
    rounding = ulps * torch.finfo(actual.dtype).eps * max(expected.abs().max().item(), 0.3)
    assert error <= factor * reference_error + rounding, (
        f"{name}: error {error:.3g} > {factor} * {reference_error:.3g} + {rounding:.3g}"
    )
