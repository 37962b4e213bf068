"""Compose tagged training documents and held-out questions from the facts.

Everything is drawn from one ``random.Random(seed)`` through its ``random()`` alone, whose stream
is the same in every Python version, so a seed names a data set.

Families:
    sheet    several fields of one country, one topic per field
    context  labels for made-up items whose properties stand in the prompt, one topic per item
    single   one field of one country, one topic: nothing to do in parallel
    coupled  two or three neighbours, under topics that do not tell which: spans may collide
    scope    something the model does not know, one topic that says so
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from . import words
from .facts import FIELDS, Fact, in_sentence, join
from .tokenizer import CONTROL, LENGTH_UNIT, load_tokenizer

T = TypeVar("T")
Split = Literal["train", "eval"]
TokenCount = Callable[[str], int]

# Shares in percent; integers, so that their sum is the same everywhere.
FAMILY_SHARES = {"sheet": 67, "context": 20, "single": 8, "scope": 3, "coupled": 2}
SHEET_SIZE_SHARES = {2: 15, 3: 40, 4: 33, 5: 12}  # by number of fields
HELD_OUT_PERCENT = 8
MAX_SPAN_UNITS = 7

SCOPE_WORDINGS = (
    "I only know country facts and labels.",
    "Sorry, this small model knows country facts and labels only.",
)


@dataclass(frozen=True)
class Part:
    """One topic with its span.

    Attributes:
        topic: Words of the topic, without the number.
        wordings: Texts that are right here.
        text: The wording chosen for the training document.
        entity, field: What the part is about, for scoring.
    """

    topic: str
    wordings: tuple[str, ...]
    text: str
    entity: str
    field: str


@dataclass(frozen=True)
class Question:
    """A prompt with the parts of its answer, not yet tagged."""

    family: str
    prompt: str
    parts: tuple[Part, ...]


# --- held-out rules ----------------------------------------------------------------------------


def _percent(key: str) -> int:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % 100


def is_held_out(entity: str, fields: frozenset[str]) -> bool:
    """Whether no training document asks for exactly these fields of this country, in any order.

    A single field is never held out: without its fact in training there is nothing to recall.
    """
    key = f"{entity}|{','.join(sorted(fields))}"
    return len(fields) > 1 and _percent(key) < HELD_OUT_PERCENT


def is_item_held_out(item: str, colour: str, material: str, city: str) -> bool:
    """Whether no training document labels this item with exactly these properties."""
    return _percent(f"{item}|{colour}|{material}|{city}") < HELD_OUT_PERCENT


def is_name_held_out(name: str) -> bool:
    """Whether this made-up name or out-of-scope request is kept for evaluation."""
    return _percent(name) < HELD_OUT_PERCENT


# --- drawing -----------------------------------------------------------------------------------


def _pick(rng: random.Random, items: Sequence[T]) -> T:
    """Draw one item."""
    return items[int(rng.random() * len(items))]


def _draw(rng: random.Random, items: Sequence[T], count: int) -> list[T]:
    """Draw ``count`` different items in random order."""
    pool = list(items)
    return [pool.pop(int(rng.random() * len(pool))) for _ in range(count)]


def _pick_by_share(rng: random.Random, shares: dict[T, int]) -> T:
    """Draw a key with probability proportional to its share."""
    point = rng.random() * sum(shares.values())
    for item, share in shares.items():
        point -= share
        if point < 0:
            return item
    return item


# --- families ----------------------------------------------------------------------------------


def label_wordings(item: str, colour: str, material: str, city: str) -> tuple[str, str]:
    """Both wordings of an item's label."""
    return (
        f"The {item} is {colour}, made of {material}, from {city}.",
        f"Made in {city}, this {material} {item} is {colour}.",
    )


def neighbour_wordings(neighbour: str) -> tuple[str, str]:
    """Both wordings of a single neighbour."""
    name = in_sentence(neighbour)
    return f"One neighbour is {name}.", f"Next to it is {name}."


