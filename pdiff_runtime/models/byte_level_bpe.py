"""A byte-level BPE tokenizer from a vocabulary and merges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import tokenizers
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers

from pdiff_runtime.models.tokenizer_backend import library_errors

_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DIGIT_BY_DIGIT, _UP_TO_THREE_DIGITS = "", "{1,3}"

STYLES = ("gpt-2", "llama-bpe", "qwen2", "smollm")
"""How text is cut into words before merging, by the name that GGUF files give it."""


def byte_level_bpe(
    vocab: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    added: Mapping[int, AddedToken],
    *,
    style: str,
) -> tokenizers.Tokenizer:
    """Build the tokenizer.

    Args:
        vocab: Ids by token, in the alphabet of byte-level BPE.
        merges: The pairs, first the ones to merge first.
        added: Tokens that are found in a text before it is cut, by id.
        style: One of :data:`STYLES`.

    Raises:
        ValueError: An unknown style, merges that the vocabulary does not hold, or an added token
            whose id is taken or leaves a gap.
    """
    if style not in STYLES:
        raise ValueError(f"tokenizer: expected one of {', '.join(STYLES)}, got {style!r}")
    with library_errors("tokenizer: merges do not fit the vocabulary"):
        model = tokenizers.models.BPE(
            vocab=dict(vocab), merges=list(merges), ignore_merges=style == "llama-bpe"
        )
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = _words(style)
    backend.decoder = decoders.ByteLevel()
    if style == "qwen2":
        backend.normalizer = normalizers.NFC()
    for token_id, token in sorted(added.items()):
        backend.add_tokens([token])
        if backend.token_to_id(token.content) != token_id:
            raise ValueError(
                f"tokenizer: added token {token.content!r}: expected id {token_id}, "
                f"got {backend.token_to_id(token.content)}"
            )
    return backend


def pairs_of(merges: Sequence[object]) -> list[tuple[str, str]]:
    """The pairs in lines such as ``"th e"``.

    Raises:
        ValueError: A line that is no pair.
    """
    pairs = [tuple(line.rstrip().split(" ")) if isinstance(line, str) else () for line in merges]
    for line, pair in zip(merges, pairs, strict=True):
        if len(pair) != 2:
            raise ValueError(f"tokenizer: expected merges of two tokens, got {str(line)[:80]!r}")
    return pairs  # type: ignore[return-value]


def _words(style: str) -> pre_tokenizers.PreTokenizer:
    if style == "gpt-2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if style == "smollm":
        first: pre_tokenizers.PreTokenizer = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([first, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    digits = _UP_TO_THREE_DIGITS if style == "llama-bpe" else _DIGIT_BY_DIGIT
    first = pre_tokenizers.Split(Regex(_SPLIT % digits), "isolated")
    return pre_tokenizers.Sequence(
        [first, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
