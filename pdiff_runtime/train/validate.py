"""Checks of a tagged data file, line by line, before anyone trains on it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path

from pdiff_runtime.plan import ControlTokens, PlanError, Topic, parse_plan
from pdiff_runtime.train.data import DocumentEncoder, TaggedDocument, parse_document
from pdiff_runtime.train.targets import span_bounds


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is wrong with the document on one line, counted from 1."""

    line: int
    message: str


@dataclasses.dataclass
class FamilyStats:
    """Counts over the good documents of one family; tokens are those the model is trained on."""

    num_documents: int = 0
    num_spans: int = 0
    num_tokens: int = 0
    num_span_tokens: int = 0
    num_pad_tokens: int = 0
    longest_document: int = 0


@dataclasses.dataclass
class DataReport:
    """What :func:`validate` found."""

    num_documents: int = 0
    families: dict[str, FamilyStats] = dataclasses.field(default_factory=dict)
    problems: list[Problem] = dataclasses.field(default_factory=list)


def validate(path: str | Path, encoder: DocumentEncoder) -> DataReport:
    """Check every line of a JSONL file; all problems are collected, one per document.

    Raises:
        ValueError: No such file, or one without documents.
    """
    if not Path(path).is_file():
        raise ValueError(f"file: no file {str(path)!r}")
    report = DataReport()
    with open(path, encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            report.num_documents += 1
            try:
                document = parse_document(line)
                check_document(document, encoder)
                _count(report, document, encoder)
            except ValueError as error:
                report.problems.append(Problem(number, str(error)))
    if not report.num_documents:
        raise ValueError(f"file: {path} has no documents")
    return report


def check_document(document: TaggedDocument, encoder: DocumentEncoder) -> None:
    """Whether a document is one round after another, each of topics and then their spans.

    Raises:
        ValueError: The first thing that is wrong.
    """
    tokenizer, tags = encoder.tokenizer, encoder.tags
    tokenizer.encode_prompt(document.prompt)  # not empty, no control tags
    if tokenizer.decode(tokenizer.encode_text(document.prompt)) != document.prompt:
        raise ValueError("prompt: tokens do not decode to the same text")
    token_ids = tokenizer.encode(document.text)
    if tokenizer.decode(token_ids) != document.text:
        raise ValueError("text: tokens do not decode to the same text")
    if not token_ids:
        raise ValueError("text: expected an answer, got none")
    for name in ("mask", "pad", "eos"):
        if getattr(tags, name) in token_ids:
            raise ValueError(f"text: contains the {name} token, which is added where it is needed")
    rounds = _rounds(token_ids, tags)
    for round_idx, (plan, spans) in enumerate(rounds):
        where = f"text: round {round_idx + 1}: " if len(rounds) > 1 else "text: "
        closing = tags.sync if round_idx + 1 < len(rounds) else tags.eos
        try:
            topics = parse_plan([*plan, closing], tags)
        except PlanError as error:
            raise ValueError(f"{where}{error}") from error
        if len(topics) != len(spans):
            raise ValueError(f"{where}{len(topics)} topics but {len(spans)} spans")
        for topic, content in zip(topics, spans, strict=True):
            _check_length(topic, content, encoder, where)


def _rounds(token_ids: list[int], tags: ControlTokens) -> list[tuple[list[int], list[list[int]]]]:
    """The plan and the contents of the spans of every round.

    Raises:
        ValueError: A span that is unbalanced or nested, or anything but sync behind a span.
    """
    rounds: list[tuple[list[int], list[list[int]]]] = [([], [])]
    for start, end, is_span in _pieces(span_bounds(token_ids, tags), len(token_ids)):
        if is_span:
            rounds[-1][1].append(token_ids[start + 1 : end - 1])
            continue
        for token_id in token_ids[start:end]:
            if token_id == tags.sync:
                rounds.append(([], []))
            elif rounds[-1][1]:
                raise ValueError("text: expected a span, sync or the end behind a span")
            else:
                rounds[-1][0].append(token_id)
    return rounds


def _pieces(bounds: list[tuple[int, int]], n: int) -> Iterator[tuple[int, int, bool]]:
    """``(start, end, is_span)`` of the spans and of what is between them."""
    edges = [0, *itertools.chain.from_iterable(bounds), n]
    for piece_idx, (start, end) in enumerate(itertools.pairwise(edges)):
        yield start, end, piece_idx % 2 == 1


def _check_length(topic: Topic, content: list[int], encoder: DocumentEncoder, where: str) -> None:
    needed = max(1, -(-len(content) // encoder.length_unit))
    if topic.number != needed:
        words = encoder.tokenizer.decode(topic.token_ids).strip()
        raise ValueError(
            f"{where}topic {words!r} announces {topic.number} x {encoder.length_unit} tokens, "
            f"its span of {len(content)} needs {needed} x {encoder.length_unit}"
        )


def _count(report: DataReport, document: TaggedDocument, encoder: DocumentEncoder) -> None:
    stats = report.families.setdefault(document.family or "(none)", FamilyStats())
    token_ids = encoder(document).token_ids
    bounds = span_bounds(token_ids, encoder.tags)
    stats.num_documents += 1
    stats.num_spans += len(bounds)
    stats.num_tokens += len(token_ids)
    stats.num_span_tokens += sum(end - start - 2 for start, end in bounds)
    stats.num_pad_tokens += token_ids.count(encoder.tags.pad)
    stats.longest_document = max(stats.longest_document, len(token_ids))
