"""The ids of the tags with which a model writes its plan, and of the digits that give lengths."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

PUBLISHED_NAMES: Mapping[str, str] = {
    "topic_start": "<promise>-<topic>",
    "topic_end": "</topic>",
    "async_start": "<async>",
    "async_end": "</async>",
    "sync": "<sync/>",
    "mask": "<|mask|>",
    "pad": "[PAD]",
    "eos": "<|im_end|>",
}
"""How the published models spell the tags."""

PLAN_TAGS = ("topic_start", "topic_end", "async_start", "async_end", "sync")
"""Fields of the tags that plans are written in."""

MISSING = -1
"""In place of the id of a tag that a vocabulary lacks."""

# Merging tokenizers merge pairs, or up to three digits, or only at the start of a word.
_DIGIT_PROBES = ("12", "99", "10", "2024", "a 12", "a12")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ControlTokens:
    """Control token ids of one vocabulary.

    A model that writes no plans may lack any tag but eos, whose ids are :data:`MISSING` then, and
    needs no digits.

    Attributes:
        topic_start, topic_end: Tags around a topic of the plan.
        async_start, async_end: Tags around a span.
        sync: From here on all spans before it are visible.
        mask: A token still unknown.
        pad: Filler that training puts at the end of spans.
        eos: End of the reply.
        digits: Ids of the single-digit tokens 0 to 9, in that order.

    Raises:
        ValueError: An id is no int or negative, two are equal, there are not ten digits, or some
            tags of plans are missing and others not.
    """

    topic_start: int
    topic_end: int
    async_start: int
    async_end: int
    sync: int
    mask: int
    pad: int
    eos: int
    digits: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "digits", tuple(self.digits))
        missing = [name for name in PUBLISHED_NAMES if getattr(self, name) == MISSING]
        if missing and ("eos" in missing or not set(missing) >= set(PLAN_TAGS)):
            raise ValueError(f"{missing[0]}: expected an int >= 0, got {MISSING}")
        if len(self.digits) != 10 and (self.has_plan or self.digits):
            raise ValueError(f"digits: expected 10 ids, got {len(self.digits)}")
        owner: dict[int, str] = {}
        for name, token_id in self._named():
            if not isinstance(token_id, int) or isinstance(token_id, bool) or token_id < 0:
                raise ValueError(f"{name}: expected an int >= 0, got {token_id!r}")
            if token_id in owner:
                raise ValueError(
                    f"{name}: expected an id of its own, got {token_id} like {owner[token_id]}"
                )
            owner[token_id] = name

    @property
    def has_plan(self) -> bool:
        """Whether the vocabulary has the tags that plans are written in."""
        return self.sync != MISSING

    @property
    def control_ids(self) -> frozenset[int]:
        """The ids of the tags there are, without the digits: what a prompt must not contain."""
        return frozenset(getattr(self, name) for name in PUBLISHED_NAMES) - {MISSING}

    @property
    def banned_in_span(self) -> tuple[int, ...]:
        """What a denoised token must not be: every tag but pad, which training puts into spans."""
        return tuple(sorted(self.control_ids - {self.pad}))

    def check_fit(self, vocab_size: int) -> None:
        """Check that a model has an embedding for every tag and digit.

        Raises:
            ValueError: It has not; the message lists all that it lacks.
        """
        beyond = [
            f"{name}={token_id}" for name, token_id in self._named() if token_id >= vocab_size
        ]
        if beyond:
            raise ValueError(
                f"tags: expected ids below the model's vocab_size={vocab_size}, got "
                f"{', '.join(beyond)}"
            )

    def _named(self) -> list[tuple[str, int]]:
        """Every tag and digit there is."""
        tags = [(name, getattr(self, name)) for name in PUBLISHED_NAMES]
        tags = [(name, token_id) for name, token_id in tags if token_id != MISSING]
        return tags + [(f"digits[{digit}]", token_id) for digit, token_id in enumerate(self.digits)]

    @classmethod
    def from_tokenizer(
        cls, tokenizer: Any, *, names: Mapping[str, str] | None = None, needs_plan: bool = True
    ) -> Self:
        """Look the ids up in a tokenizer.

        Args:
            tokenizer: A ``tokenizers.Tokenizer``, a Hugging Face tokenizer, or any object with
                ``token_to_id(str) -> int | None`` and ``encode(str) -> ids``.
            names: Tag spellings that differ from :data:`PUBLISHED_NAMES`, by field name.
            needs_plan: False accepts a vocabulary that has none of the tags of plans; pad and mask
                may be missing then too, and digits are not looked up.

        Raises:
            ValueError: An unknown field in ``names``; tags that the vocabulary lacks or splits (all
                of them in one message); a tokenizer that does not encode digits one by one.
        """
        if unknown := set(names or ()) - set(PUBLISHED_NAMES):
            raise ValueError(
                f"names: expected fields among {sorted(PUBLISHED_NAMES)}, got {sorted(unknown)}"
            )
        spelling = {**PUBLISHED_NAMES, **(names or {})}
        token_to_id, encode = _token_to_id(tokenizer), _encode(tokenizer)
        title = _title(tokenizer)

        known = {field: token_to_id(name) for field, name in spelling.items()}
        has_plan = needs_plan or any(known[field] is not None for field in PLAN_TAGS)
        ids: dict[str, int] = {}
        problems = []
        for field, name in spelling.items():
            token_id = known[field]
            if token_id is None and not has_plan and field != "eos":
                ids[field] = MISSING
            elif token_id is None:
                problems.append(f"{field} {name!r} is missing")
            elif (pieces := encode(name)) != [token_id]:
                problems.append(f"{field} {name!r} splits into {len(pieces)} tokens {pieces}")
            else:
                ids[field] = token_id
        if problems:
            raise ValueError(
                f"{title}: expected every control tag to be one token, got: {'; '.join(problems)}"
            )
        return cls(**ids, digits=_digit_ids(encode, title) if has_plan else ())


def _digit_ids(encode: Callable[[str], list[int]], title: str) -> tuple[int, ...]:
    pieces = [encode(str(digit)) for digit in range(10)]
    for digit, ids in enumerate(pieces):
        if len(ids) != 1:
            raise ValueError(f"{title}: expected digit '{digit}' to be one token, got {ids}")
    digits = tuple(ids[0] for ids in pieces)
    for probe in _DIGIT_PROBES:
        expected = [digits[int(char)] for char in probe if char.isdigit()]
        got = encode(probe)
        if got[-len(expected) :] != expected:
            raise ValueError(
                f"{title}: expected digits to be encoded one by one, got {got} for {probe!r}, "
                f"not ending in {expected}: this tokenizer merges digits"
            )
    return digits


def _token_to_id(tokenizer: Any) -> Callable[[str], int | None]:
    if hasattr(tokenizer, "token_to_id"):
        return tokenizer.token_to_id

    def convert(token: str) -> int | None:
        # Hugging Face answers with the unknown token's id, or None.
        token_id = tokenizer.convert_tokens_to_ids(token)
        is_unknown = token_id == getattr(tokenizer, "unk_token_id", None)
        return None if is_unknown and token != getattr(tokenizer, "unk_token", None) else token_id

    if hasattr(tokenizer, "convert_tokens_to_ids"):
        return convert
    raise ValueError(
        "tokenizer: expected token_to_id or convert_tokens_to_ids, got "
        f"{type(tokenizer).__name__} with neither"
    )


def _encode(tokenizer: Any) -> Callable[[str], list[int]]:
    def encode(text: str) -> list[int]:
        try:
            encoding = tokenizer.encode(text, add_special_tokens=False)
        except TypeError:  # an encode that takes the text alone
            encoding = tokenizer.encode(text)
        ids: Sequence[int] = getattr(encoding, "ids", encoding)
        return list(ids)

    return encode


def _title(tokenizer: Any) -> str:
    name = getattr(tokenizer, "name_or_path", None) or type(tokenizer).__name__
    return f"tokenizer {name}"