class _Composer:
    """Draws questions, one method per family; what a family needs is looked up once."""

    def __init__(self, facts: Sequence[Fact], split: Split):
        self.split = split
        self.by_entity: dict[str, dict[str, Fact]] = {}
        for fact in facts:
            self.by_entity.setdefault(fact.entity, {})[fact.field] = fact
        self.entities = sorted(self.by_entity)
        self.bordering = [e for e in self.entities if self._neighbours(e)]
        self.families = {
            "sheet": self.sheet,
            "context": self.context,
            "single": self.single,
            "coupled": self.coupled,
            "scope": self.scope,
        }

    def _neighbours(self, entity: str) -> tuple[str, ...]:
        fact = self.by_entity[entity].get("neighbours")
        return fact.values if fact and len(fact.values) >= 3 else ()

    def _wants(self, held_out: bool) -> bool:
        return held_out == (self.split == "eval")

    def _part(self, rng: random.Random, fact: Fact) -> Part:
        text = _pick(rng, fact.wordings)
        return Part(fact.field, fact.wordings, text, fact.entity, fact.field)

    def sheet(self, rng: random.Random) -> Question:
        while True:
            entity = _pick(rng, self.entities)
            facts = self.by_entity[entity]
            count = _pick_by_share(rng, SHEET_SIZE_SHARES)
            if count > len(facts):
                continue
            fields = _draw(rng, [f for f in FIELDS if f in facts], count)
            if self._wants(is_held_out(entity, frozenset(fields))):
                break
        place = in_sentence(entity)
        prompt = _pick(rng, (
            f"Tell me about {place}: {join(fields)}.",
            f"Tell me about {place}: {', '.join(fields)}",
            f"{entity}: {', '.join(fields)}.",
            f"What are the {join(fields)} of {place}?",
        ))  # fmt: skip
        return Question("sheet", prompt, tuple(self._part(rng, facts[f]) for f in fields))

    def single(self, rng: random.Random) -> Question:
        entity = _pick(rng, self.entities)
        facts = self.by_entity[entity]
        name = _pick(rng, [f for f in FIELDS if f in facts])
        place = in_sentence(entity)
        verb = "are" if name in ("languages", "neighbours", "exports") else "is"
        prompt = _pick(rng, (
            f"What {verb} the {name} of {place}?",
            f"{name.capitalize()} of {place}?",
            f"{entity}: {name}.",
            f"Tell me about {place}: {name}.",
        ))  # fmt: skip
        return Question("single", prompt, (self._part(rng, facts[name]),))

    def context(self, rng: random.Random) -> Question:
        count = 2 + int(rng.random() * 3)
        rows = []
        for item in _draw(rng, words.ITEMS, count):
            while True:
                colour = _pick(rng, words.COLOURS)
                material = _pick(rng, words.MATERIALS)
                city = _pick(rng, words.CITIES)
                if self._wants(is_item_held_out(item, colour, material, city)):
                    break
            rows.append((item, colour, material, city))
        request = _pick(rng, ("Label these.", "Write labels.", "Make labels."))
        listing = "; ".join(f"{item}: {', '.join(values)}" for item, *values in rows)
        parts = []
        for row in rows:
            item, wordings = row[0], label_wordings(*row)
            parts.append(Part(item, wordings, _pick(rng, wordings), item, "label"))
        return Question("context", f"{request} {listing}.", tuple(parts))

    def coupled(self, rng: random.Random) -> Question:
        entity = _pick(rng, self.bordering)
        neighbours = self._neighbours(entity)
        count = 2 + int(rng.random() * 2)
        place = in_sentence(entity)
        number = {2: "two", 3: "three"}[count]
        prompt = _pick(rng, (
            f"Name {number} neighbours of {place}.",
            f"List {number} countries next to {place}.",
        ))  # fmt: skip
        wordings = {n: neighbour_wordings(n) for n in neighbours}
        accepted = tuple(text for pair in wordings.values() for text in pair)
        parts = []
        for neighbour in _draw(rng, neighbours, count):
            text = _pick(rng, wordings[neighbour])
            parts.append(Part("neighbour", accepted, text, entity, "neighbour"))
        return Question("coupled", prompt, tuple(parts))

    def scope(self, rng: random.Random) -> Question:
        while True:
            if rng.random() < 0.5:
                request = f"{_pick(rng, words.REQUESTS)} {_pick(rng, words.SUBJECTS)}"
                end = "?" if request.startswith(("What", "How")) else "."
                entity, prompt = request, request + end
            else:
                stem = _pick(rng, words.SYLLABLES) + _pick(rng, words.SYLLABLES)
                entity = (stem + _pick(rng, words.ENDINGS)).capitalize()
                fields = _draw(rng, FIELDS, 1 + int(rng.random() * 3))
                prompt = _pick(rng, (
                    f"Tell me about {entity}: {join(fields)}.",
                    f"Tell me about {entity}: {', '.join(fields)}",
                    f"{entity}: {', '.join(fields)}.",
                    f"What is the {fields[0]} of {entity}?",
                ))  # fmt: skip
            if self._wants(is_name_held_out(entity)):
                break
        text = _pick(rng, SCOPE_WORDINGS)
        return Question("scope", prompt, (Part("scope", SCOPE_WORDINGS, text, entity, "scope"),))


