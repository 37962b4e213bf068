"""Requests, and the engine that moves all of them one forward at a time."""

from pdiff_runtime.engine.async_engine import AsyncEngine, Health
from pdiff_runtime.engine.engine import Engine
from pdiff_runtime.engine.errors import (
    BadLogitsError,
    DuplicateRequestError,
    EngineDeadError,
    GenerationError,
    InvalidPlanError,
    OutOfMemoryError,
    OverloadedError,
    RequestTooLongError,
)
from pdiff_runtime.engine.llm import LLM
from pdiff_runtime.engine.output import (
    Event,
    Finished,
    PlanReady,
    RequestOutput,
    Round,
    SpanDone,
    SpanUpdate,
    Text,
    Usage,
)
from pdiff_runtime.engine.params import EngineConfig, GenerationParams

__all__ = [
    "LLM",
    "AsyncEngine",
    "BadLogitsError",
    "DuplicateRequestError",
    "Engine",
    "EngineConfig",
    "EngineDeadError",
    "Event",
    "Finished",
    "GenerationError",
    "GenerationParams",
    "Health",
    "InvalidPlanError",
    "OutOfMemoryError",
    "OverloadedError",
    "PlanReady",
    "RequestOutput",
    "RequestTooLongError",
    "Round",
    "SpanDone",
    "SpanUpdate",
    "Text",
    "Usage",
]
