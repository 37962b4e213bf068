"""What checkpoints call the decoder's parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

_PARTS = (
    "input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
    "self_attn.o_proj", "self_attn.q_norm", "self_attn.k_norm", "post_attention_layernorm",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TensorNames:
    """One way to name the parameters.

    Attributes:
        embedding, norm, head: Around the layers.
        layers: Before a layer's number.
        parts: Within a layer, by the decoder's own name.
    """

    embedding: str
    norm: str
    head: str
    layers: str
    parts: Mapping[str, str]

    def __call__(self, parameter: str) -> str:
        """The name of a parameter, e.g. ``model.layers.0.self_attn.q_proj.bias``."""
        module, _, kind = parameter.rpartition(".")
        if module.startswith("model.layers."):
            layer_idx, _, part = module.removeprefix("model.layers.").partition(".")
            return f"{self.layers}.{layer_idx}.{self.parts[part]}.{kind}"
        around = {
            "model.embed_tokens": self.embedding, "model.norm": self.norm, "lm_head": self.head
        }  # fmt: skip
        return f"{around[module]}.{kind}"


STANDARD = TensorNames(
    "model.embed_tokens", "model.norm", "lm_head", "model.layers", {part: part for part in _PARTS}
)
"""Of Llama, Qwen and Dream, and our own."""

LLADA = TensorNames(
    "model.transformer.wte", "model.transformer.ln_f", "model.transformer.ff_out",
    "model.transformer.blocks",
    dict(zip(_PARTS, ("attn_norm", "q_proj", "k_proj", "v_proj", "attn_out", "q_norm", "k_norm",
                      "ff_norm", "ff_proj", "up_proj", "ff_out"), strict=True)),
)  # fmt: skip

GGUF = TensorNames(
    "token_embd", "output_norm", "output", "blk",
    dict(zip(_PARTS, ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "attn_q_norm",
                      "attn_k_norm", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down"), strict=True)),
)  # fmt: skip


def names_of(model_type: str) -> TensorNames:
    """How the safetensors of a family name the parameters."""
    return LLADA if model_type == "llada" else STANDARD