# --- documents ---------------------------------------------------------------------------------


def draw_questions(
    facts: Sequence[Fact], *, num_questions: int, seed: int, split: Split
) -> Iterator[Question]:
    """Draw questions of all families by their shares."""
    rng = random.Random(seed)
    composer = _Composer(facts, split)
    for _ in range(num_questions):
        yield composer.families[_pick_by_share(rng, FAMILY_SHARES)](rng)


def length_number(text: str, count_tokens: TokenCount) -> int:
    """Length of a span in units of ``LENGTH_UNIT`` tokens, rounded up.

    Raises:
        ValueError: The text needs more than ``MAX_SPAN_UNITS``.
    """
    number = -(-count_tokens(text) // LENGTH_UNIT)
    if not 1 <= number <= MAX_SPAN_UNITS:
        raise ValueError(f"span: expected 1 to {MAX_SPAN_UNITS} units, got {number} for {text!r}")
    return number


def tagged_text(parts: Sequence[Part], count_tokens: TokenCount) -> str:
    """Write the parts as one round: all topics with their lengths, then all spans."""
    topics, spans = [], []
    for part in parts:
        number = length_number(part.text, count_tokens)
        topics.append(f"{CONTROL['topic_start']}{part.topic}{number}{CONTROL['topic_end']}")
        spans.append(f"{CONTROL['async_start']}{part.text}{CONTROL['async_end']}")
    return "".join([*topics, *spans])


def compose_documents(
    facts: Sequence[Fact],
    *,
    num_documents: int,
    seed: int,
    split: Split = "train",
    count_tokens: TokenCount | None = None,
) -> Iterator[dict[str, str]]:
    """Compose tagged documents.

    Args:
        facts: From ``load_facts``.
        num_documents: How many.
        seed: Same facts, tokenizer and seed give the same documents.
        split: ``"train"`` skips what the held-out rules keep for ``"eval"``.
        count_tokens: Number of tokens of a span's text; the bundled tokenizer by default.

    Yields:
        ``{"prompt", "text", "family"}``; ``text`` is tagged and ends after the last span.
    """
    count = count_tokens or _bundled_count()
    for question in draw_questions(facts, num_questions=num_documents, seed=seed, split=split):
        text = tagged_text(question.parts, count)
        yield {"prompt": question.prompt, "text": text, "family": question.family}


def _bundled_count() -> TokenCount:
    tokenizer = load_tokenizer()
    return lambda text: len(tokenizer.encode(text).ids)


EVAL_COUNTS = {"sheet": 200, "context": 60, "single": 30, "coupled": 20, "scope": 10}


def compose_eval(
    facts: Sequence[Fact], *, seed: int, counts: dict[str, int] | None = None
) -> Iterator[dict[str, Any]]:
    """Compose held-out questions with every accepted wording, without repeated prompts.

    Yields:
        ``{"prompt", "family", "seed", "parts": [{"topic", "entity", "field", "accepted"}]}``.
    """
    rng = random.Random(seed)
    composer = _Composer(facts, "eval")
    seen: set[str] = set()
    for family, count in (counts or EVAL_COUNTS).items():
        done = 0
        while done < count:
            question = composer.families[family](rng)
            if question.prompt in seen:
                continue
            seen.add(question.prompt)
            done += 1
            parts = [
                {
                    "topic": part.topic,
                    "entity": part.entity,
                    "field": part.field,
                    "accepted": list(part.wordings),
                }
                for part in question.parts
            ]
            yield {"prompt": question.prompt, "family": family, "seed": seed, "parts": parts}
