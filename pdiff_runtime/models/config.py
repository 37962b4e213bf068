"""The shape of a decoder, read from a Hugging Face ``config.json`` with an allow-list of fields."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MODEL_TYPES = {"qwen2": True, "Dream": True, "dream": True, "llama": False}
"""Supported ``model_type`` values and whether q, k and v carry a bias when the config is silent."""

_REQUIRED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
             "intermediate_size")  # fmt: skip


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
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads_q: int
    num_heads_kv: int
    head_dim: int
    intermediate_size: int
    rope_theta: float = 10000.0
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
        for field in ("vocab_size", "hidden_size", "num_layers", "num_heads_q", "num_heads_kv",
                      "head_dim", "intermediate_size", "max_position", "length_unit"):  # fmt: skip
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{field}: expected an integer >= 1, got {value!r}")
        if self.num_heads_q % self.num_heads_kv:
            raise ValueError(
                f"num_heads_q: expected a multiple of num_heads_kv={self.num_heads_kv}, "
                f"got {self.num_heads_q}"
            )
        if self.logits_shift not in (0, 1):
            raise ValueError(f"logits_shift: expected 0 or 1, got {self.logits_shift!r}")
        if self.head_dim % 2 or self.head_dim > 256:
            raise ValueError(f"head_dim: expected an even number up to 256, got {self.head_dim}")

    @classmethod
    def from_hf(cls, fields: Mapping[str, Any]) -> ModelConfig:
        """Read the fields of a Hugging Face config of the Qwen2, Dream or Llama family.

        Raises:
            ValueError: An unsupported family, a missing field, remote code, or a rope variant that
                this decoder does not compute.
        """
        if "auto_map" in fields and fields.get("model_type") not in MODEL_TYPES:
            raise ValueError("config.json: auto_map asks for remote code, which is never run")
        model_type = fields.get("model_type")
        if model_type not in MODEL_TYPES:
            raise ValueError(
                f"model_type: expected one of {sorted(MODEL_TYPES)}, got {model_type!r}"
            )
        missing = [name for name in _REQUIRED if name not in fields]
        if missing:
            raise ValueError(f"config.json: missing {', '.join(missing)}")
        rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type != "default":
            raise ValueError(f"rope_scaling: expected type 'default', got {rope_type!r}")
        if fields.get("use_sliding_window"):
            raise ValueError("use_sliding_window: expected false, got true")
        if fields.get("hidden_act", "silu") != "silu":
            raise ValueError(f"hidden_act: expected 'silu', got {fields['hidden_act']!r}")
        heads = fields["num_attention_heads"]
        return cls(
            vocab_size=fields["vocab_size"],
            hidden_size=fields["hidden_size"],
            num_layers=fields["num_hidden_layers"],
            num_heads_q=heads,
            num_heads_kv=fields.get("num_key_value_heads") or heads,
            head_dim=fields.get("head_dim") or fields["hidden_size"] // heads,
            intermediate_size=fields["intermediate_size"],
            rope_theta=float(fields.get("rope_theta", rope.get("rope_theta", 10000.0))),
            rms_norm_eps=float(fields.get("rms_norm_eps", 1e-6)),
            qkv_bias=bool(fields.get("attention_bias", MODEL_TYPES[model_type])),
            tie_word_embeddings=bool(fields.get("tie_word_embeddings", False)),
            max_position=fields.get("max_position_embeddings", 2048),
            length_unit=fields.get("length_unit", 10),
            full_attention=fields.get("full_attention", model_type in ("Dream", "dream")),
            model_type=model_type,
        )

    @classmethod
    def from_file(cls, path: Path) -> ModelConfig:
        """Read ``config.json`` at ``path``."""
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: not valid JSON ({error})") from error
        if not isinstance(fields, dict):
            raise ValueError(f"{path}: expected a JSON object, got {type(fields).__name__}")
        return cls.from_hf(fields)

    def to_hf(self) -> dict[str, Any]:
        """The inverse of :meth:`from_hf`."""
        return {
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads_q,
            "num_key_value_heads": self.num_heads_kv,
            "head_dim": self.head_dim,
            "intermediate_size": self.intermediate_size,
            "rope_theta": self.rope_theta,
            "rms_norm_eps": self.rms_norm_eps,
            "attention_bias": self.qkv_bias,
            "tie_word_embeddings": self.tie_word_embeddings,
            "max_position_embeddings": self.max_position,
            "length_unit": self.length_unit,
            "hidden_act": "silu",
        }
