"""The visible text of an answer as it becomes final, in reading order."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pdiff_runtime.plan import ControlTokens
from pdiff_runtime.plan.visible import cut_ids, hidden_ids, spaced

Decode = Callable[[Sequence[int]], str]

_MAX_IN_CHARACTER = 4  # bytes, and so tokens
_MAX_PENDING = 8  # tokens without a whole character, before some are taken for broken


class Reader:
    """Reads tokens one after another and says what a reader sees of them.

    Only a few tokens are decoded at a time, so a long answer costs what its tokens cost once.

    Args:
        tags: Control tokens; what they hide is hidden here as in ``visible_text``.
        decode: Token ids to text.
        stop: Strings that end the text; it is cut before the first of them.

    Attributes:
        text: All visible text so far.
        is_stopped: A stop string was found, and `text` ends before it.
    """

    def __init__(self, tags: ControlTokens, decode: Decode, stop: Sequence[str] = ()) -> None:
        self._tags, self._decode, self._stop = tags, decode, tuple(stop)
        self._cuts, self._hidden = cut_ids(tags), hidden_ids(tags)
        self._inside_topic = False
        self._part: list[int] = []
        self._part_text = 0  # where the part's text starts in `text`
        self._settled, self._read = 0, 0  # tokens of the part with final text, with any text
        self._num_taken = 0
        self.text = ""
        self.is_stopped = False

    def read(self, token_id: int) -> None:
        """Take the next token; nothing happens once the text has stopped."""
        if self.is_stopped:
            return
        if token_id in self._cuts:
            self._end_part()
            self._inside_topic = token_id == self._tags.topic_start
        elif not self._inside_topic and token_id not in self._hidden:
            self._part.append(token_id)
            before, after = self._decoded(self._read), self._decoded(len(self._part))
            if len(after) > len(before) and not after.endswith("\N{REPLACEMENT CHARACTER}"):
                self._settle(len(self._part), after[len(before) :])
            elif len(self._part) - self._read > _MAX_PENDING:
                self._settle_some(before, after)

    def _decoded(self, end: int) -> str:
        return self._decode(self._part[self._settled : end])

    def _settle(self, end: int, text: str) -> None:
        self._settled, self._read = self._read, end
        self._append(text)

    def _settle_some(self, before: str, after: str) -> None:
        """Bytes that are no characters: take those that the next tokens can not complete."""
        for end in range(len(self._part) - _MAX_IN_CHARACTER, self._read, -1):
            text = self._decoded(end)
            if text + self._decode(self._part[end:]) == after:
                self._settle(end, text[len(before) :])
                return
        self._settle(len(self._part), after[len(before) :])

    def finish(self) -> None:
        """No further token comes."""
        if not self.is_stopped:
            self._end_part()

    def take(self, *, is_last: bool = False) -> str:
        """What is new since the last call, less what may become part of a stop string."""
        end = len(self.text)
        if not (is_last or self.is_stopped):
            end -= max((_overlap(self.text, stop) for stop in self._stop), default=0)
        new, self._num_taken = self.text[self._num_taken : end], max(end, self._num_taken)
        return new

    def _end_part(self) -> None:
        """What was held back as half a character is text now."""
        self._append(self._decoded(len(self._part))[len(self._decoded(self._read)) :])
        self._part, self._settled, self._read = [], 0, 0
        self._part_text = len(self.text)

    def _append(self, piece: str) -> None:
        if not piece:
            return
        start = len(self.text)
        self.text += spaced(self.text, piece) if start == self._part_text else piece
        found = [self.text.find(stop, max(0, start - len(stop) + 1)) for stop in self._stop]
        if any(at >= 0 for at in found):
            self.text = self.text[: min(at for at in found if at >= 0)]
            self.is_stopped = True


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a true beginning of ``stop``."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
