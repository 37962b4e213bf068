"""The text a reader sees: no plan, no tags, no pads."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from pdiff_runtime.plan.control_tokens import ControlTokens


def cut_ids(tags: ControlTokens) -> frozenset[int]:
    """Tags at which the visible text falls into parts."""
    return frozenset(
        (tags.async_start, tags.async_end, tags.sync, tags.topic_start, tags.topic_end)
    )


def hidden_ids(tags: ControlTokens) -> frozenset[int]:
    """Tokens within a part that no reader sees."""
    return frozenset((tags.pad, tags.mask, tags.eos))


def visible_parts(token_ids: Sequence[int], tags: ControlTokens) -> list[list[int]]:
    """Visible token ids in reading order, cut at tags; no part is empty.

    A topic hides its words; spans and the text around them stay apart from one another.
    """
    parts: list[list[int]] = [[]]
    inside_topic = False
    cuts, hidden = cut_ids(tags), hidden_ids(tags)
    for token_id in token_ids:
        if token_id in cuts:
            inside_topic = token_id == tags.topic_start
            parts.append([])
        elif not inside_topic and token_id not in hidden:
            parts[-1].append(token_id)
    return [part for part in parts if part]


def visible_text(
    token_ids: Sequence[int], tags: ControlTokens, decode: Callable[[Sequence[int]], str]
) -> str:
    """The visible parts as one text, a space between two that have none of their own."""
    text = ""
    for part in visible_parts(token_ids, tags):
        text += spaced(text, decode(part))
    return text


def spaced(text: str, piece: str) -> str:
    """The first piece of a part as it goes behind the parts before it."""
    needs_space = text and piece and not text[-1].isspace() and not piece[0].isspace()
    return " " + piece if needs_space else piece


_PUBLISHED_TAGS = re.compile(r"<promise>.*?</topic>|</?async>|<sync/>|\[PAD\]")
_PUBLISHED_STOPS = re.compile(r"<\|(?:im_end|endoftext)\|>")


def published_text(text: str) -> str:
    """What the published evaluation shows of a decoded sequence, for comparisons with it.

    A span that starts with a digit starts a line. Topics, as far as they stay on one line, and all
    other tags and pads become blanks; runs of blanks and tabs become one, and both ends are
    stripped. Stop tokens go last, so a blank before them stays.
    """
    text = re.sub(r"<async>(?=\d)", "<async>\n", text)
    text = re.sub(r"[ \t]+", " ", _PUBLISHED_TAGS.sub(" ", text)).strip()
    text = re.sub(r"(?<=<\|im_start\|>assistant\n) ", "", text)
    return _PUBLISHED_STOPS.sub("", text)
