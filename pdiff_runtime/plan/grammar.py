"""The grammar of plans as a state machine: which token a model may write next.

``reply := (text | topic)* (sync | eos)``, again after each sync, and sync only after a topic.
``topic := topic_start text+ number topic_end``. A number is 1 to 99 in single-digit tokens right
before ``topic_end``; all other digits are text.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Iterable
from typing import Any, Literal, Self

import torch
from torch import Tensor

from pdiff_runtime.ops import structures
from pdiff_runtime.plan.control_tokens import ControlTokens

# The numbers of csrc/include/pdiff/plan_grammar.h; classes 0 to 9 are the digits.
_TEXT, _TOPIC_START, _TOPIC_END, _SYNC, _EOS, _BANNED = range(10, 16)
_CLASS_NAMES = {
    _TEXT: "text",
    _TOPIC_START: "topic_start",
    _TOPIC_END: "topic_end",
    _SYNC: "sync",
    _EOS: "eos",
    _BANNED: "a banned token",
}
_FINISH: tuple[None, Literal["sync"], Literal["eos"]] = (None, "sync", "eos")


@dataclasses.dataclass(frozen=True)
class Topic:
    """A closed topic.

    Attributes:
        token_ids: The topic's words, without tags and number.
        number: Announced length in the model's length unit, 1 to 99.
    """

    token_ids: tuple[int, ...]
    number: int


class PlanGrammar:
    """The grammar over one vocabulary; :meth:`start` begins a plan.

    Args:
        tags: Ids of the control tokens.
        vocab_size: Width of the masks. Ids that are no control tokens, digits or banned are text.
        max_topic_tokens: Most tokens between a topic's tags, number included; at least 2.
        max_topics: Most topics in a round; 0 leaves plain text.
        banned_ids: Further ids that no plan may contain, such as other special tokens.

    Raises:
        ValueError: A cap or an id is out of range, or a tag that plans need is banned.
    """

    def __init__(
        self,
        tags: ControlTokens,
        vocab_size: int,
        *,
        max_topic_tokens: int = 64,
        max_topics: int = 32,
        banned_ids: Iterable[int] = (),
    ) -> None:
        self.tags = tags
        self.vocab_size = vocab_size
        self.max_topic_tokens = max_topic_tokens
        self.max_topics = max_topics
        never = (tags.async_start, tags.async_end, tags.mask, tags.pad)
        self._class_of = dict.fromkeys(never, _BANNED) | {
            tags.topic_start: _TOPIC_START,
            tags.topic_end: _TOPIC_END,
            tags.sync: _SYNC,
            tags.eos: _EOS,
            **{token_id: digit for digit, token_id in enumerate(tags.digits)},
        }
        for token_id in banned_ids:
            if self._class_of.setdefault(token_id, _BANNED) != _BANNED:
                raise ValueError(
                    f"banned_ids: expected no id that plans need, got {token_id} "
                    f"({_class_name(self._class_of[token_id])})"
                )
        ids = self._class_of.keys()
        if min(ids) < 0 or max(ids) >= vocab_size:
            raise ValueError(
                f"vocab_size: expected all ids from 0 to {vocab_size - 1}, "
                f"got {min(ids)} to {max(ids)}"
            )
        self.start(1)  # the core checks the caps

    @functools.cached_property
    def masks(self) -> Tensor:
        """``[num_masks, vocab_size]`` bool: the legal tokens by :attr:`PlanState.mask_idx`."""
        classes = torch.full((self.vocab_size,), _TEXT, device="cpu")
        for token_id, token_class in self._class_of.items():
            classes[token_id] = token_class
        return torch.from_numpy(structures.plan_mask_table())[:, classes]

    def start(self, budget: int) -> PlanState:
        """A plan of at most ``budget`` tokens, its closing sync or eos included; at least 1.

        Raises:
            ValueError: ``budget`` is below 1.
        """
        core = structures.PlanState(self.max_topic_tokens, self.max_topics, budget)
        return PlanState(self, core)

    def token_class(self, token_id: int) -> int:
        """The class number of a token.

        Raises:
            ValueError: ``token_id`` is outside the vocabulary.
        """
        if not 0 <= token_id < self.vocab_size:
            raise ValueError(f"token_id: expected 0 to {self.vocab_size - 1}, got {token_id}")
        return self._class_of.get(token_id, _TEXT)


class PlanState:
    """Where a plan stands. Copies (``copy.copy``) go on independently.

    A token is legal only if what must still follow it fits: the rest of its topic within
    ``max_topic_tokens``, and that and a closing sync or eos within the budget. So at a cap or at
    the end of the budget only the tokens that close are left, and the budget is never exceeded. A
    sync ends the round; where budget is left, the next round may follow.
    """

    __slots__ = ("_core", "_grammar", "_open", "_topics")

    def __init__(self, grammar: PlanGrammar, core: structures.PlanState) -> None:
        self._grammar = grammar
        self._core = core
        self._topics: list[Topic] = []
        self._open: list[int] = []

    def advance(self, token_id: int) -> None:
        """Take the next token.

        Raises:
            ValueError: The token is not legal here; the state stays as it was.
        """
        token_class = self._grammar.token_class(token_id)
        core = self._core
        number, is_new_round = core.number, core.finish != 0
        if not core.advance(token_class):
            raise ValueError(
                f"token_id: expected {self._legal()} {self._where()}, "
                f"got {token_id} ({_class_name(token_class)})"
            )
        if is_new_round:
            self._topics = []
        if token_class == _TOPIC_END:
            num_digits = 1 if number < 10 else 2
            self._topics.append(Topic(tuple(self._open[:-num_digits]), number))
            self._open = []
        elif core.num_topic_tokens > 0:
            self._open.append(token_id)

    @property
    def mask_idx(self) -> int:
        """Row of :attr:`PlanGrammar.masks` with the tokens that are legal now."""
        return self._core.mask_idx

    def allowed_mask(self) -> Tensor:
        """``[vocab_size]`` bool, a view into :attr:`PlanGrammar.masks`."""
        return self._grammar.masks[self.mask_idx]

    @property
    def is_finished(self) -> Literal["sync", "eos"] | None:
        """What the plan or its round just ended with."""
        return _FINISH[self._core.finish]

    @property
    def is_in_topic(self) -> bool:
        """Whether a topic is open."""
        return self._core.num_topic_tokens >= 0

    @property
    def budget(self) -> int:
        """Tokens that may still come, the closing one included."""
        return self._core.budget

    @property
    def topics(self) -> list[Topic]:
        """The closed topics of this round, until the next round's first token."""
        return list(self._topics)

    def __copy__(self) -> Self:
        other = type(self)(self._grammar, copy.copy(self._core))
        other._topics, other._open = list(self._topics), list(self._open)
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return copy.copy(self)

    def __repr__(self) -> str:
        return f"PlanState({self._where()}, {len(self._topics)} topics, budget {self.budget})"

    def _legal(self) -> str:
        legal = structures.plan_mask_table()[self.mask_idx]
        digits = [d for d in range(10) if legal[d]]
        names = [name for token_class, name in _CLASS_NAMES.items() if legal[token_class]]
        if digits and not legal[_TEXT]:
            names.insert(0, f"a digit {digits[0]} to {digits[-1]}")
        return " or ".join(names) or "nothing more"

    def _where(self) -> str:
        if self.is_in_topic:
            return f"inside topic {len(self._topics) + 1} after {len(self._open)} tokens"
        return f"after {self.is_finished}" if self.is_finished else "outside a topic"


def _class_name(token_class: int) -> str:
    return _CLASS_NAMES.get(token_class, f"digit {token_class}")
