"""The facts of the atlas, and the wordings in which they are told.

A fact is one field of one country in two or three wordings. The wordings of a field are fixed
templates around the same value; each names its field, so that a span can be read alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

FIELDS = ("capital", "currency", "languages", "climate", "size", "neighbours", "exports")


# Countries that take an article inside a sentence.
WITH_ARTICLE = frozenset({
    "Bahamas", "Central African Republic", "Comoros", "DR Congo", "Dominican Republic", "Gambia",
    "Maldives", "Marshall Islands", "Netherlands", "Philippines", "Seychelles",
    "Solomon Islands", "United Arab Emirates", "United Kingdom", "United States",
})  # fmt: skip


@dataclass(frozen=True)
class Fact:
    """One field of one entity.

    Attributes:
        family: Kind of document the fact serves; ``"sheet"`` for a country's fields.
        entity: Country, in its one spelling.
        field: One of ``FIELDS``.
        values: The parts of the value, e.g. the neighbours one by one.
        wordings: Two or three texts that all say the same.
        source: Package and version that the value comes from.
    """

    family: str
    entity: str
    field: str
    values: tuple[str, ...]
    wordings: tuple[str, ...]
    source: str


def load_facts(path: Path) -> list[Fact]:
    """Read a facts file (one JSON object per line)."""
    facts = []
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        record["values"] = tuple(record["values"])
        record["wordings"] = tuple(record["wordings"])
        facts.append(Fact(**record))
    return facts


def save_facts(facts: Iterable[Fact], path: Path) -> None:
    """Write a facts file (one JSON object per line)."""
    lines = [json.dumps(asdict(fact), ensure_ascii=True) for fact in facts]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def in_sentence(entity: str) -> str:
    """Return a country's name as it stands inside a sentence."""
    return f"the {entity}" if entity in WITH_ARTICLE else entity


def join(values: Iterable[str]) -> str:
    """Join as in prose: ``a``, ``a and b``, ``a, b and c``."""
    items = list(values)
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


# --- wordings ----------------------------------------------------------------------------------


def wordings_of(field: str, values: tuple[str, ...]) -> tuple[str, ...]:
    """Two or three texts that say the same; no two begin with the same word."""
    if field == "capital":
        (name,) = values
        return (
            f"The capital is {name}.",
            f"Its capital city is {name}.",
            f"{name} is the capital city.",
        )
    if field == "currency":
        (name,) = values
        return (
            f"People pay with the {name}.",
            f"Its currency is the {name}.",
            f"The {name} is the currency.",
        )
    if field == "languages":
        noun = "language is" if len(values) == 1 else "languages are"
        verb = "is the official language" if len(values) == 1 else "are the official languages"
        return (
            f"The official {noun} {join(values)}.",
            f"Officially they speak {join(values)}.",
            f"{join(values)} {verb}.",
        )
    if field == "climate":
        (text,) = values
        return (f"The climate is {text}.", f"Its weather is {text}.")
    if field == "size":
        (text,) = values
        return (f"In area it is {text}.", f"The country is {text}.")
    if field == "neighbours":
        if values == ("",):
            return ("It has no land borders.", "No country borders it.")
        names = join(in_sentence(name) for name in values)
        if len(values) == 1:
            return (
                f"It borders {names}.",
                f"Its neighbour is {names}.",
                f"Around it lies {names}.",
            )
        return (f"It borders {names}.", f"Its neighbours are {names}.", f"Around it lie {names}.")
    if field == "exports":
        goods = join(values)
        return (
            f"It mainly exports {goods}.",
            f"Main exports are {goods}.",
            f"Abroad it sells {goods}.",
        )
    raise ValueError(f"field: expected one of {FIELDS}, got {field!r}")
