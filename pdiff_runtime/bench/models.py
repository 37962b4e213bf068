"""What benches of whole answers run: decoders with random weights, and prompts for them.

The decoders write a plan by themselves. What a row holds is mostly its own token's embedding, so a
row of the head that resembles it makes one token follow another: :data:`PROMPT_END` starts topics
of two words and a number, and each is followed by the next until the engine's ``max_topics`` closes
the plan.
"""

from __future__ import annotations

import itertools

import torch

from pdiff_runtime.models import Decoder, ModelConfig
from pdiff_runtime.plan import ControlTokens

TAGS = ControlTokens(
    topic_start=600, topic_end=601, async_start=602, async_end=603, sync=604, mask=605, pad=606,
    eos=607, digits=tuple(range(15, 25)),
)  # fmt: skip
PROMPT_END, WORDS = 100, (200, 201)

MODELS = {
    "34M": ModelConfig(
        vocab_size=8192, hidden_size=512, num_layers=8, num_heads_q=8, num_heads_kv=4,
        head_dim=64, intermediate_size=1536,
    ),
    "135M": ModelConfig(
        vocab_size=49_152, hidden_size=576, num_layers=30, num_heads_q=9, num_heads_kv=3,
        head_dim=64, intermediate_size=1536, rope_theta=1e5, tie_word_embeddings=True,
    ),
}  # fmt: skip
"""The shape that the published code was timed with, and that of SmolLM2-135M."""


def planning_model(
    config: ModelConfig,
    *,
    number: int,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
) -> Decoder:
    """Random weights; every topic announces ``number`` (one digit) length units."""
    with torch.device("meta"):
        model = Decoder(config).to(dtype)
    model = model.to_empty(device=device).eval().requires_grad_(False)
    if config.tie_word_embeddings:
        # What follows what is written into the head, which must not change the embedding.
        model.lm_head.weight = torch.nn.Parameter(
            torch.empty_like(model.lm_head.weight), requires_grad=False
        )
    model.reset_rope(device)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            std = 1.0 if "embed_tokens" in name else 0.02
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                std /= (2 * config.num_layers) ** 0.5
            parameter.normal_(0.0, std, generator=generator)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
    follows = [
        PROMPT_END, TAGS.topic_start, *WORDS, TAGS.digits[number], TAGS.topic_end, TAGS.topic_start,
    ]  # fmt: skip
    strength = 8.0 / config.hidden_size**0.5  # against noise of 0.02 * sqrt(hidden_size)
    for before, after in itertools.pairwise(follows):
        head[after] += strength * embedding[before]
    head[TAGS.eos] += 0.5 * strength * embedding[TAGS.topic_end]
    return model


def random_prompt(num_tokens: int, seed: int) -> list[int]:
    """Text ids, the last of which starts a plan."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(300, 500, (num_tokens - 1,), generator=generator)
    return [*text.tolist(), PROMPT_END]
