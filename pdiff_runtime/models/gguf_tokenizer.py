"""The tokenizer that the metadata of a GGUF file describe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import AddedToken

from pdiff_runtime.models.byte_level_bpe import byte_level_bpe, pairs_of

_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5  # of tokenizer.ggml.token_type
_NAMED = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "pad_token": "padding_token_id",
    "unk_token": "unknown_token_id",
}


def gguf_tokenizer(metadata: Mapping[str, Any]) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """The tokenizer, and what ``tokenizer_config.json`` would say of it.

    Raises:
        ValueError: Not byte-level BPE, or lists that do not fit together.
    """
    model = metadata.get("tokenizer.ggml.model")
    if model != "gpt2":
        raise ValueError(f"tokenizer.ggml.model: expected 'gpt2', byte-level BPE, got {model!r}")
    tokens, merges = _texts(metadata, "tokens"), _texts(metadata, "merges")
    kinds = metadata.get("tokenizer.ggml.token_type", [1] * len(tokens))
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    if not isinstance(kinds, list) or len(kinds) != len(tokens) or len(vocab) != len(tokens):
        raise ValueError("tokenizer.ggml.tokens: expected a type for each, and none of them twice")
    added = {
        token_id: AddedToken(token, special=kind != _USER_DEFINED, normalized=False)
        for token_id, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (_CONTROL, _USER_DEFINED, _UNUSED)
    }
    style = metadata.get("tokenizer.ggml.pre", "gpt-2")
    backend = byte_level_bpe(vocab, pairs_of(merges), added, style=style)
    config = {"chat_template": metadata.get("tokenizer.chat_template")}
    for name, key in _NAMED.items():
        token_id = metadata.get(f"tokenizer.ggml.{key}")
        if isinstance(token_id, int) and 0 <= token_id < len(tokens):
            config[name] = tokens[token_id]
    return backend, config


def _texts(metadata: Mapping[str, Any], name: str) -> list[str]:
    texts = metadata.get(f"tokenizer.ggml.{name}")
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"tokenizer.ggml.{name}: expected a list of texts")
    return texts
