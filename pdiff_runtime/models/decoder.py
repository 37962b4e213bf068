"""One decoder for the Llama, Qwen, Dream and LLaDA shapes, over a ragged batch of token rows.

The decoder knows nothing of requests, pages or documents: a batch is a flat list of token rows, and
`attend` mixes them. Training passes :class:`PackedAttention`, the engine its paged counterpart.
`project` applies the matrices, for an engine that wants a row's bits to be its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from pdiff_runtime import ops
from pdiff_runtime.models.config import ModelConfig
from pdiff_runtime.models.rope import rope_table

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""``attend(layer_idx, q, k, v) -> out``: q, out ``[rows, num_heads_q, head_dim]``; k, v
``[rows, num_heads_kv, head_dim]``, before rotary. It applies the rotary embedding itself."""

Project = Callable[[Sequence[nn.Linear], Tensor], Sequence[Tensor]]
"""``project([linear, ...], x)``: what each linear layer makes of ``[rows, in_features]``; results
may be parts of one tensor, their rows any stride apart."""


def project_at_once(linears: Sequence[nn.Linear], x: Tensor) -> list[Tensor]:
    """All rows in one product per layer: the library picks its kernel by their number."""
    return [linear(x) for linear in linears]


class RMSNorm(nn.Module):
    """``x / rms(x) * weight`` with the mean square in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """``[rows, size]`` -> the same shape and dtype."""
        return ops.rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Projections around `attend`."""

    def __init__(self, config: ModelConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        q_dim, kv_dim = (n * config.head_dim for n in (config.num_heads_q, config.num_heads_kv))
        self.q_proj = nn.Linear(config.hidden_size, q_dim, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_dim, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_dim, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_dim, config.hidden_size, bias=False)
        self.q_norm = self.k_norm = None
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(self, x: Tensor, attend: Attend, project: Project) -> Tensor:
        """``[rows, hidden_size]`` -> ``[rows, hidden_size]``."""
        q, k, v = (
            y.unflatten(-1, (-1, self.head_dim))
            for y in project((self.q_proj, self.k_proj, self.v_proj), x)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = (
                norm(x.reshape(-1, self.head_dim)).view(x.shape)
                for norm, x in ((self.q_norm, q), (self.k_norm, k))
            )
        return project((self.o_proj,), attend(self.layer_idx, q, k, v).flatten(-2))[0]


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, project: Project) -> Tensor:
        """``[rows, hidden_size]`` -> ``[rows, hidden_size]``."""
        gate, up = project((self.gate_proj, self.up_proj), x)
        return project((self.down_proj,), ops.swiglu(gate, up))[0]


class DecoderLayer(nn.Module):
    """Attention and MLP, each behind a norm and a residual."""

    def __init__(self, config: ModelConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer_idx)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, attend: Attend, project: Project) -> Tensor:
        """``[rows, hidden_size]`` -> ``[rows, hidden_size]``."""
        x = x + self.self_attn(self.input_layernorm(x), attend, project)
        return x + self.mlp(self.post_attention_layernorm(x), project)


class DecoderStack(nn.Module):
    """Embedding, layers, final norm; named as in Hugging Face checkpoints (``model.*``)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Decoder(nn.Module):
    """The whole model; its parameter names are those of a Hugging Face checkpoint."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = DecoderStack(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.reset_rope()

    def reset_rope(self, device: torch.device | str | None = None) -> None:
        """Compute the rotary tables, which checkpoints do not hold.

        Args:
            device: Where they go from the CPU; None makes them on the default device.
        """
        shape = self.config
        cos, sin = rope_table(
            shape.max_position, shape.head_dim, shape.rope_theta, shape.rope_scaling,
            device=None if device is None else "cpu",
        )  # fmt: skip
        self.register_buffer("cos", cos.to(device), persistent=False)
        self.register_buffer("sin", sin.to(device), persistent=False)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        """As ``to`` and its like do it; the rotary tables stay in float32, whatever the dtype."""
        super()._apply(fn, recurse)
        if self.cos.dtype is not torch.float32 and not self.cos.is_meta:
            self.reset_rope(self.cos.device)
        return self

    def forward(
        self, token_ids: Tensor, attend: Attend, project: Project = project_at_once
    ) -> Tensor:
        """Hidden states after the final norm.

        Args:
            token_ids: ``[rows]`` int64.
            attend: Mixes the rows, layer by layer; see :data:`Attend`.
            project: Applies each matrix; see :data:`Project`.

        Returns:
            ``[rows, hidden_size]`` in the weights' dtype (or autocast's).
        """
        x = self.model.embed_tokens(token_ids)
        for layer in self.model.layers:
            x = layer(x, attend, project)
        return self.model.norm(x)

    def logits(self, hidden: Tensor, project: Project = project_at_once) -> Tensor:
        """``[rows, hidden_size]`` -> ``[rows, vocab_size]``; row p predicts position
        ``p + logits_shift``."""
        return project((self.lm_head,), hidden)[0]


def init_weights(model: Decoder, seed: int) -> None:
    """Normal(0, 0.02) weights, residual projections scaled by 1 / sqrt(2 * num_layers)."""
    generator = torch.Generator().manual_seed(seed)
    residual_std = 0.02 / (2 * model.config.num_layers) ** 0.5
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                is_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                parameter.normal_(0.0, residual_std if is_residual else 0.02, generator=generator)
            elif name.endswith("bias"):
                parameter.zero_()
