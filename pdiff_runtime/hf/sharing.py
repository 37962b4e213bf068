"""Our decoder and engine over the parameters of a Hugging Face model, which stay where they are."""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

import torch
from torch import nn

from pdiff_runtime.engine import LLM, EngineConfig
from pdiff_runtime.models import Decoder, ModelConfig, Tokenizer
from pdiff_runtime.plan import ControlTokens

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclasses.dataclass(frozen=True)
class _Key:
    """What an engine was built for.

    Attributes:
        parameters: Their ids, no others' as long as the engine's decoder holds them. What their
            memory is, an engine looks at itself.
        tokenizer: A Hugging Face tokenizer, or None.
    """

    model: ModelConfig
    dtype: torch.dtype
    device: torch.device
    parameters: tuple[int, ...]
    tokenizer: Any
    tags: ControlTokens | None
    engine: EngineConfig


_KEPT: weakref.WeakKeyDictionary[nn.Module, tuple[_Key, LLM]] = weakref.WeakKeyDictionary()
"""The last engine of each model; it goes with the model."""


def llm_of(
    model: Any, tokenizer: Any, tags: ControlTokens | None, engine_config: EngineConfig
) -> LLM:
    """An engine over a model's own parameters, the same one as long as all is as it was.

    Args:
        model: A ``PreTrainedModel`` with a language modelling head.
        tokenizer: A fast Hugging Face tokenizer, or None.
        tags: Control tokens; None takes them from the tokenizer.
        engine_config: Sizes of the engine.

    Raises:
        ValueError: See :func:`share_decoder`; or control tokens are missing.
    """
    weight = next(model.parameters())
    config = ModelConfig.from_hf(model.config.to_dict())
    parameters = tuple(map(id, model.parameters()))
    key = _Key(config, weight.dtype, weight.device, parameters, tokenizer, tags, engine_config)
    kept = _KEPT.get(model)
    if kept is None or kept[0] != key:
        decoder = share_decoder(model, config)
        llm = LLM(decoder, tags=tags, tokenizer=_tokenizer(tokenizer), config=engine_config)
        kept = _KEPT[model] = key, llm
    return kept[1]


def share_decoder(model: Any, config: ModelConfig) -> Decoder:
    """A decoder whose parameters are those of a Hugging Face model, the very objects.

    Raises:
        ValueError: Parameters with other names or shapes than the family has (quantised or with
            adapters, say), of several dtypes or devices, or without memory.
    """
    with torch.device("meta"):
        decoder = Decoder(config)
    parameters = dict(model.named_parameters())
    expected = {name: p.shape for name, p in decoder.named_parameters()}
    found = {name: p.shape for name, p in parameters.items()}
    if expected != found:
        names = sorted(n for n in {*expected, *found} if expected.get(n) != found.get(n))
        raise ValueError(
            f"model: expected the parameters of a plain {config.model_type}, got {len(names)} that "
            f"are missing, unexpected or of another shape, among them {', '.join(names[:4])}"
        )
    kinds = {(p.dtype, p.device) for p in parameters.values()}
    dtype, device = next(iter(kinds))
    if len(kinds) > 1 or dtype not in _DTYPES or device.type == "meta":
        shown = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
        raise ValueError(
            "model: expected bfloat16, float16 or float32 parameters, all on one device, "
            f"got {shown}"
        )
    for name, parameter in parameters.items():
        path, _, leaf = name.rpartition(".")
        setattr(decoder.get_submodule(path), leaf, parameter)
    if config.tie_word_embeddings:
        decoder.lm_head.weight = decoder.model.embed_tokens.weight
    decoder.reset_rope(device)
    return decoder.eval()


def _tokenizer(tokenizer: Any) -> Tokenizer | None:
    """Ours around a copy of its backend."""
    if tokenizer is None:
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            f"pdiff_tokenizer: expected a fast tokenizer, got {type(tokenizer).__name__}"
        )
    pdiff = {"pdiff": tokenizer.init_kwargs.get("pdiff", {})}
    return Tokenizer(backend, {**tokenizer.special_tokens_map, **pdiff})
