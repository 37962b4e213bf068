"""Planned diffusion language models: plan token by token, then fill all planned spans at once."""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pdiff_runtime import hf, ops, plan, train
    from pdiff_runtime._C import __version__
    from pdiff_runtime.engine import LLM, AsyncEngine, EngineConfig, GenerationParams, RequestOutput
    from pdiff_runtime.hf import register_hf
    from pdiff_runtime.models import Decoder, load_model
    from pdiff_runtime.plan import ControlTokens, SpanLayout

if importlib.util.find_spec(f"{__name__}._C") is None:
    raise ImportError(
        f"pdiff_runtime: {__path__[0]} is source code that is not built; build it in its place "
        "(pip install -e .), or start Python in another folder to import what is installed"
    )

__all__ = [
    "LLM",
    "AsyncEngine",
    "ControlTokens",
    "Decoder",
    "EngineConfig",
    "GenerationParams",
    "RequestOutput",
    "SpanLayout",
    "__version__",
    "hf",
    "load_model",
    "ops",
    "plan",
    "register_hf",
    "train",
]

_HOME_OF = {
    "LLM": "engine",
    "AsyncEngine": "engine",
    "ControlTokens": "plan",
    "Decoder": "models",
    "EngineConfig": "engine",
    "GenerationParams": "engine",
    "RequestOutput": "engine",
    "SpanLayout": "plan",
    "__version__": "_C",
    "load_model": "models",
    "register_hf": "hf",
}


def __getattr__(name: str) -> Any:
    """Import on first use: the command line answers ``--help`` without waiting for torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_HOME_OF.get(name, name)}")
    value = getattr(module, name) if name in _HOME_OF else module
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
