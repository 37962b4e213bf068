"""Planned diffusion as its authors run it: eager torch, a dense mask, one request at a time.

Our own rendering of the published algorithm, with its data flow: an additive mask of the whole
sequence, keys cached before rotary, rotary and the repetition of key heads redone over the whole
cache in each forward, logits of all forwarded rows placed into one ``[1, tokens, vocab_size]``
tensor that is cloned and shifted, and a loop over spans. Ordered by entropy, top-k 50 as its
default is; greedy, or sampled with the whole vocabulary sorted for top-p.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pdiff_runtime.denoise import num_unmask
from pdiff_runtime.models.decoder import Attention, Decoder, DecoderLayer, RMSNorm
from pdiff_runtime.plan import ControlTokens

Block = tuple[int, int]
"""Where a span lies, its two tags included."""


class Published:
    """The algorithm over the weights of one of our decoders.

    Args:
        model: The decoder; its device and dtype are those of the run.
        tags: Its control tokens.
        length_unit: Tokens per unit of a topic's number.
        steps_ratio: Steps of a round per token of its longest span.
        top_k: Filter before the softmax; 0 is off.
        temperature, top_p: Of sampling in spans; 0 and 1 are off.
    """

    def __init__(
        self, model: Decoder, tags: ControlTokens, *, length_unit: int = 10,
        steps_ratio: float = 1.0, top_k: int = 50, temperature: float = 0.0, top_p: float = 1.0,
    ) -> None:  # fmt: skip
        self.model, self.tags = model, tags
        self.length_unit, self.steps_ratio, self.top_k = length_unit, steps_ratio, top_k
        self.temperature, self.top_p = temperature, top_p
        self.device = model.cos.device
        self.cache: list[tuple[Tensor, Tensor] | None] = [None] * model.config.num_layers
        self.num_forwards = 0

    @torch.inference_mode()
    def generate(self, prompt_ids: Sequence[int], script: Sequence[int]) -> list[int]:
        """The whole sequence, prompt included.

        Args:
            prompt_ids: Token ids.
            script: What the autoregressive steps pick in place of the likeliest token, sync and eos
                included; every step still runs.
        """
        self.cache, self.num_forwards = [None] * len(self.cache), 0
        x = torch.tensor([prompt_ids], device=self.device)
        picks = iter(script)
        while True:
            x, closing = self._plan(x, picks)
            x = self._denoise(x)
            if closing == self.tags.eos:
                return x[0].tolist()
            x = torch.cat([x, x.new_full((1, 1), self.tags.sync)], dim=1)

    def _plan(self, x: Tensor, picks: Iterator[int]) -> tuple[Tensor, int]:
        """Token by token until sync or eos, which is not appended."""
        while True:
            start = 0 if self.cache[0] is None else self.cache[0][0].shape[2]
            num = x.shape[1]
            allowed = torch.ones(num, num, dtype=torch.bool, device=self.device).tril()
            logits = self._forward(x[:, start:], torch.arange(start, num), allowed[start:], num)
            last = self._filtered(logits[:, -1])
            token = torch.where(last.isfinite(), last, torch.finfo(last.dtype).min).argmax(-1)
            token.fill_(next(picks))
            if int(token) in (self.tags.sync, self.tags.eos):
                return x, int(token)
            x = torch.cat([x, token[None]], dim=1)

    def _denoise(self, x: Tensor) -> Tensor:
        """Spans for the topics since the last sync, filled step by step."""
        context = x.shape[1]
        sizes = self._announced(x[0].tolist())
        for size in sizes:
            span = [self.tags.async_start, *[self.tags.mask] * size, self.tags.async_end]
            x = torch.cat([x, torch.tensor([span], device=self.device)], dim=1)
        num = x.shape[1]
        blocks: list[Block] = []
        for size in sizes:
            lo = blocks[-1][1] if blocks else context
            blocks.append((lo, lo + size + 2))
        allowed = torch.ones(num, num, dtype=torch.bool, device=self.device).tril()
        for lo, hi in blocks:
            allowed[lo:hi] = False
            allowed[lo:hi, :context] = True
            allowed[lo:hi, lo:hi] = True
        self.cache = [
            tuple(F.pad(t, (0, 0, 0, num - t.shape[2])) for t in layer) for layer in self.cache
        ]  # fmt: skip
        num_steps = int(max(sizes) * self.steps_ratio)
        for step_idx in range(num_steps):
            is_masked = x == self.tags.mask
            open_blocks = [(lo, hi) for lo, hi in blocks if is_masked[0, lo:hi].any()]
            if not open_blocks:
                break
            positions = torch.cat([torch.arange(lo, hi) for lo, hi in open_blocks])
            rows = positions.to(self.device)
            active = self._forward(x[:, rows], positions, allowed[rows], num)
            logits = active.new_zeros(1, num, active.shape[-1])
            logits[:, rows] = active
            logits = logits.clone()
            logits = torch.cat([logits[:, :1], logits[:, :-1]], dim=1)
            confidence, candidate = self._scored(logits[is_masked])
            self._write(x, is_masked, blocks, confidence, candidate, step_idx, num_steps)
        return x

    def _write(
        self, x: Tensor, is_masked: Tensor, blocks: list[Block], confidence: Tensor,
        candidate: Tensor, step_idx: int, num_steps: int,
    ) -> None:  # fmt: skip
        """Each span's most certain positions get their tokens."""
        ranks = torch.full(x.shape, -torch.inf, dtype=confidence.dtype, device=self.device)
        ranks[is_masked] = confidence
        tokens = torch.full_like(x, self.tags.mask)
        tokens[is_masked] = candidate
        for lo, hi in blocks:
            quota = num_unmask(int(is_masked[0, lo:hi].sum()), step_idx, num_steps)
            if quota > 0:
                best = lo + ranks[0, lo:hi].topk(quota).indices
                x[0, best] = tokens[0, best]

    def _scored(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        probs = self._filtered(logits).softmax(-1)
        token = probs.argmax(-1)
        if self.temperature > 0:
            token = torch.distributions.Categorical(probs=probs).sample()
        return (probs * torch.log(probs + 1e-10)).sum(-1), token

    def _filtered(self, logits: Tensor) -> Tensor:
        """Temperature, top-p (with the first token above it), top-k."""
        lowest = torch.finfo(logits.dtype).min
        if self.temperature > 0:
            logits = logits / self.temperature
        if self.top_p < 1:
            ordered, ids = torch.sort(logits, descending=True)
            is_out = ordered.softmax(-1).cumsum(-1) > self.top_p
            is_out = torch.cat([torch.zeros_like(is_out[..., :1]), is_out[..., :-1]], dim=-1)
            is_out = torch.zeros_like(is_out).scatter_(-1, ids, is_out)
            logits = logits.masked_fill(is_out, lowest)
        if self.top_k == 0:
            return logits
        least = logits.topk(min(self.top_k, logits.shape[-1])).values[..., -1:]
        return logits.masked_fill(logits < least, lowest)

    def _announced(self, token_ids: list[int]) -> list[int]:
        """Lengths of the spans: the first number of each topic since the last sync."""
        tags, sizes = self.tags, []
        starts = [i for i, token in enumerate(token_ids) if token == tags.sync]
        rest = token_ids[starts[-1] + 1 if starts else 0 :]
        while tags.topic_start in rest:
            rest = rest[rest.index(tags.topic_start) + 1 :]
            topic = rest[: rest.index(tags.topic_end)]
            first = next(i for i, token in enumerate(topic) if token in tags.digits)
            digits = [tags.digits.index(t) for t in topic[first : first + 2] if t in tags.digits]
            sizes.append(int("".join(map(str, digits))) * self.length_unit)
        return sizes

    # -- the model -------------------------------------------------------------------------------

    def _forward(self, tokens: Tensor, positions: Tensor, allowed: Tensor, num: int) -> Tensor:
        """Logits ``[1, rows, vocab_size]``; the rows' keys and values go into the cache.

        Args:
            tokens: ``[1, rows]``.
            positions: ``[rows]`` on the CPU.
            allowed: ``[rows, num]`` bool, the keys each row sees.
            num: Length of the sequence; the cache is at most as long.
        """
        self.num_forwards += 1
        x = self.model.model.embed_tokens(tokens)
        bias = torch.zeros(allowed.shape, dtype=x.dtype, device=self.device)
        bias = bias.masked_fill(~allowed, torch.finfo(x.dtype).min)[None, None]
        angles = self.model.cos[:num], self.model.sin[:num]
        rows = positions.to(self.device)
        for idx, layer in enumerate(self.model.model.layers):
            x = self._layer(idx, layer, x, rows, bias, angles)
        return self.model.lm_head(_norm(self.model.model.norm, x))

    def _layer(
        self, idx: int, layer: DecoderLayer, x: Tensor, rows: Tensor, bias: Tensor,
        angles: tuple[Tensor, Tensor],
    ) -> Tensor:  # fmt: skip
        h = _norm(layer.input_layernorm, x)
        x = x + self._attention(idx, layer.self_attn, h, rows, bias, angles)
        mlp, h = layer.mlp, _norm(layer.post_attention_layernorm, x)
        return x + mlp.down_proj(F.silu(mlp.gate_proj(h)) * mlp.up_proj(h))

    def _attention(
        self, idx: int, attn: Attention, h: Tensor, rows: Tensor, bias: Tensor,
        angles: tuple[Tensor, Tensor],
    ) -> Tensor:  # fmt: skip
        q, k, v = (
            proj(h).unflatten(-1, (-1, attn.head_dim)).transpose(1, 2)
            for proj in (attn.q_proj, attn.k_proj, attn.v_proj)
        )
        kept = self.cache[idx]
        if kept is None:
            kept = k, v
        elif kept[0].shape[2] < bias.shape[-1]:
            kept = tuple(torch.cat(pair, dim=2) for pair in zip(kept, (k, v), strict=True))
        else:
            kept[0][:, :, rows], kept[1][:, :, rows] = k, v
        self.cache[idx] = kept
        cos, sin = (torch.cat([t, t], dim=-1).to(h.dtype) for t in angles)
        keys = _rotate(kept[0], cos, sin)
        q = _rotate(q, cos[rows], sin[rows])
        group_size = q.shape[1] // keys.shape[1]
        keys, values = (t.repeat_interleave(group_size, dim=1) for t in (keys, kept[1]))
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=bias)
        return attn.o_proj(out.transpose(1, 2).flatten(-2))


def _norm(norm: RMSNorm, x: Tensor) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.eps)
    return norm.weight * wide.to(x.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-split rotary of ``[1, heads, tokens, head_dim]``."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
