"""Training: tagged documents, noise, the planned-diffusion loss, and a loop on the same kernels."""

from pdiff_runtime.train.loss import HybridWeights, hybrid_loss, hybrid_weights
from pdiff_runtime.train.noise import apply_noise
from pdiff_runtime.train.padding import pad_spans
from pdiff_runtime.train.targets import HybridTargets, hybrid_targets

__all__ = [
    "HybridTargets",
    "HybridWeights",
    "apply_noise",
    "hybrid_loss",
    "hybrid_targets",
    "hybrid_weights",
    "pad_spans",
]
