"""Planned diffusion language models: plan token by token, then fill all planned spans at once."""

from pdiff_runtime import ops, plan, train
from pdiff_runtime.engine import LLM, EngineConfig, GenerationParams, RequestOutput
from pdiff_runtime.models import Decoder, load_model
from pdiff_runtime.plan import ControlTokens, SpanLayout

__all__ = [
    "LLM",
    "ControlTokens",
    "Decoder",
    "EngineConfig",
    "GenerationParams",
    "RequestOutput",
    "SpanLayout",
    "load_model",
    "ops",
    "plan",
    "train",
]
