"""The decoder, its checkpoints and its tokenizer."""

from pdiff_runtime.models.config import ModelConfig
from pdiff_runtime.models.decoder import Attend, Decoder, init_weights
from pdiff_runtime.models.loading import (
    BUNDLED_MODEL,
    load_model,
    read_config,
    resolve_checkpoint,
    save_model,
)
from pdiff_runtime.models.tokenizer import Tokenizer

__all__ = [
    "BUNDLED_MODEL",
    "Attend",
    "Decoder",
    "ModelConfig",
    "Tokenizer",
    "init_weights",
    "load_model",
    "read_config",
    "resolve_checkpoint",
    "save_model",
]
