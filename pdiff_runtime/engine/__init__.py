"""Requests, and the engine that moves all of them one forward at a time."""

from pdiff_runtime.engine.engine import Engine
from pdiff_runtime.engine.llm import LLM
from pdiff_runtime.engine.output import (
    Event,
    Finished,
    PlanReady,
    RequestOutput,
    Round,
    SpanUpdate,
    Usage,
)
from pdiff_runtime.engine.params import EngineConfig, GenerationParams

__all__ = [
    "LLM",
    "Engine",
    "EngineConfig",
    "Event",
    "Finished",
    "GenerationParams",
    "PlanReady",
    "RequestOutput",
    "Round",
    "SpanUpdate",
    "Usage",
]
