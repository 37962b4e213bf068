"""The shape of a decoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pdiff_runtime.models import hf_config
from pdiff_runtime.models.files import read_json
from pdiff_runtime.models.rope import Llama3Scaling

# Beyond any decoder of a few hundred billion parameters. What a config asks for beyond that is no
# model, and is refused before anything is allocated.
_LARGEST: Mapping[str, int] = {
    "vocab_size": 1 << 22,
    "hidden_size": 1 << 16,
    "num_layers": 1 << 10,
    "num_heads_q": 1 << 10,
    "num_heads_kv": 1 << 10,
    "head_dim": 256,
    "intermediate_size": 1 << 19,
    "max_position": 1 << 20,
    "length_unit": 1 << 10,
}
_BOOLEANS = ("qkv_bias", "tie_word_embeddings", "full_attention", "qk_norm")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder with RMSNorm, rotary positions, grouped-query attention and SwiGLU.

    Attributes:
        length_unit: How many tokens one unit of a topic's NUMBER announces (10 in the published
            models, 4 in the bundled one).
        full_attention: Whether prompt and answer see each other both ways where an answer is one
            span, as Dream and LLaDA were trained.
        logits_shift: Row p of the logits predicts position ``p + logits_shift``: 1, or 0 for LLaDA.
        qk_norm: Whether each head of q and k is normalised before the rotary embedding (Qwen3).

    Raises:
        ValueError: A field out of its range, or two that do not go together.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads_q: int
    num_heads_kv: int
    head_dim: int
    intermediate_size: int
    rope_theta: float = 10000.0
    rope_scaling: Llama3Scaling | None = None
    rms_norm_eps: float = 1e-6
    qkv_bias: bool = False
    tie_word_embeddings: bool = False
    max_position: int = 2048
    length_unit: int = 10
    full_attention: bool = False
    logits_shift: int = 1
    qk_norm: bool = False
    model_type: str = "llama"

    def __post_init__(self) -> None:
        for field, largest in _LARGEST.items():
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= largest:
                raise ValueError(
                    f"{field}: expected an integer from 1 to {largest}, "
                    f"got {hf_config.shown(value)}"
                )
        for field in _BOOLEANS:
            if not isinstance(getattr(self, field), bool):
                raise ValueError(
                    f"{field}: expected true or false, got {hf_config.shown(getattr(self, field))}"
                )
        for field in ("rope_theta", "rms_norm_eps"):
            value = getattr(self, field)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not 0 < value <= 1e12:
                raise ValueError(f"{field}: expected a number > 0, got {hf_config.shown(value)}")
            object.__setattr__(self, field, float(value))
        if self.num_heads_q % self.num_heads_kv:
            raise ValueError(
                f"num_heads_q: expected a multiple of num_heads_kv={self.num_heads_kv}, "
                f"got {self.num_heads_q}"
            )
        if self.logits_shift not in (0, 1):
            raise ValueError(f"logits_shift: expected 0 or 1, got {self.logits_shift!r}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim: expected an even number up to 256, got {self.head_dim}")

    @classmethod
    def from_hf(cls, fields: Mapping[str, Any]) -> ModelConfig:
        """Read the fields of a Hugging Face config: Llama, Qwen2, Qwen3, Dream or LLaDA.

        Dream's and LLaDA's ``auto_map`` is ignored, since we compute both ourselves and neither
        fetch nor run the code it names. Our own keys "length_unit" and "full_attention" are
        optional.

        Raises:
            ValueError: An unsupported family, a missing field, a size beyond reason, a key that
                asks for code, or one for what this decoder does not compute.
        """
        return cls(**hf_config.parse(fields))

    @classmethod
    def from_file(cls, path: Path) -> ModelConfig:
        """Read ``config.json`` at ``path``."""
        return cls.from_hf(read_json(path))

    def to_hf(self) -> dict[str, Any]:
        """The inverse of :meth:`from_hf`.

        Raises:
            ValueError: The family of ``model_type`` has no config that says this, e.g. a Llama with
                ``qk_norm``.
        """
        fields = hf_config.write(dataclasses.asdict(self))
        said = ModelConfig.from_hf(fields)
        for field in dataclasses.fields(self):
            ours, theirs = getattr(self, field.name), getattr(said, field.name)
            if ours != theirs:
                raise ValueError(
                    f"{field.name}: a config.json of model_type {self.model_type!r} can only say "
                    f"{theirs!r}, got {ours!r}"
                )
        return fields
