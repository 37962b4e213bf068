"""Where torch meets the compiled core: one module per kernel, `reference` specifies them."""

from pdiff_runtime.ops._library import Impl
from pdiff_runtime.ops.attention_plan import AttentionPlan
from pdiff_runtime.ops.hybrid_attention import hybrid_attention
from pdiff_runtime.ops.rms_norm import rms_norm
from pdiff_runtime.ops.rope_kv_write import rope_kv_write_
from pdiff_runtime.ops.swiglu import swiglu
from pdiff_runtime.ops.unmask import Rule, UnmaskStats, unmask_
from pdiff_runtime.ops.weighted_cross_entropy import WeightedCrossEntropy, weighted_cross_entropy
